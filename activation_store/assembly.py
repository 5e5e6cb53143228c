"""Fills batches from the shards: each row of a pool goes straight to its place in the batch where it comes.

Letters: B rows of a rank's batch, L layers that are read, D d_model, t place in a lane's stream (see `order`).
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from activation_store.buffers import Buffers
from activation_store.chunks import RowChunk
from activation_store.layout import ArrayLayout, StoreLayout
from activation_store.order import LaneOrder, Pool, PoolPart
from activation_store.places import Place
from activation_store.scatter import Runs, Scatter, compiled
from activation_store.shards import ShardFile
from activation_store.statistics import BoolRows

IntRows = np.ndarray[Any, np.dtype[np.int64]]
# Shards that are kept open.
_OPEN_SHARDS = 128


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


@dataclass(slots=True)
class _Lane:
    """What a lane has been asked for: up to place `next_t`; pools in flight by their first place."""

    number: int
    next_t: int
    pending: deque[tuple[int, list[Future[None]]]] = field(default_factory=deque)


class Assembler:
    """Batches `first`, `first + 1`, ... of a rank, in order. `schedule` and `take` are for one thread."""

    def __init__(
        self,
        store: ReadableStore,
        order: LaneOrder,
        *,
        executor: Executor,
        buffers: Buffers,
        columns: Sequence[int],
        batch_rows: int,
        rank: int,
        ranks: int,
        first: int,
        keep: int,
        decoded: bool,
    ) -> None:
        """`batch_rows`: of the global batch. `columns`: layers to read, by their index. `keep`: buffers to keep.

        `decoded`: rows are decoded on their way to the batch; else it holds them as stored.
        """
        self._store, self._order, self._executor, self._buffers = store, order, executor, buffers
        self._columns, self._keep, self._first = columns, keep, first
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
        self._lanes = [_Lane(lane, first * self._each) for lane in range(first_lane, last_lane + 1)]
        self._batches: dict[int, StoredBatch] = {}
        self._shards = _OpenShards(store)
        self._groups = [
            [store.layout.activations(name), *([scale] if (scale := store.layout.scale(name)) else [])]
            for name in ("mlp_in", "mlp_out")
        ]
        # Before threads ask for it.
        self._used = store.used

    def schedule(self, last: int) -> None:
        """Begins to read all that the batches up to `last` need, if it was not begun before."""
        for lane in self._lanes:
            while lane.next_t < (last + 1) * self._each:
                pool = self._order.pool_at(lane.number, lane.next_t)
                lane.pending.append((pool.start, list(self._begin(lane.number, pool))))
                lane.next_t = pool.stop

    def take(self, number: int) -> StoredBatch:
        """Waits for a batch and hands it over. Raises what reading raised (DamagedShardError, OSError)."""
        self.schedule(number)
        for lane in self._lanes:
            while lane.pending and lane.pending[0][0] < (number + 1) * self._each:
                for future in lane.pending[0][1]:
                    future.result()
                # A pool that reaches into later batches is whole now.
                lane.pending.popleft()
        return self._batches.pop(number)

    def forget(self, shard: int) -> None:
        """Closes the files of shards before `shard`: what is deleted takes no room then."""
        self._shards.forget(shard)

    def _begin(self, lane: int, pool: Pool) -> Iterator[Future[None]]:
        first, last = max(self._first, pool.start // self._each), (pool.stop - 1) // self._each
        for number in range(first, last + 1):
            if number not in self._batches:
                self._batches[number] = self._new_batch(number)
        done = 0
        for part in pool.parts:
            size = part.stop - part.start
            t = pool.start + pool.places[done : done + size]
            done += size
            slots = lane * self._each + t % self._each - self._first_slot
            mine = (t // self._each >= self._first) & (slots >= 0) & (slots < self._share)
            if mine.any():
                target = _Target(part, mine, (t // self._each)[mine], slots[mine], self._batches)
                self._hint(part.chunk)
                yield self._executor.submit(self._read, target)

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

    def _read(self, target: "_Target") -> None:
        """Reads a part of a pool."""
        chunk = self._store.chunks[target.part.chunk]
        used = np.flatnonzero(self._used.mask(target.part.chunk, chunk.rows))
        inside = used[target.part.start : target.part.stop][target.mine]
        target.name_rows(chunk.first_row + inside)
        runs = target.runs(inside)
        for group in self._groups:
            with_scales = self._decoded is not None and len(group) > 1
            scales = self._scales(group[1], chunk, inside) if with_scales else None
            for array in group[:1] if self._decoded is not None else group:
                columns = [batch.columns[array.name] for batch in target.batches]
                scatter = Scatter(array, runs, columns, self._decoded, scales)
                self._scatter(array, chunk, int(inside[0]), scatter)

    def _scales(self, array: ArrayLayout, chunk: RowChunk, inside: IntRows) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Of the chunk's rows from inside[0] to inside[-1], of each layer."""
        rows = int(inside[-1] - inside[0]) + 1
        scales = np.empty((len(self._columns), rows), dtype=np.float32)
        self._scatter(array, chunk, int(inside[0]), Scatter(array, np.array([[0, rows, 0, 0]]), [scales]))
        return scales

    def _scatter(self, array: ArrayLayout, chunk: RowChunk, first_row: int, target: Scatter) -> None:
        file = self._shards.get(array, chunk.shard)
        base = chunk.row_chunk * array.chunks_abreast
        for start, stop in self._column_runs:
            file.scatter(base + self._columns[start], stop - start, first_row, target, start)


