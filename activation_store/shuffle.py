"""Shuffled training batches from a store: a pure order of the rows, and threads that read ahead.

Letters: B tokens of a rank's batch, L layers, D d_model.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_store.assembly import Assembler, StoredBatch
from activation_store.batch import ActivationBatch
from activation_store.buffers import Buffers
from activation_store.codec import Encoded, decode, from_bits
from activation_store.device_copy import DeviceCopier
from activation_store.errors import UserError
from activation_store.order import ShuffleOrder
from activation_store.statistics import SERIAL_ELEMENTS
from activation_store.store import ActivationStore

_POLL_SECONDS = 0.1
# Batches that the readers are ahead of the one that is being finished.
_READ_AHEAD = 3


class ShuffledBatches(Iterator[ActivationBatch]):
    """Infinite iterator over rank `rank`'s share of the global batches n = start_batch, start_batch + 1, ...

    The global batch n is a function of (seed, n) for a given store, batch size, `lanes`, `pool_rows` and `run_rows`
    (activation_store.order says how); rank r has its r-th equal part, and reads only its own part of the bytes where
    `ranks` divides the lanes. Every used row comes once an epoch; a batch may span two epochs. `threads` read and
    decode in the background, at most `prefetch_bytes` of batches ahead. Close it (or use `with`) to stop them. The
    memory of a batch is used again when no tensor of it is referenced any more.
    """

    def __init__(
        self,
        store: ActivationStore,
        *,
        batch_size_tokens: int,
        seed: int = 0,
        pool_rows: int = 16_384,
        lanes: int = 64,
        run_rows: int = 32,
        rank: int = 0,
        ranks: int = 1,
        start_batch: int = 0,
        prefetch_bytes: int = 1 << 28,
        threads: int = 1,
        layers: Sequence[int] | None = None,
        decoded: bool = True,
        device: torch.device | None = None,
    ) -> None:
        """`layers`: of the subject, only these (and their bytes); `device`: where the batches are to be, default CPU.

        `decoded=False` gives the values as stored. Raises UserError for a batch that the ranks cannot share, or a store
        without rows to train on.
        """
        if batch_size_tokens < 1 or batch_size_tokens % ranks:
            raise UserError(
                f"batch_size_tokens={batch_size_tokens} cannot be shared by {ranks} ranks; use a multiple of {ranks}"
            )
        if store.used.count == 0:
            raise UserError(f"store {store.path} has no row to train on (of {store.n_rows}); harvest more text")
        self._store, self._decoded = store, decoded
        self._columns = store.columns(layers)
        self._batch_tokens, self._share = batch_size_tokens, batch_size_tokens // ranks
        chunk_rows = store.layout.chunk_rows
        lanes = _lanes(batch_size_tokens, most=min(lanes, pool_rows // chunk_rows))
        self.order = ShuffleOrder(
            store.used.ends,
            seed=seed,
            lanes=lanes,
            pool_chunks=max(1, pool_rows // (lanes * chunk_rows)),
            run_rows=run_rows,
        )
        self._copier = DeviceCopier(device) if device is not None and device.type == "cuda" else None
        self._position = start_batch
        ready = max(1, prefetch_bytes // self._batch_bytes())
        self._queue: queue.Queue[ActivationBatch | BaseException] = queue.Queue(maxsize=ready)
        # As many as a pool reaches over, plus what is being read and filled, and what waits as stored.
        held = -(-pool_rows // batch_size_tokens) + _READ_AHEAD + 3 + (0 if decoded else ready + 2)
        self._buffers = Buffers(pinned=self._copier is not None)
        self._outputs = Buffers()
        self._executor = ThreadPoolExecutor(max(1, threads), thread_name_prefix="store-worker")
        self._assembler = Assembler(
            store,
            self.order,
            executor=self._executor,
            buffers=self._buffers,
            columns=self._columns,
            batch_rows=batch_size_tokens,
            rank=rank,
            ranks=ranks,
            first=start_batch,
            keep=held,
        )
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

    @property
    def epochs(self) -> float:
        """How many epochs the batches given so far are."""
        return self._position * self._batch_tokens / self.rows_per_epoch

    def state(self) -> dict[str, Any]:
        """What is needed besides the position to continue there: nothing."""
        return {}

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
            if self._copier is not None:
                self._copier.wait(item.mlp_in, item.mlp_out)
            return item

    def close(self) -> None:
        """Stops the threads."""
        self._stop.set()
        self._thread.join()
        self._executor.shutdown(cancel_futures=True)
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
        while not self._stop.is_set():
            try:
                self._assembler.schedule(number + _READ_AHEAD)
                item: ActivationBatch | BaseException = self._finished(self._assembler.take(number))
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
            # Nothing of a batch may be held here while the next one is read.
            del item
            number += 1

    def _finished(self, stored: StoredBatch) -> ActivationBatch:
        """A batch as the consumer wants it."""
        rows, parts = torch.from_numpy(stored.rows), []
        for name in ("mlp_in", "mlp_out"):
            scale = stored.columns.get(f"{name}_scale")
            values_LBD = from_bits(stored.columns[name], self._store.dtype)
            parts.append(Encoded(values_LBD, None if scale is None else torch.from_numpy(scale)))
        if self._copier is not None:
            parts = self._copier.copy(parts, decoded=self._decoded)
        elif self._decoded:
            shape, keep = tuple(parts[0].values.shape), 2 * (self._queue.maxsize + 3)
            outs = [self._outputs.take(shape, np.dtype(np.float32), keep=keep) for _ in parts]
            parts = _decode_parallel(parts, [torch.from_numpy(out) for out in outs], self._executor)
        mlp_in, mlp_out = (part.values.transpose(0, 1) for part in parts)
        in_scale, out_scale = (None if part.scale is None else part.scale.t() for part in parts)
        return ActivationBatch(mlp_in, mlp_out, rows, stored.epoch, in_scale, out_scale)

    def _batch_bytes(self) -> int:
        """Of a batch in the queue."""
        itemsize = 4 if self._decoded else self._store.layout.activations("mlp_in").dtype.itemsize
        return 2 * self._share * len(self._columns) * self._store.d_model * itemsize


def _lanes(batch: int, *, most: int) -> int:
    """The most lanes, up to `most`, that share a batch evenly."""
    return next(lanes for lanes in range(max(1, min(most, batch)), 0, -1) if batch % lanes == 0)


def _decode_parallel(parts: Sequence[Encoded], outs: Sequence[Tensor], executor: Executor) -> list[Encoded]:
    """Decodes into `outs`, layer by layer with the executor's threads."""
    futures = [
        executor.submit(_decode_layer, part[layer], out[layer])
        for part, out in zip(parts, outs, strict=True)
        for layer in range(len(part))
    ]
    for future in futures:
        future.result()
    return [Encoded(out) for out in outs]


def _decode_layer(encoded_BD: Encoded, out_BD: Tensor) -> None:
    """In pieces that stay in the processor's cache and that torch does not split over threads of its own."""
    step = max(1, SERIAL_ELEMENTS // out_BD.shape[1])
    pieces = zip(_split(encoded_BD.values, step), _split(out_BD, step), strict=True)
    for number, (values, out) in enumerate(pieces):
        scale = None if encoded_BD.scale is None else encoded_BD.scale[number * step : (number + 1) * step]
        decode(Encoded(values, scale), out)


def _split(x: Tensor, step: int) -> tuple[Tensor, ...]:
    """Pieces of `step` rows, in one call: a slice for each would take as long as decoding it."""
    return x.split(step)  # type: ignore[no-untyped-call, no-any-return]
