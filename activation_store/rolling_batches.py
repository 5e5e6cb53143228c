"""Training batches from a rolling store: waits for windows, reads them in groups, frees what checkpoints are past."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from activation_store.assembly import Assembler, StoredBatch
from activation_store.background import POLL_SECONDS, BackgroundBatches, BatchShape
from activation_store.children import Child
from activation_store.compare import config_differences
from activation_store.config import SourceConfig
from activation_store.errors import UserError
from activation_store.manifest import MANIFEST, Commit, StoreManifest, commit_path
from activation_store.progress import report
from activation_store.rolling import RollingFolder, too_small
from activation_store.rolling_order import Group, Groups, RollingOrder
from activation_store.shuffle import batch_lanes
from activation_store.store import ActivationStore

# Batches that the readers are ahead of the one that is being finished.
READ_AHEAD = 3
# Seconds without a window after which a line says what is waited for.
_PATIENCE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class RollingBudget:
    """`windows` of at most `window_bytes` may be on disk; a checkpoint comes every `checkpoint_batches` batches."""

    windows: int
    window_bytes: int
    checkpoint_batches: int


class RollingBatches(BackgroundBatches):
    """Infinite iterator over rank `rank`'s share of the global batches n = start_batch, start_batch + 1, ...

    Batch n is a function of (seed, n) for a text, subject, sample, window size and `source.mixed_windows`, pool and
    batch size; rank r has its r-th equal part. `state` is what `state()` was at `start_batch`. Rank 0 alone frees
    windows (`checkpointed`). Errors of `children`, harvests that training started, are raised by `next`.
    """

    def __init__(
        self,
        folder: RollingFolder,
        sample: ActivationStore,
        source: SourceConfig,
        budget: RollingBudget,
        *,
        batch_size_tokens: int,
        rank: int = 0,
        ranks: int = 1,
        start_batch: int = 0,
        state: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        children: Sequence[Child] = (),
        resources: ExitStack | None = None,
    ) -> None:
        """`resources` are closed at the end. `sample` is of the same subject, text and store config."""
        super().__init__(
            BatchShape(sample.layout, batch_size_tokens, ranks, sample.n_layers),
            start_batch=start_batch,
            prefetch_bytes=source.prefetch_bytes,
            threads=source.threads,
            decoded=True,
            device=device,
        )
        self._folder, self._sample, self._budget = folder, sample, budget
        self._rank, self._mixed, self._children = rank, source.mixed_windows, children
        self._resources = resources or ExitStack()
        self._state = dict(state or {"group": 0, "start": 0, "epoch": 0})
        self._taking = start_batch
        # The batch of the last checkpoint, and the windows before which it has no need of any.
        self._saved = start_batch, int(self._state["group"]) * self._mixed
        self._not_freed: OSError | UserError | None = None
        # The group in which a batch begins, and the first shard of a group: of those that training may not be past.
        self._group_at = {start_batch: int(self._state["group"])}
        self._first_shards: dict[int, int] = {}
        self._groups = Groups(
            self._load, folder.folder, sample.layout, first=self._state["group"], start=self._state["start"]
        )
        chunk_rows = sample.layout.chunk_rows
        lanes = batch_lanes(batch_size_tokens, most=min(source.lanes, source.pool_rows // chunk_rows))
        order = RollingOrder(
            self._groups,
            seed=source.seed,
            lanes=lanes,
            pool_chunks=max(1, source.pool_rows // (lanes * chunk_rows)),
            run_rows=source.run_rows,
        )
        self._assembler = Assembler(
            self._groups,
            order,
            executor=self._executor,
            threads=self._threads,
            buffers=self._buffers,
            columns=range(sample.n_layers),
            batch_rows=batch_size_tokens,
            rank=rank,
            ranks=ranks,
            first=start_batch,
            keep=-(-source.pool_rows // batch_size_tokens) + READ_AHEAD + 3 + self._waiting_as_read,
            decoded=self._decodes_on_the_way,
        )
        self._thread.start()

    @property
    def epochs(self) -> float:
        """How often the text was gone through, whole times alone."""
        return float(self._state["epoch"])

    def checkpointed(self, position: int) -> None:
        """A checkpoint at `position`, where training is or was, is durable: frees the windows wholly before."""
        group = self._group_at[position]
        # In place: the reader's thread adds to them.
        for at in [at for at in list(self._group_at) if at < position]:
            del self._group_at[at]
        self._assembler.forget(self._first_shards[group])
        for number in [number for number in list(self._first_shards) if number < group]:
            del self._first_shards[number]
        self._saved = position, group * self._mixed
        if self._rank == 0:
            try:
                self._folder.free(group * self._mixed)
            except (OSError, UserError) as error:
                # Checkpoints are written in a thread of their own, and training may be waiting for this very room.
                self._not_freed = error
                raise

    def finish(self) -> None:
        """Training is done: tells the harvests."""
        if self._rank == 0:
            self._folder.finish()

    def close(self) -> None:
        """Ends threads, and harvests that training started."""
        super().close()
        for child in self._children:
            child.close()
        self._resources.close()

    def _take(self, number: int) -> tuple[StoredBatch, dict[str, Any]]:
        self._taking = number
        self._groups.forget(number * self._shape.batch_rows)
        self._assembler.schedule(number + READ_AHEAD)
        stored = self._assembler.take(number)
        group = self._groups.begun((number + 1) * self._shape.batch_rows)
        assert group is not None
        self._group_at[number + 1] = group.number
        return stored, {"group": group.number, "start": group.start, "epoch": group.epoch}

    def _load(self, number: int, start: int) -> Group:
        """Waits for the windows of a group."""
        windows = range(number * self._mixed, (number + 1) * self._mixed)
        for window in windows:
            self._wait_for(window, last=windows[-1])
        check_same(self._folder, self._sample)
        manifest = StoreManifest.load(self._folder.folder)
        commits = [Commit.load(commit_path(self._folder.folder, window)) for window in windows]
        blocks = [(commit.start_row, commit.rows) for commit in commits]
        store = ActivationStore(self._folder.folder, manifest, blocks)
        statistics = self._sample.statistics()
        means = torch.stack([statistics.input_norm_mean_L, statistics.output_norm_mean_L], dim=1).numpy()
        used = store.find_used_rows(means)
        if used.count == 0:
            raise UserError(f"windows {windows[0]} to {windows[-1]} of {self._folder.folder} have no row to train on")
        self._first_shards[number] = blocks[0][0] // store.layout.shard_rows
        return Group(number, start, self._folder.epoch_of(windows[0]), store, used)

    def _wait_for(self, window: int, *, last: int) -> None:
        """Until a window is committed. Raises UserError where it cannot be, or who was to harvest it has ended."""
        waited = 0.0
        while not commit_path(self._folder.folder, window).exists():
            if self._stop.wait(POLL_SECONDS):
                raise RuntimeError("closed while it waited for a window")
            self._check_children()
            if self._not_freed is not None:
                raise self._not_freed
            self._check_room(last)
            waited += POLL_SECONDS
            if waited >= _PATIENCE_SECONDS:
                report(
                    f"train: waits for window {window} of {self._folder.folder}; is `layerloom harvest source=rolling` "
                    "with the same words running?"
                )
                waited = 0.0

    def _check_children(self) -> None:
        for number, child in enumerate(self._children):
            said = child.connection.recv() if child.running() and child.connection.poll() else ""
            if said or not child.running():
                name = f"harvester {number + 1} of {len(self._children)} (process {child.pid})"
                end = f"stopped: {said}" if said else child.end()
                raise UserError(f"{name} {end}; the windows that training waits for are missing: mend that")

    def _check_room(self, last: int) -> None:
        """Raises UserError if window `last`, wanted before the next checkpoint, waits for that checkpoint's room."""
        # In this order: rank 0 may be making that room just now, which takes it a while.
        (saved, needed), state = self._saved, self._folder.read()
        if state.freed < needed:
            return
        if last >= state.freed + state.windows and self._taking < saved + self._budget.checkpoint_batches:
            wanted = last + 1 - state.freed + self._mixed
            raise too_small(
                self._budget.windows * self._budget.window_bytes, state.windows, wanted, self._budget.window_bytes
            )


def check_same(folder: RollingFolder, sample: ActivationStore) -> None:
    """Raises UserError for a store, if there is one yet, of another subject, text or config than the sample."""
    if not (folder.folder / MANIFEST).exists():
        return
    ours, theirs = (_comparable(m.config) for m in (sample.manifest, StoreManifest.load(folder.folder)))
    if differences := config_differences(theirs, ours):
        raise UserError(
            f"store {folder.folder} is filled with another config: {differences[0]}; give harvest and training the "
            "same values, or another store.path"
        )


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a sample and a rolling store have in common."""
    store = {key: value for key, value in config["store"].items() if key not in ("tokens", "held_out_tokens")}
    return {**config, "store": store}
