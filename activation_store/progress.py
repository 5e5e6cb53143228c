"""Progress that suits a terminal and a log file alike, always with rate and time left."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

_LINE_SECONDS = 10.0


class _Speech:
    """Whether this process says anything at all."""

    silent = False


@contextmanager
def silenced(silent: bool = True) -> Iterator[None]:
    """While it lasts, `report` and Progress say nothing (unless silent=False): of several processes, one speaks."""
    before = _Speech.silent
    _Speech.silent = silent or before
    try:
        yield
    finally:
        _Speech.silent = before


def report(text: str) -> None:
    """Prints one plain line to stderr, above a progress bar if one is running."""
    if _Speech.silent:
        return
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def human_bytes(count: float) -> str:
    """`1.5 GB`, decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("the loop returns at TB")


def counted(count: int, one: str, many: str = "") -> str:
    """`1 window`, `1,526 rows`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def layer_range(layers: Sequence[int]) -> str:
    """`layers 4-6`, `layer 4`."""
    if not layers:
        return "no layers"
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"


def human_seconds(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def human_count(count: float) -> str:
    """`850`, `12.3k`, `4.56M`."""
    for unit in ("", "k", "M", "G"):
        if abs(count) < 999.5 or unit == "G":
            return f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError("the loop returns at G")


class Progress:
    """Counts units of work.

    On a terminal it is a tqdm bar; elsewhere a plain line at most every ten seconds, and a last one. The rate is over
    this process's own work: units that were done before (`initial`) count towards the total but not towards the rate.
    """

    def __init__(self, name: str, *, total: int, unit: str, initial: int = 0, stream: TextIO | None = None) -> None:
        """Shows `name`, `initial` of `total` units done; `unit` is a short word such as "tok"."""
        self.name, self.total, self.unit = name, total, unit
        self.done = self._initial = initial
        self._stream = stream if stream is not None else sys.stderr
        self._note = ""
        self._started = self._printed = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if self._stream.isatty() and not _Speech.silent:
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=name,
                unit=unit,
                unit_scale=True,
                file=self._stream,
                dynamic_ncols=True,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def advance(self, n: int = 1, *, note: str = "") -> None:
        """Adds `n` units; `note` (such as "loss 1.23") is shown beside the rate until the next note."""
        self.done += n
        if note:
            self._note = note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        elif self.done < self.total and time.monotonic() - self._printed >= _LINE_SECONDS:
            self._print_line()  # the last line is that of `close`

    def close(self) -> None:
        """Ends the bar, or prints the last line."""
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.refresh()
            self._bar.close()
        else:
            self._print_line()

    def line(self) -> str:
        """The state as one line: share, counts, rate, and time left (or time taken when all is done)."""
        elapsed = max(time.monotonic() - self._started, 1e-9)
        rate = (self.done - self._initial) / elapsed
        share = f"{self.done / self.total:.0%} " if self.total else ""
        if self.done >= self.total:
            end = f"took {human_seconds(elapsed)}"
        else:
            end = f"{human_seconds((self.total - self.done) / rate)} left" if rate > 0 else "time left unknown"
        note = f", {self._note}" if self._note else ""
        of_total = f"/{human_count(self.total)}" if self.total else ""
        counts = f"({human_count(self.done)}{of_total} {self.unit})"
        return f"{self.name}: {share}{counts}, {human_count(rate)} {self.unit}/s, {end}{note}"

    def _print_line(self) -> None:
        self._printed = time.monotonic()
        if not _Speech.silent:
            print(self.line(), file=self._stream, flush=True)
