"""Text, subject and disk are at work at once, and the times say who waited for whom."""

import threading
from typing import Any

import pytest

from activation_store import work
from activation_store.harvest import harvest
from activation_store.pipeline import WorkTimes
from activation_store.windows import Windows
from activation_store.writer import WindowWriter
from tests.store.harvesting import Configs
from tests.store.test_harvest import changed, configs, folder

__all__ = ["configs", "folder"]
# Only a station that waits for its neighbour waits so long.
PATIENCE = 30.0


def test_stations_overlap(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The subject's first batch ends when the next window's text is there, the first write when its rows are begun."""
    next_text, next_rows, met = threading.Event(), threading.Event(), []
    capture, text, write = work.capture_rows, Windows.text, WindowWriter.write
    batches, texts = 0, 0

    def slow_capture(batch: Any, *rest: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 1:
            met.append(next_text.wait(PATIENCE))
        # A window has three batches.
        if batches == 4:
            next_rows.set()
        return capture(batch, *rest)

    def told_text(self: Windows, record: Any) -> Any:
        nonlocal texts
        found = text(self, record)
        texts += 1
        if texts == 2:
            next_text.set()
        return found

    def slow_write(self: WindowWriter, *rest: Any) -> bool:
        if len(met) == 1:
            met.append(next_rows.wait(PATIENCE))
        return write(self, *rest)

    monkeypatch.setattr(work, "capture_rows", slow_capture)
    monkeypatch.setattr(Windows, "text", told_text)
    monkeypatch.setattr(WindowWriter, "write", slow_write)
    harvest(*changed(configs, store={"held_out_tokens": 0}), device="cpu")
    assert met == [True, True]
    assert batches > 4


def test_the_line_says_what_the_subject_waited_for() -> None:
    times = WorkTimes({"subject": 61.4, "text": 2.04, "disk": 0.26, "tokenise": 5.0, "write": 12.2})
    with times.spent("disk"):
        pass
    assert times.line() == (
        "harvest: the subject ran 1 min 01 s, waited 2.0 s for text and 0.3 s for the disk; beside it, tokenising took "
        "5.0 s and writing 12 s"
    )
