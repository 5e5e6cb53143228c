"""Batches made ahead of training by a thread of their own: what all sources of batches have in common.

Letters: B tokens of a rank's batch, L layers, D d_model.
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from activation_store.assembly import StoredBatch
from activation_store.batch import ActivationBatch
from activation_store.buffers import Buffers
from activation_store.codec import Encoded, decode, from_bits
from activation_store.config import StoreDtype
from activation_store.device_copy import DeviceCopier
from activation_store.errors import UserError
from activation_store.layout import StoreLayout
from activation_store.statistics import SERIAL_ELEMENTS

POLL_SECONDS = 0.1
# Batches that wait at the most: of small ones, thousands would be read that nobody asks for in a long while.
_MOST_READY = 64


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Rows of the global batch, the ranks that share it, and the layers of each row as they are stored."""

    layout: StoreLayout
    batch_rows: int
    ranks: int
    n_columns: int

    def __post_init__(self) -> None:
        if self.batch_rows < 1 or self.batch_rows % self.ranks:
            raise UserError(
                f"batch_size_tokens={self.batch_rows} cannot be shared by {self.ranks} ranks; "
                f"use a multiple of {self.ranks}"
            )

    @property
    def share(self) -> int:
        """Rows of a rank."""
        return self.batch_rows // self.ranks


class BackgroundBatches(Iterator[ActivationBatch], ABC):
    """Infinite iterator over a rank's share of the batches n = start_batch, start_batch + 1, ...

    A subclass says how a batch is taken as stored; here it is decoded, copied to the device, and kept until it is asked
    for, at most `prefetch_bytes` of batches ahead. Close it (or use `with`) to stop its threads. The memory of a batch
    is used again when no tensor of it is referenced any more.
    """

    def __init__(
        self,
        shape: BatchShape,
        *,
        start_batch: int,
        prefetch_bytes: int,
        threads: int,
        decoded: bool,
        device: torch.device | None,
    ) -> None:
        self._shape, self._decoded = shape, decoded
        self._copier = DeviceCopier(device) if device is not None and device.type == "cuda" else None
        self._position = start_batch
        self._state: dict[str, Any] = {}
        self._ready = max(1, min(prefetch_bytes // self._batch_bytes(), _MOST_READY))
        self._queue: queue.Queue[tuple[ActivationBatch, dict[str, Any]] | BaseException] = queue.Queue(self._ready)
        self._buffers = Buffers(pinned=self._copier is not None)
        self._outputs = Buffers()
        self._threads = max(1, threads)
        self._executor = ThreadPoolExecutor(self._threads, thread_name_prefix="store-worker")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(start_batch,), name="store-reader", daemon=True)

    @abstractmethod
    def _take(self, number: int) -> tuple[StoredBatch, dict[str, Any]]:
        """Batch `number` as stored, and the state after it. Called in order, in the reader's thread.

        What waits here looks at `_stop`, and raises anything once it is set.
        """

    @property
    def _decodes_on_the_way(self) -> bool:
        """Whether what is read from a store is decoded before it is in the batch: not if a GPU will do it."""
        return self._decoded and self._copier is None

    @property
    def _waiting_as_read(self) -> int:
        """Batches in the queue and beside it that keep the memory they were read into: not if decoded after."""
        return self._ready + 2 if self._decodes_on_the_way or not self._decoded else 0

    @property
    def position(self) -> int:
        """The n of the batch that `next` gives next."""
        return self._position

    def state(self) -> dict[str, Any]:
        """What is needed besides the position to continue there, as JSON."""
        return self._state

    def __next__(self) -> ActivationBatch:
        """The next batch. An error of the reader (a damaged shard) is raised here, again at every call."""
        while True:
            try:
                item = self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self._stop.is_set():
                    raise ValueError(f"the batches are closed; make a new {type(self).__name__}") from None
                if not self._thread.is_alive() and self._queue.empty():
                    raise RuntimeError("the reader thread died; its traceback is on stderr") from None
                continue
            if isinstance(item, BaseException):
                self._queue.put(item)
                raise item
            batch, self._state = item
            self._position += 1
            if self._copier is not None:
                scales = [scale for scale in (batch.mlp_in_scale, batch.mlp_out_scale) if scale is not None]
                self._copier.wait(batch.mlp_in, batch.mlp_out, *scales)
            return batch

    def close(self) -> None:
        """Stops the threads."""
        self._stop.set()
        self._thread.join()
        self._executor.shutdown(cancel_futures=True)
        # What was read ahead would keep its memory.
        while not self._queue.empty():
            self._queue.get_nowait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_ahead(self, number: int) -> None:
        """The thread: batches into the queue until closed; an error is handed to the consumer and ends it."""
        while not self._stop.is_set():
            try:
                stored, state = self._take(number)
                item: tuple[ActivationBatch, dict[str, Any]] | BaseException = (self._finished(stored), state)
                del stored
            except (OSError, ValueError, RuntimeError, MemoryError) as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=POLL_SECONDS)
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
        dtype = StoreDtype.float32 if stored.decoded else self._shape.layout.dtype
        for name in ("mlp_in", "mlp_out"):
            scale = stored.columns.get(f"{name}_scale")
            values_LBD = from_bits(stored.columns[name], dtype)
            parts.append(Encoded(values_LBD, None if scale is None else torch.from_numpy(scale)))
        if self._copier is not None:
            parts = self._copier.copy(parts, decoded=self._decoded)
        elif self._decoded and not stored.decoded:
            shape, keep = tuple(parts[0].values.shape), 2 * (self._ready + 3)
            outs = [self._outputs.take(shape, np.dtype(np.float32), keep=keep) for _ in parts]
            parts = _decode_parallel(parts, [torch.from_numpy(out) for out in outs], self._executor)
        mlp_in, mlp_out = (part.values.transpose(0, 1) for part in parts)
        in_scale, out_scale = (None if part.scale is None else part.scale.t() for part in parts)
        return ActivationBatch(mlp_in, mlp_out, rows, stored.epoch, in_scale, out_scale)

    def _batch_bytes(self) -> int:
        """Of a batch in the queue."""
        shape = self._shape
        itemsize = 4 if self._decoded else shape.layout.activations("mlp_in").dtype.itemsize
        return 2 * shape.share * shape.n_columns * shape.layout.d_model * itemsize


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
