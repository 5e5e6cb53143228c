"""Ctrl-C and SIGTERM as a request to stop after the current step, so that a checkpoint can be written."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from activation_store.progress import report


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets `requested`; a second one raises KeyboardInterrupt at once.

    Outside the main thread, where Python cannot set handlers, signals keep their effect.
    """

    def __init__(self, *, told_later: bool = False) -> None:
        """told_later: says nothing when the signal comes (not every rank that gets one stops by it)."""
        self.requested, self._silent = False, told_later
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if not self._silent:
            report(
                f"{signal.Signals(number).name}: stopping after this step (once more: at once, without a checkpoint)"
            )
