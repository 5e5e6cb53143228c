"""Wall-clock time and peak memory of a stage."""

import threading
import time
from types import TracebackType

import psutil

_SAMPLE_SECONDS = 0.2


class Usage:
    """Measures the block it encloses: `seconds`, and `peak_bytes`, the largest resident memory of this process and its
    children together. Sampled five times a second: a peak between two samples is missed.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="usage", daemon=True)

    def __enter__(self) -> "Usage":
        self._started = time.monotonic()
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.monotonic() - self._started
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        resident = self._process.memory_info().rss
        for child in self._process.children(recursive=True):
            try:
                resident += child.memory_info().rss
            except psutil.NoSuchProcess:
                continue  # it ended between the listing and the look
        self.peak_bytes = max(self.peak_bytes, resident)
