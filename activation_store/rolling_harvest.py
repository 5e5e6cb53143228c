"""One worker of a rolling store: harvests windows as training makes room for them, until training is done."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from activation_store.blocks import BlockRunner
from activation_store.claims import PATIENCE, Claims
from activation_store.config import SourceConfig, StoreConfig, SubjectConfig, TextConfig
from activation_store.device import resolve_device
from activation_store.errors import UserError
from activation_store.harvest import begin_part, continuable, own_device
from activation_store.hooks import CaptureHooks
from activation_store.plan import HarvestPlan, check_folder, make_plan
from activation_store.progress import Progress, human_bytes, report
from activation_store.rolling import RollingFolder, too_small, window_bytes, windows_within
from activation_store.subject import load_subject
from activation_store.text import check_documents
from activation_store.windows import Part
from activation_store.work import WindowJob, Worker, claim_name
from activation_store.writer import WindowRows


def rolling_plan(subject: SubjectConfig, text: TextConfig, store: StoreConfig) -> HarvestPlan:
    """A plan of training rows alone, without end. Raises UserError for what is not there, and for a URL."""
    plan = make_plan(subject, text, store)
    if not isinstance(plan.folder, Path):
        raise UserError(f"store.path={plan.folder}: a rolling store is emptied on a disk; give a folder")
    most_rows = plan.window_contexts * text.context_length
    return replace(plan, parts=[Part("train", plan.folder, text, None, most_rows, endless=True)])


def bytes_per_window(plan: HarvestPlan) -> int:
    """Most bytes of a window of this plan on disk."""
    return window_bytes(plan.layout, plan.window_rows(), plan.window_contexts)


def harvest_rolling(
    subject: SubjectConfig, text: TextConfig, store: StoreConfig, source: SourceConfig, *, device: str = "auto"
) -> None:
    """Fills `store.path` within its budget, with every other process that does, until training says that it is done.

    Raises UserError for what cannot work, before anything is written.
    """
    plan = rolling_plan(subject, text, store)
    folder = RollingFolder(Path(str(plan.folder)))
    folder.check()
    check_folder(plan.folder)
    windows = windows_within(source.budget_bytes, bytes_per_window(plan))
    if windows < 1:
        raise too_small(source.budget_bytes, windows, 1, bytes_per_window(plan))
    with continuable(plan):
        check_documents(text)
        loaded = load_subject(subject, device=resolve_device(own_device(device)))
        hooks = CaptureHooks(
            loaded, input_hook=store.input_hook, layer_start=plan.layers.start, layer_stop=plan.layers.stop
        )
        state = folder.join(windows)
        report(
            f"harvest: {state.windows} windows of at most {human_bytes(bytes_per_window(plan))} in {plan.folder} at a "
            "time, as training makes room for more"
        )
        with (
            Claims(pause_seconds=store.claim_seconds / PATIENCE) as claims,
            Progress("harvest", total=0, unit="tok") as progress,
        ):
            runner = BlockRunner(hooks, subject, store)
            works = [begin_part(plan, plan.parts[0], hooks)]
            worker = RollingWorker(works, claims, runner, plan.window_rows(), progress, folder=folder)
            worker.run()
    report(f"{worker.times.line()}; training is done")


@dataclass(frozen=True, slots=True)
class RollingJob:
    """What a worker in a process of its own is told."""

    subject: SubjectConfig
    text: TextConfig
    store: StoreConfig
    source: SourceConfig
    device: str


@dataclass(slots=True, kw_only=True)
class RollingWorker(Worker):
    """Harvests the windows that the budget has room for, in their order."""

    folder: RollingFolder

    def _jobs(self) -> Iterator[WindowJob]:
        work = self.parts[0]
        while not self._stopped.is_set():
            state = self.folder.read()
            if state.finished:
                return
            job: WindowJob | None = None
            claimed: list[int] = []
            # One after another: the budget may have room for more windows than anybody wants to ask the disk about.
            for window in range(state.first, state.freed + state.windows):
                if not work.committed(window):
                    if (job := self._take(window)) is not None:
                        break
                    claimed.append(window)
            if job is not None:
                yield job
                continue
            # Nothing is free: until the budget has room, or a claim is seen to be left.
            self._own_commit.clear()
            self._own_commit.wait(self.claims.pause_seconds)
            for window in claimed:
                if self.claims.observe(work.storage, f"{window:08d}.json"):
                    if self.folder.read().allows(window) and not work.committed(window):
                        yield self._job(window)
                    else:
                        self.claims.release(work.storage, f"{window:08d}.json")

    def _take(self, window: int) -> WindowJob | None:
        """The job of a window that nobody claims and that is still wanted."""
        work, name = self.parts[0], f"{window:08d}.json"
        if not self.claims.take(work.storage, name):
            return None
        if self.folder.read().allows(window) and not work.committed(window):
            return self._job(window)
        self.claims.release(work.storage, name)
        return None

    def _job(self, window: int) -> WindowJob:
        work = self.parts[0]
        record = work.windows.record(window)
        assert record is not None, "the text has no end"
        assert claim_name(record) == f"{window:08d}.json"
        return WindowJob(work, record, work.windows.text(record))

    def _write(self, job: WindowJob, rows: WindowRows) -> None:
        """Not what training has done with in the meantime: another harvested it, for this worker was taken for dead."""
        window = job.record.window
        if not self.folder.read().allows(window):
            return
        # Whoever left them was taken for dead.
        self.folder.remove_partials(job.record.start_row // self.runner.store.shard_rows, job.record.rows)
        try:
            Worker._write(self, job, rows)
        except FileNotFoundError:
            # This worker was taken for dead: the window is another's now.
            return
        if window < self.folder.read().first and job.work.committed(window):
            self.folder.remove(window)
