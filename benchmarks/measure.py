"""What the benchmarks share: timing of steps that take turns, peak memory, the machine's rates, conditions, tables."""

import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

Step = Callable[[], float]
# Values of a buffer that no cache holds: 256 MiB of fp32.
_STREAM_VALUES = 2**26
# Features whose pre-activations stay in a core's cache.
_PRODUCT_BLOCK = 512


def synchronize(device: torch.device) -> None:
    """Waits for what was launched on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Wall clock of one call, to the end of what it launched."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(
    steps: Mapping[str, Step], rounds: int, device: torch.device, *, warm: int = 1, tolerance: float | None = None
) -> dict[str, list[float]]:
    """Seconds of every step in every round; in a round each runs once, so that a busy machine disturbs all alike.

    With `tolerance`, the steps' results (losses) must agree to that relative difference.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + warm):
        losses: dict[str, float] = {}
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            losses[name] = step()
            synchronize(device)
            if round_ >= warm:
                seconds[name].append(time.perf_counter() - start)
        if tolerance is not None:
            check_losses(losses, tolerance)
    return seconds


def check_losses(losses: Mapping[str, float], tolerance: float) -> None:
    """Raises RuntimeError unless all are the first one's, to that relative difference."""
    first = next(iter(losses.values()), 1.0)
    if any(not abs(loss / first - 1) <= tolerance for loss in losses.values()):
        raise RuntimeError(f"the steps do not train the same model: losses {losses}")


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios of pairs."""
    return median(n / d for n, d in zip(numerator, denominator, strict=True))


def typical_seconds(step: Callable[[], object], device: torch.device, *, calls: int = 5) -> float:
    """Median over calls, after one that does not count. On CUDA by events, a few launches at a time."""
    step()
    if device.type != "cuda":
        return median(seconds_of(step, device) for _ in range(calls))
    found = []
    for _ in range(calls):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(4):
            step()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 4e3)
    return median(found)


@cache
def stream_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of what no cache holds: the best of a copy, an update in place and a read.

    On a CPU a plain copy is the slowest of them, for it reads what it overwrites.
    """
    source = torch.ones(_STREAM_VALUES, device=device)
    target = torch.empty_like(source)
    n_bytes = source.numel() * source.element_size()
    streams: list[tuple[int, Callable[[], object]]] = [
        (2, lambda: target.copy_(source)),
        (2, lambda: target.mul_(0.5)),
        (1, source.sum),
    ]
    return max(times * n_bytes / typical_seconds(stream, device) for times, stream in streams)


def product_seconds(x_BD: Tensor, weight_FD: Tensor) -> float:
    """Seconds of torch.mm of x W^T into a buffer that is kept: at once, transposed, or by blocks of features, whichever
    is fastest."""
    (n_tokens, _), n_features = x_BD.shape, weight_FD.shape[0]
    out = torch.empty(n_tokens * n_features, dtype=x_BD.dtype, device=x_BD.device)

    def blocks() -> None:
        for start in range(0, n_features, _PRODUCT_BLOCK):
            rows = weight_FD[start : start + _PRODUCT_BLOCK]
            torch.mm(x_BD, rows.t(), out=out[: n_tokens * rows.shape[0]].view(n_tokens, -1))

    ways: list[Callable[[], object]] = [
        lambda: torch.mm(x_BD, weight_FD.t(), out=out.view(n_tokens, n_features)),
        lambda: torch.mm(weight_FD, x_BD.t(), out=out.view(n_features, n_tokens)),
        blocks,
    ]
    return min(typical_seconds(way, x_BD.device, calls=3) for way in ways)


class PeakMemory:
    """Memory that a process adds from `start` to its peak: resident set on a CPU, the allocator's on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0.0

    def start(self) -> None:
        """What the process holds now does not count."""
        if self._device.type == "cuda":
            synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        # Linux: the peak becomes the present resident set.
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status_bytes("VmRSS")

    def added_mib(self) -> float:
        """Peak since `start` over what was held then."""
        cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if cuda else _status_bytes("VmHWM")
        return (peak - self._before) / 2**20


def _status_bytes(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def total_mib(device: torch.device) -> float:
    """Memory of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**20
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20


def machine(device: torch.device) -> str:
    """One line: processor or card, threads, versions."""
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    else:
        place = f"{torch.get_num_threads()} threads of {_processor()} ({os.cpu_count()} cores)"
    packages = ("numba", "triton")
    words = [f"torch {torch.__version__}", *(f"{name} {found}" for name in packages if (found := _version(name)))]
    return f"{place}; Python {platform.python_version()}, {', '.join(words)}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def command(module: str) -> str:
    """The command line that was run, without the option that names the file to write."""
    words, skip = [], False
    for word in sys.argv[1:]:
        skip, before = word in {"--write", "--plot"}, skip
        if not (skip or before or word.startswith(("--write=", "--plot="))):
            words.append(word)
    return shlex.join(["python", "-m", module, *words])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Page:
    """Sections of markdown, printed as they come. With a path the page is written after each: a run that is cut short,
    or fails late, keeps what it has measured."""

    def __init__(self, path: str | None, *sections: str) -> None:
        self._path, self._sections = path, list(sections)
        print("\n\n".join(sections), flush=True)

    def add(self, section: str) -> None:
        """The next section."""
        self._sections.append(section)
        print(f"\n{section}", flush=True)
        if self._path:
            write_page(self._path, "\n\n".join(self._sections))


def write_page(path: str, text: str) -> None:
    """The page to a file, with a last newline."""
    Path(path).write_text(text.rstrip() + "\n", encoding="utf-8")
