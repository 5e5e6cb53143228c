"""One worker of a harvest: takes windows that nobody has, harvests and commits them, until none is left."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from activation_store.blocks import BlockRunner, capture_rows
from activation_store.claims import CLAIMS, Claims
from activation_store.compare import config_differences
from activation_store.completion import complete_store
from activation_store.errors import UserError
from activation_store.manifest import (
    COMPLETE,
    StoreManifest,
    commit_path,
    committed_windows,
)
from activation_store.pipeline import Ahead, Behind, WorkTimes
from activation_store.progress import Progress
from activation_store.storage import Storage
from activation_store.windows import WINDOWS, Part, WindowRecord, Windows, WindowText, row_order
from activation_store.writer import WindowRows, WindowWriter

# Windows in memory at once: one is filled while one is written.
_BUFFERS = 2
_FINISH = "finish"


@dataclass(slots=True)
class PartWork:
    """One part as a worker sees it."""

    part: Part
    manifest: StoreManifest
    storage: Storage
    windows: Windows
    writer: WindowWriter

    def committed(self, window: int) -> bool:
        return commit_path(self.part.folder, window).exists()


@dataclass(frozen=True, slots=True)
class WindowJob:
    """A window that this worker has claimed."""

    work: PartWork
    record: WindowRecord
    text: WindowText

    @property
    def claim(self) -> str:
        return claim_name(self.record)


def claim_name(record: WindowRecord) -> str:
    return f"{record.window:08d}.json"


@dataclass(slots=True)
class Worker:
    """Harvests windows of `parts` with everybody else who does. `window_rows`: most rows of a window."""

    parts: list[PartWork]
    claims: Claims
    runner: BlockRunner
    window_rows: int
    progress: Progress
    times: WorkTimes = field(default_factory=WorkTimes)
    _own_commit: threading.Event = field(default_factory=threading.Event)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _free: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_BUFFERS))
    _buffers: list[WindowRows] = field(default_factory=list)

    def run(self) -> None:
        """Until every window of every part is committed, by whomever.

        Raises UserError for a non-finite activation, OSError from the disk; windows that are committed stay.
        """
        with Behind(self._commit) as behind, Ahead(self._timed_jobs(), check=behind.check) as ahead:
            self._stopped = ahead.stopped
            jobs = iter(ahead)
            while True:
                with self.times.spent("text"):
                    job = next(jobs, None)
                if job is None:
                    return
                with self.times.spent("disk"):
                    rows = self._free_buffer(behind)
                self._harvest(job, rows)
                behind.put((job, rows))

    def _harvest(self, job: WindowJob, rows: WindowRows) -> None:
        for batch in job.text.contexts.batches(self.runner.store.batch_contexts):
            with self.times.spent("subject"):
                captured = capture_rows(batch, self.runner, job.text.names)
            with self.times.spent("gather"):
                rows.append(captured)
            self.progress.advance(len(captured))

    def _free_buffer(self, behind: Behind[tuple[WindowJob, WindowRows]]) -> WindowRows:
        while not self._free.acquire(timeout=0.05):
            behind.check()
        behind.check()
        if self._buffers:
            rows = self._buffers.pop()
            rows.filled = 0
            return rows
        return WindowRows(self.parts[0].manifest.layout, self.window_rows, self.runner.store.scratch)

    def _commit(self, item: tuple[WindowJob, WindowRows]) -> None:
        """In the writer's thread."""
        job, rows = item
        with self.times.spent("write"):
            self._write(job, rows)
            self.claims.release(job.work.storage, job.claim)
        self._own_commit.set()
        self._buffers.append(rows)
        self._free.release()

    def _write(self, job: WindowJob, rows: WindowRows) -> None:
        work, record = job.work, job.record
        there = StoreManifest.load(work.part.folder)
        if config_differences(there.config, work.manifest.config):
            raise UserError(f"store {work.part.folder} was begun anew with another config while this harvest ran")
        order = row_order(work.part.text.seed, work.part.name, record.window, rows.filled)
        try:
            work.writer.write(rows, order, record, job.text.names)
        except FileNotFoundError:
            # Taken for dead, and cleaned up behind: the window is somebody else's, or this is a real error.
            if not work.committed(record.window):
                raise

    def _timed_jobs(self) -> Iterator[WindowJob]:
        jobs = self._jobs()
        while True:
            with self.times.spent("tokenise"):
                job = next(jobs, None)
            if job is None:
                return
            yield job

    def _jobs(self) -> Iterator[WindowJob]:
        """Windows that this worker may harvest: first what nobody claims, then what was claimed and left."""
        left: list[tuple[PartWork, WindowRecord]] = []
        for work in self.parts:
            for record in _uncommitted(work):
                if self.claims.take(work.storage, claim_name(record)):
                    yield from self._unless_committed(work, record)
                left.append((work, record))
        while left := [(work, record) for work, record in left if not work.committed(record.window)]:
            if self._stopped.is_set():
                return
            # A commit of this worker's own may have been the last: that is looked at at once, claims at their pace.
            if self._own_commit.wait(self.claims.pause_seconds):
                self._own_commit.clear()
                continue
            for work, record in left:
                if self.claims.observe(work.storage, claim_name(record)):
                    yield from self._unless_committed(work, record)

    def _unless_committed(self, work: PartWork, record: WindowRecord) -> Iterator[WindowJob]:
        """The job of a window that was just claimed; nothing if its last owner committed it meanwhile."""
        if work.committed(record.window):
            self.claims.release(work.storage, claim_name(record))
        else:
            yield WindowJob(work, record, work.windows.text(record))


def _uncommitted(work: PartWork) -> Iterator[WindowRecord]:
    """The windows with rows that were not committed when this was begun."""
    if work.manifest.status == COMPLETE:
        # Its records of windows are gone: to look for one would tokenise all of the text.
        return
    committed = set(committed_windows(work.part.folder))
    for window in count():
        if window in committed:
            continue
        record = work.windows.record(window)
        if record is None:
            return
        if record.rows:
            yield record


def finish(work: PartWork, claims: Claims) -> None:
    """Counts, final statistics and status of a part whose windows are all committed: by one worker, others wait."""
    folder = work.part.folder
    while StoreManifest.load(folder).status != COMPLETE:
        if not claims.observe(work.storage, _FINISH):
            claims.pause()
            continue
        if StoreManifest.load(folder).status != COMPLETE:
            _complete(work)
        claims.release(work.storage, _FINISH)
    # A worker that began while the last window was committed has made records anew.
    _forget_windows(work)


def _complete(work: PartWork) -> None:
    folder = work.part.folder
    complete_store(folder, StoreManifest.load(folder))
    _forget_windows(work)
    work.storage.clean()


def _forget_windows(work: PartWork) -> None:
    """Records and claims of windows, which nobody needs when all are committed."""
    for place in (WINDOWS, CLAIMS):
        for key in list(work.storage.list(place)):
            if not key.endswith(f"/{_FINISH}"):
                work.storage.delete(key)
