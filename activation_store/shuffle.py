"""Shuffled training batches from a store: a pure order of the rows, and a thread that reads ahead.

Letters: B tokens of a rank's batch, L layers, D d_model, P rows of the pool.
"""

import queue
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_store.batch import ActivationBatch
from activation_store.errors import UserError
from activation_store.layout import from_bits
from activation_store.shards import hint_next
from activation_store.statistics import SERIAL_ELEMENTS, BoolRows
from activation_store.store import ActivationStore

IntRows = np.ndarray[Any, np.dtype[np.int64]]
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class PoolRows:
    """Consecutive positions of the order that lie in one pool: its number and rows within the epoch's order."""

    epoch: int
    pool: int
    # Places in `ShuffleOrder.pool_rows(epoch, pool)`.
    start: int
    stop: int


class ShuffleOrder:
    """The order of the used rows: position -> logical row, a pure function of (chunks, used rows, seed).

    In every epoch the chunks are shuffled, then cut into pools of `pool_chunks`, then the used rows of each pool are
    shuffled. Epoch e holds positions [e * rows_per_epoch, (e + 1) * rows_per_epoch).
    """

    def __init__(
        self, first_rows: IntRows, chunk_sizes: IntRows, used: BoolRows, *, seed: int, pool_chunks: int
    ) -> None:
        """`first_rows`, `chunk_sizes`: of every chunk, in logical rows. `used`: (n_rows,)."""
        self._first_rows, self._sizes, self._used, self._seed = first_rows, chunk_sizes, used, seed
        self._pool_chunks = max(1, pool_chunks)
        before = np.concatenate([[0], np.cumsum(used)])
        self._used_counts = before[first_rows + chunk_sizes] - before[first_rows]
        self.rows_per_epoch = int(self._used_counts.sum())
        # Per instance: the epoch that is read, and the next one where a batch spans two.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def segments(self, start: int, stop: int) -> list[PoolRows]:
        """Positions [start, stop) as consecutive parts of pools."""
        parts: list[PoolRows] = []
        while start < stop:
            epoch, place = divmod(start, self.rows_per_epoch)
            _, ends = self._epoch(epoch)
            pool = int(np.searchsorted(ends, place, side="right"))
            first = int(ends[pool - 1]) if pool else 0
            take = min(stop - start, int(ends[pool]) - place)
            parts.append(PoolRows(epoch, pool, place - first, place - first + take))
            start += take
        return parts

    def pool(self, epoch: int, pool: int) -> IntRows:
        """The chunks of a pool, in the order in which the pool holds them; none past the epoch's last pool."""
        order, _ = self._epoch(epoch)
        return order[pool * self._pool_chunks : (pool + 1) * self._pool_chunks]

    def pool_rows(self, epoch: int, pool: int) -> tuple[IntRows, IntRows]:
        """The pool's used rows in their shuffled order: logical rows, and (place of the chunk, row in it) as P rows.

        The second is place * (rows of the largest chunk) + row.
        """
        chunks = self.pool(epoch, pool)
        width = int(self._sizes.max())
        rows, places = [], []
        for place, chunk in enumerate(chunks):
            first = self._first_rows[chunk]
            inside = np.flatnonzero(self._used[first : first + self._sizes[chunk]])
            rows.append(first + inside)
            places.append(place * width + inside)
        shuffled = self._generator(epoch, 1 + pool).permutation(sum(len(part) for part in rows))
        return np.concatenate(rows)[shuffled], np.concatenate(places)[shuffled]

    def _make_epoch(self, epoch: int) -> tuple[IntRows, IntRows]:
        """Order of the chunks, and the place in the epoch where each pool ends."""
        order = self._generator(epoch, 0).permutation(len(self._sizes))
        ends = np.cumsum(self._used_counts[order])
        last = np.arange(self._pool_chunks, len(order) + self._pool_chunks, self._pool_chunks)
        return order, ends[np.minimum(last, len(order)) - 1]

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *key])


