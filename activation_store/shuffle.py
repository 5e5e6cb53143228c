"""Shuffled training batches from a store: a pure order of the rows, and threads that read ahead."""

from collections.abc import Sequence
from typing import Any

import torch

from activation_store.assembly import Assembler, StoredBatch
from activation_store.background import BackgroundBatches, BatchShape
from activation_store.errors import UserError
from activation_store.order import ShuffleOrder
from activation_store.store import ActivationStore

# Batches that the readers are ahead of the one that is being finished.
_READ_AHEAD = 3


class ShuffledBatches(BackgroundBatches):
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
        columns = store.columns(layers)
        shape = BatchShape(store.layout, batch_size_tokens, ranks, len(columns))
        if store.used.count == 0:
            raise UserError(f"store {store.path} has no row to train on (of {store.n_rows}); harvest more text")
        chunk_rows = store.layout.chunk_rows
        lanes = batch_lanes(batch_size_tokens, most=min(lanes, pool_rows // chunk_rows))
        self.order = ShuffleOrder(
            store.used.ends,
            seed=seed,
            lanes=lanes,
            pool_chunks=max(1, pool_rows // (lanes * chunk_rows)),
            run_rows=run_rows,
        )
        super().__init__(
            shape,
            start_batch=start_batch,
            prefetch_bytes=prefetch_bytes,
            threads=threads,
            decoded=decoded,
            device=device,
        )
        # As many as a pool reaches over, plus what is being read and filled, and what waits as it was read.
        held = -(-pool_rows // batch_size_tokens) + _READ_AHEAD + 3 + self._waiting_as_read
        self._assembler = Assembler(
            store,
            self.order,
            executor=self._executor,
            threads=self._threads,
            buffers=self._buffers,
            columns=columns,
            batch_rows=batch_size_tokens,
            rank=rank,
            ranks=ranks,
            first=start_batch,
            keep=held,
            decoded=self._decodes_on_the_way,
        )
        self._thread.start()

    @property
    def rows_per_epoch(self) -> int:
        """Used rows of the store."""
        return self.order.rows_per_epoch

    @property
    def epochs(self) -> float:
        """How many epochs the batches given so far are."""
        return self._position * self._shape.batch_rows / self.rows_per_epoch

    def _take(self, number: int) -> tuple[StoredBatch, dict[str, Any]]:
        self._assembler.schedule(number + _READ_AHEAD)
        return self._assembler.take(number), {}


def batch_lanes(batch: int, *, most: int) -> int:
    """The most lanes, up to `most`, that share a batch evenly."""
    return next(lanes for lanes in range(max(1, min(most, batch)), 0, -1) if batch % lanes == 0)
