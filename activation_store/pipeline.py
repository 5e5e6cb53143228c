"""The three stations of a harvest at work at once: text -> tokens, tokens -> activations, activations -> disk.

The subject runs in the caller's thread with torch's threads. One thread tokenises a window ahead; another shuffles and
writes the window before. Two windows exist at most: the subject waits for the disk only when it is a window ahead.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, TypeVar

from activation_store.progress import human_seconds

T = TypeVar("T")
_POLL_SECONDS = 0.05


@dataclass(slots=True)
class WorkTimes:
    """Seconds by what they went into; each key belongs to one thread."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def spent(self, what: str) -> Iterator[None]:
        """Counts the time inside towards `what`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started

    def line(self) -> str:
        """What the subject's thread did, and what went on beside it."""
        return (
            f"harvest: the subject ran {self._shown('subject')}, waited {self._shown('text')} for text and "
            f"{self._shown('disk')} for the disk; beside it, tokenising took {self._shown('tokenise')} and writing "
            f"{self._shown('write')}"
        )

    def _shown(self, what: str) -> str:
        seconds = self.seconds.get(what, 0.0)
        return human_seconds(seconds) if seconds >= 10 else f"{seconds:.1f} s"


class Ahead(Generic[T]):
    """Runs an iterator in a thread, one item ahead: the next is begun when the last one has been taken."""

    def __init__(self, items: Iterator[T], *, check: Callable[[], None]) -> None:
        """`check` is called while waiting, to raise what went wrong elsewhere."""
        self._items, self._check = items, check
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()
        self._wanted = threading.Semaphore(1)
        self.stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="text", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while True:
            try:
                item, error = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                self._check()
                continue
            if error is not None:
                raise error
            if item is None:
                return
            self._wanted.release()
            yield item

    def _run(self) -> None:
        try:
            while True:
                self._wanted.acquire()
                if self.stopped.is_set():
                    return
                item = next(self._items, None)
                self._queue.put((item, None))
                if item is None:
                    return
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, which raises it
            self._queue.put((None, error))

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        self._wanted.release()
        self._thread.join()


class Behind(Generic[T]):
    """Runs `work` on items in a thread, in the order in which they are given. Closing finishes what was given."""

    def __init__(self, work: Callable[[T], None]) -> None:
        self._work = work
        self._queue: queue.Queue[T | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Hands an item over. Raises what an earlier one ended with."""
        self.check()
        self._queue.put(item)

    def check(self) -> None:
        """Raises what an item ended with."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._work(item)
                except BaseException as error:  # noqa: BLE001 - raised in the caller's thread by `check`
                    self._error = error

    def __enter__(self) -> "Behind[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self.check()