class ShuffledBatches(Iterator[ActivationBatch]):
    """Infinite iterator over rank `rank`'s share of the global batches n = start_batch, start_batch + 1, ...

    The share is a pure function of (seed, n, rank, ranks): rows [rank, rank + 1) * batch / ranks of the global batch,
    which holds positions [n, n + 1) * batch_size_tokens of the order; so every used row comes once an epoch, and a
    batch may span two epochs. A background thread reads and decodes `prefetch_batches` ahead; it holds one pool in the
    store's dtype. Close it (or use `with`) to stop the thread. The memory of a batch is used again when no tensor of it
    is referenced any more.
    """

    def __init__(
        self,
        store: ActivationStore,
        *,
        batch_size_tokens: int,
        seed: int = 0,
        pool_rows: int = 16_384,
        rank: int = 0,
        ranks: int = 1,
        start_batch: int = 0,
        prefetch_batches: int = 2,
    ) -> None:
        """Raises UserError for a batch that the ranks cannot share, or a store without rows to train on."""
        if batch_size_tokens < 1 or batch_size_tokens % ranks:
            raise UserError(
                f"batch_size_tokens={batch_size_tokens} cannot be shared by {ranks} ranks; use a multiple of {ranks}"
            )
        self._store, self._batch, self._rank, self._ranks = store, batch_size_tokens, rank, ranks
        self.order = ShuffleOrder(
            np.array([chunk.first_row for chunk in store.chunks], dtype=np.int64),
            np.array([chunk.rows for chunk in store.chunks], dtype=np.int64),
            store.used_rows(),
            seed=seed,
            pool_chunks=pool_rows // store.layout.chunk_rows,
        )
        if self.order.rows_per_epoch == 0:
            raise UserError(f"store {store.path} has no row to train on (of {store.n_rows}); harvest more text")
        self._position = start_batch
        self._queue: queue.Queue[ActivationBatch | BaseException] = queue.Queue(maxsize=max(1, prefetch_batches))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(start_batch,), name="store-reader", daemon=True)
        self._thread.start()

    @property
    def rows_per_epoch(self) -> int:
        """Used rows of the store."""
        return self.order.rows_per_epoch

    @property
    def position(self) -> int:
        """The n of the batch that `next` gives next."""
        return self._position

    def __next__(self) -> ActivationBatch:
        """The next batch. An error of the reader (a damaged shard) is raised here, again at every call."""
        while True:
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if self._stop.is_set():
                    raise ValueError("the batches are closed; make a new ShuffledBatches") from None
                if not self._thread.is_alive() and self._queue.empty():
                    raise RuntimeError("the reader thread died; its traceback is on stderr") from None
                continue
            if isinstance(item, BaseException):
                self._queue.put(item)
                raise item
            self._position += 1
            return item

    def close(self) -> None:
        """Stops the reader thread."""
        self._stop.set()
        self._thread.join()
        # What was read ahead would keep its memory.
        while not self._queue.empty():
            self._queue.get_nowait()

    def __enter__(self) -> "ShuffledBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_ahead(self, number: int) -> None:
        """The thread: batches into the queue until closed; an error is handed to the consumer and ends it."""
        reader = _PoolReader(self._store, self.order, buffers=2 * (self._queue.maxsize + 3))
        share = self._batch // self._ranks
        while not self._stop.is_set():
            start = number * self._batch + self._rank * share
            try:
                item: ActivationBatch | BaseException = reader.read(start, start + share)
            except (OSError, ValueError, RuntimeError, MemoryError) as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=_POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            number += 1