@dataclass(slots=True)
class _Target:
    """Where rows of a part of a pool go: those of its rows that are `mine` to `slots` of the batches `numbers`."""

    part: PoolPart
    mine: np.ndarray[Any, np.dtype[np.bool_]]
    numbers: IntRows
    slots: IntRows
    all_batches: dict[int, StoredBatch]
    first: int = field(init=False)
    batches: list[StoredBatch] = field(init=False)

    def __post_init__(self) -> None:
        self.first = int(self.numbers.min())
        self.batches = [self.all_batches[n] for n in range(self.first, int(self.numbers.max()) + 1)]

    def name_rows(self, rows: IntRows) -> None:
        """Says which logical rows they are."""
        for i, batch in enumerate(self.batches):
            here = self.numbers == self.first + i
            batch.rows[self.slots[here]] = rows[here]

    def runs(self, inside: IntRows) -> Runs:
        """Of the chunk's rows `inside`, counted from the first of them, those that stay together."""
        numbers, slots = self.numbers, self.slots
        apart = (inside[1:] - inside[:-1] != 1) | (slots[1:] - slots[:-1] != 1) | (numbers[1:] != numbers[:-1])
        starts = np.concatenate([[0], np.flatnonzero(apart) + 1])
        runs = np.empty((len(starts), 4), dtype=np.int64)
        runs[:, 0] = inside[starts] - inside[0]
        runs[:-1, 1] = starts[1:] - starts[:-1]
        runs[-1, 1] = len(inside) - starts[-1]
        runs[:, 2] = numbers[starts] - self.first
        runs[:, 3] = slots[starts]
        return runs


class _OpenShards:
    """The shards that were read last, open."""

    def __init__(self, store: ReadableStore) -> None:
        self._store, self._lock = store, threading.Lock()
        self._files: OrderedDict[tuple[str, int], ShardFile] = OrderedDict()

    def get(self, array: ArrayLayout, shard: int) -> ShardFile:
        """Opens a shard, or gives the open one. Raises DamagedShardError."""
        key = (array.name, shard)
        with self._lock:
            if key in self._files:
                self._files.move_to_end(key)
                return self._files[key]
        file = ShardFile(self._store.path, array, shard)
        with self._lock:
            self._files[key] = file
            while len(self._files) > _OPEN_SHARDS:
                self._files.popitem(last=False)
        return file

    def forget(self, shard: int) -> None:
        """Closes those before `shard`, once nobody reads from them."""
        with self._lock:
            for key in [key for key in self._files if key[1] < shard]:
                del self._files[key]


def _runs(columns: Sequence[int]) -> list[tuple[int, int]]:
    """Parts of `columns` that follow one another in the file."""
    cuts = [i for i in range(1, len(columns)) if columns[i] != columns[i - 1] + 1]
    return list(zip([0, *cuts], [*cuts, len(columns)], strict=True))
