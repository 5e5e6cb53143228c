"""Fills batches from the shards: each row of a pool goes straight to its place in the batch where it comes.

Letters: B rows of a rank's batch, L layers that are read, D d_model, t place in a lane's stream (see `order`).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol

import numpy as np

from activation_store.buffers import Buffers
from activation_store.chunks import RowChunk
from activation_store.config import Compression
from activation_store.layout import ArrayLayout, StoreLayout
from activation_store.order import LaneOrder, Pool, PoolPart
from activation_store.places import Place, RemotePath
from activation_store.scatter import Plan, Runs, Scatter, compiled
from activation_store.shards import OpenShards, ShardFile
from activation_store.statistics import BoolRows

IntRows = np.ndarray[Any, np.dtype[np.int64]]
# A part of a file, and what of it goes where: what `ShardFile.scatter` and `planned` take.
_Part = tuple[ShardFile, tuple[int, int, int, Scatter, int]]
# Parts of pools that a thread reads at a time, and their bytes: it cannot be stopped between them.
_MOST_AT_A_TIME, _BYTES_AT_A_TIME = 8, 1 << 28


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """A rank's batch: `columns` of `mlp_in`, `mlp_out` (L, B, D) as stored, and of their scales, if any, (L, B).

    `rows`: logical rows (B,); `epoch` of the first row; `decoded`: float32 already, then without scales.
    """

    epoch: int
    columns: dict[str, np.ndarray[Any, Any]]
    rows: IntRows
    decoded: bool = False


class _Chunks(Protocol):
    def __getitem__(self, number: int, /) -> RowChunk: ...


class _Used(Protocol):
    def mask(self, chunk: int, rows: int, /) -> BoolRows: ...


class ReadableStore(Protocol):
    """What is read of a store: the chunks whose numbers the order gives, and which of their rows are used."""

    @property
    def path(self) -> Place: ...
    @property
    def layout(self) -> StoreLayout: ...
    @property
    def chunks(self) -> _Chunks: ...
    @property
    def used(self) -> _Used: ...


class Assembler:
    """Batches `first`, `first + 1`, ... of a rank, in order. `schedule` and `take` are for one thread."""

    def __init__(
        self,
        store: ReadableStore,
        order: LaneOrder,
        *,
        executor: Executor,
        threads: int,
        buffers: Buffers,
        columns: Sequence[int],
        batch_rows: int,
        rank: int,
        ranks: int,
        first: int,
        keep: int,
        decoded: bool,
    ) -> None:
        """`threads`: of the executor. `batch_rows`: of the global batch. `columns`: layers to read, by their index.

        `keep`: buffers to keep. `decoded`: rows are decoded on their way to the batch; else it holds them as stored.
        """
        self._store, self._order, self._executor, self._buffers = store, order, executor, buffers
        self._columns, self._keep, self._first, self._threads = columns, keep, first, threads
        self._decoded = store.layout.dtype if decoded else None
        if (native := compiled(self._decoded)) is not None:
            # Threads would all compile it, and numba's cache folder is one setting for all.
            native.scatter()
        self._column_runs = _runs(columns)
        self._share = batch_rows // ranks
        self._batch_rows = batch_rows
        # Slots of a global batch go lane by lane; a rank has consecutive ones.
        self._first_slot = rank * self._share
        self._each = batch_rows // order.lanes
        first_lane, last_lane = self._first_slot // self._each, (self._first_slot + self._share - 1) // self._each
        # Up to which place each lane was asked for.
        self._next_t = dict.fromkeys(range(first_lane, last_lane + 1), first * self._each)
        self._batches: dict[int, StoredBatch] = {}
        # What is being read, in the order of the first place of its pools.
        self._pending: deque[tuple[int, Future[None]]] = deque()
        self._shards = OpenShards(store.path)
        self._groups = [
            [store.layout.activations(name), *([scale] if (scale := store.layout.scale(name)) else [])]
            for name in ("mlp_in", "mlp_out")
        ]
        # Before threads ask for it.
        self._used = store.used
        self._at_a_time = self._parts_at_a_time(store)

    def _parts_at_a_time(self, store: ReadableStore) -> int:
        """Several where one call reads them: a thread holds the interpreter between calls, and others wait for it."""
        layout = store.layout
        if isinstance(store.path, RemotePath) or layout.compression is not Compression.none:
            return 1
        part_bytes = layout.chunk_rows * layout.row_bytes * len(self._columns) // layout.n_layers
        return max(1, min(_MOST_AT_A_TIME, _BYTES_AT_A_TIME // part_bytes))

    def schedule(self, last: int) -> None:
        """Begins to read all that the batches up to `last` need, if it was not begun before.

        After an error of this or of `take`, batches are not whole: the assembler is of no more use.
        """
        begun: list[tuple[int, _Target]] = []
        for lane in self._next_t:
            while (t := self._next_t[lane]) < (last + 1) * self._each:
                pool = self._order.pool_at(lane, t)
                begun.extend((pool.start, target) for target in self._targets(lane, pool))
                self._next_t[lane] = pool.stop
        begun.sort(key=itemgetter(0))
        # Equally many for each thread.
        tasks = min(len(begun), self._threads * -(-len(begun) // (self._threads * self._at_a_time)))
        for task in range(tasks):
            some = begun[len(begun) * task // tasks : len(begun) * (task + 1) // tasks]
            scales: list[_Part] = []
            values: list[_Part] = []
            for _, target in some:
                self._add_parts(target, scales, values)
            future = self._executor.submit(_read, [(parts, _plan(parts)) for parts in (scales, values) if parts])
            self._pending.append((some[0][0], future))

    def take(self, number: int) -> StoredBatch:
        """Waits for a batch and hands it over. Raises what reading raised (DamagedShardError, OSError)."""
        self.schedule(number)
        while self._pending and self._pending[0][0] < (number + 1) * self._each:
            # A pool that reaches into later batches is whole then.
            self._pending.popleft()[1].result()
        return self._batches.pop(number)

    def forget(self, shard: int) -> None:
        """Closes the files of shards before `shard`: what is deleted takes no room then."""
        self._shards.forget(shard)

    def _targets(self, lane: int, pool: Pool) -> Iterator["_Target"]:
        first, last = max(self._first, pool.start // self._each), (pool.stop - 1) // self._each
        for number in range(first, last + 1):
            if number not in self._batches:
                self._batches[number] = self._new_batch(number)
        batches = [self._batches[number] for number in range(first, last + 1)]
        first_slot, done = lane * self._each - self._first_slot, 0
        # The rule, but for lanes that two ranks share and for the first batches of a run.
        whole = first * self._each <= pool.start and 0 <= first_slot <= self._share - self._each
        for part in pool.parts:
            size = part.stop - part.start
            t = pool.start + pool.places[done : done + size]
            done += size
            mine = None
            if not whole:
                slots = first_slot + t % self._each
                mine = np.flatnonzero((t >= first * self._each) & (slots >= 0) & (slots < self._share))
                t = t[mine]
            if len(t):
                self._hint(part.chunk)
                yield _Target(part, mine, t - first * self._each, first_slot, self._each, batches)

    def _new_batch(self, number: int) -> StoredBatch:
        decoded = self._decoded is not None
        columns = {
            array.name: self._buffers.take(
                (len(self._columns), self._share, *array.tail_shape),
                np.dtype(np.float32) if decoded else array.dtype,
                keep=2 * self._keep,
            )
            for group in self._groups
            for array in (group[:1] if decoded else group)
        }
        rows = self._buffers.take((self._share,), np.dtype(np.int64), keep=self._keep)
        return StoredBatch(self._order.text_epoch(number * self._batch_rows), columns, rows, decoded)

    def _hint(self, chunk: int) -> None:
        """All that `_read` will want: what is not asked for here would wait behind all that is."""
        place = self._store.chunks[chunk]
        for group in self._groups:
            for array in group:
                file = self._shards.get(array, place.shard)
                for start, stop in self._column_runs:
                    file.hint(place.row_chunk * array.chunks_abreast + self._columns[start], stop - start)

    def _add_parts(self, target: "_Target", scales: list[_Part], values: list[_Part]) -> None:
        """Adds those of a part of a pool; scales that decode the values on the way."""
        chunk = self._store.chunks[target.part.chunk]
        used = np.flatnonzero(self._used.mask(target.part.chunk, chunk.rows))
        inside = used[target.part.start : target.part.stop]
        if target.mine is not None:
            inside = inside[target.mine]
        first_row, rows = int(inside[0]), int(inside[-1] - inside[0]) + 1
        runs = target.runs(inside)
        target.name_rows(chunk.first_row + first_row, runs)
        for group in self._groups:
            scales_LR = None
            if self._decoded is not None and len(group) > 1:
                scales_LR = np.empty((len(self._columns), rows), dtype=np.float32)
                whole = Scatter(group[1], np.array([[0, rows, 0, 0]]), [scales_LR])
                scales.extend(self._of_layers(group[1], chunk, first_row, whole))
            for array in group[:1] if self._decoded is not None else group:
                columns = [batch.columns[array.name] for batch in target.batches]
                scatter = Scatter(array, runs, columns, self._decoded, scales_LR)
                values.extend(self._of_layers(array, chunk, first_row, scatter))

    def _of_layers(self, array: ArrayLayout, chunk: RowChunk, first_row: int, target: Scatter) -> Iterator[_Part]:
        file = self._shards.get(array, chunk.shard)
        base = chunk.row_chunk * array.chunks_abreast
        for start, stop in self._column_runs:
            yield file, (base + self._columns[start], stop - start, first_row, target, start)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where rows of a part of a pool go: those that are `mine` (None: all) to the places `t` of the lane in `batches`.

    A batch has `each` places of the lane, from its slot `first_slot` on; `t` counts from the first batch's first.
    """

    part: PoolPart
    mine: IntRows | None
    t: IntRows
    first_slot: int
    each: int
    batches: list[StoredBatch]

    def name_rows(self, first_row: int, runs: Runs) -> None:
        """Says which logical rows they are; the first one is `first_row`."""
        for first, size, batch, slot in runs.tolist():
            start = first_row + first
            self.batches[batch].rows[slot : slot + size] = np.arange(start, start + size)

    def runs(self, inside: IntRows) -> Runs:
        """Of the chunk's rows `inside`, counted from the first of them, those that stay together."""
        batches, places = np.divmod(self.t, self.each)
        apart = (inside[1:] - inside[:-1] != 1) | (self.t[1:] - self.t[:-1] != 1) | (places[1:] == 0)
        starts = np.flatnonzero(np.concatenate([[True], apart]))
        runs = np.empty((len(starts), 4), dtype=np.int64)
        runs[:, 0] = inside[starts] - inside[0]
        runs[:-1, 1] = starts[1:] - starts[:-1]
        runs[-1, 1] = len(inside) - starts[-1]
        runs[:, 2] = batches[starts]
        runs[:, 3] = self.first_slot + places[starts]
        return runs


def _plan(parts: Sequence[_Part]) -> Plan | None:
    """Of files on disk: one call for all parts."""
    blocks = [block for file, where in parts if (block := file.planned(*where)) is not None]
    return Plan.of(blocks) if len(blocks) == len(parts) else None


def _read(groups: Sequence[tuple[Sequence[_Part], Plan | None]]) -> None:
    """A thread's task: scales, if any, before the values that they decode. All else was done before: two threads that
    read would wait for each other's Python.
    """
    for parts, plan in groups:
        if plan is None or not plan.read():
            # One by one: a file that ends too early is known then.
            for file, where in parts:
                file.scatter(*where)


def _runs(columns: Sequence[int]) -> list[tuple[int, int]]:
    """Parts of `columns` that follow one another in the file."""
    cuts = [i for i in range(1, len(columns)) if columns[i] != columns[i - 1] + 1]
    return list(zip([0, *cuts], [*cuts, len(columns)], strict=True))