class _PoolReader:
    """Holds one pool in memory as it lies on disk, layer by layer, and gathers batches from it."""

    def __init__(self, store: ActivationStore, order: ShuffleOrder, *, buffers: int) -> None:
        """`buffers`: how many output buffers to keep for reuse."""
        self._store, self._order, self._keep = store, order, buffers
        self._arrays = [store.layout.activations(name) for name in ("mlp_in", "mlp_out")]
        self._pools: list[np.ndarray[Any, Any]] = []
        self._loaded: tuple[int, int] | None = None
        self._rows = self._places = np.empty(0, dtype=np.int64)
        self._recycled: list[np.ndarray[Any, Any]] = []
        # The width of a place in the pool is that of the largest chunk: see ShuffleOrder.pool_rows.
        self._width = max(chunk.rows for chunk in store.chunks)

    def read(self, start: int, stop: int) -> ActivationBatch:
        """The rows at positions [start, stop) of the order."""
        shape = (stop - start, self._store.n_layers, self._store.d_model)
        outs = [torch.from_numpy(self._take(shape)) for _ in self._arrays]
        rows = np.empty(stop - start, dtype=np.int64)
        done = 0
        parts = self._order.segments(start, stop)
        for part in parts:
            self._load(part.epoch, part.pool)
            end = done + part.stop - part.start
            rows[done:end] = self._rows[part.start : part.stop]
            for pool, out in zip(self._pools, outs, strict=True):
                _gather(pool, self._places[part.start : part.stop], out[done:end], self._store)
            done = end
        return ActivationBatch(outs[0], outs[1], torch.from_numpy(rows), parts[0].epoch)

    def _load(self, epoch: int, pool: int) -> None:
        if self._loaded == (epoch, pool):
            return
        self._loaded = None
        chunks = self._order.pool(epoch, pool)
        self._allocate(len(chunks))
        columns = range(self._store.n_layers)
        for array, buffer in zip(self._arrays, self._pools, strict=True):
            for place, number in enumerate(chunks):
                chunk = self._store.chunks[number]
                first = place * self._width
                views = list(buffer[:, first : first + chunk.rows])
                self._store.read_chunk(array, chunk, views, columns=columns)
        self._rows, self._places = self._order.pool_rows(epoch, pool)
        self._loaded = (epoch, pool)
        # While this pool is used up, the system may already fetch the next.
        for number in self._order.pool(epoch, pool + 1):
            chunk = self._store.chunks[number]
            for array in self._arrays:
                hint_next(self._store.path, array, chunk.shard, chunk.row_chunk)

    def _allocate(self, chunks: int) -> None:
        """Pool buffers (L, P, D), made once: an epoch's last pool may be smaller than the others, none is larger."""
        rows = chunks * self._width
        if not self._pools or self._pools[0].shape[1] < rows:
            self._pools = []
            shape = (self._store.n_layers, rows, self._store.d_model)
            self._pools = [np.empty(shape, dtype=array.dtype) for array in self._arrays]

    def _take(self, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """A float32 buffer that nobody refers to any more, or a new one (fresh pages cost more than filling them)."""
        for buffer in self._recycled:
            # References: the list's, the loop's, and getrefcount's own; a tensor over the buffer would hold another.
            if buffer.shape == shape and sys.getrefcount(buffer) == 3:
                return buffer
        fresh = np.empty(shape, dtype=np.float32)
        if len(self._recycled) < self._keep:
            self._recycled.append(fresh)
        return fresh


def _gather(pool_LPD: np.ndarray[Any, Any], places_B: IntRows, out_BLD: Tensor, store: ActivationStore) -> None:
    """out[b, l] = pool[l, places[b]] as float32.

    In pieces that fit the processor's cache and that torch does not split over threads: the reader takes no more than
    its own thread from the training that it feeds.
    """
    step = max(1, SERIAL_ELEMENTS // store.d_model)
    scratch = np.empty((step, store.d_model), dtype=pool_LPD.dtype)
    decoded = from_bits(scratch, store.dtype)
    for start in range(0, len(places_B), step):
        places = places_B[start : start + step]
        for layer, pool_PD in enumerate(pool_LPD):
            np.take(pool_PD, places, axis=0, out=scratch[: len(places)], mode="clip")
            out_BLD[start : start + step, layer].copy_(decoded[: len(places)])
