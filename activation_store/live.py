"""Training batches without a store: harvesters run the subject into a ring of shared memory, rows are drawn from it.

    harvesters (a thread, or processes)  ->  ring (bounded)  ->  mixer  ->  batches, as `ShuffledBatches` gives them

Letters: B tokens of a rank's batch, L layers, D d_model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch

from activation_store.assembly import StoredBatch
from activation_store.background import POLL_SECONDS, BackgroundBatches, BatchShape
from activation_store.config import SourceConfig, StoreConfig, SubjectConfig, TextConfig
from activation_store.errors import UserError
from activation_store.harvesters import Harvester
from activation_store.layout import StoreLayout
from activation_store.live_harvest import HarvesterJob
from activation_store.mixing import Mixer, PoolMixer, RandomMixer, begin
from activation_store.progress import human_bytes, report
from activation_store.ring import IntRows, Ring, RingLayout, row_bytes
from activation_store.share import TextPlace
from activation_store.store import ActivationStore


@dataclass(frozen=True, slots=True)
class LiveText:
    """What is harvested: as `harvest` takes it, with a sample of it, which has the statistics."""

    subject: SubjectConfig
    text: TextConfig
    store: StoreConfig
    sample: ActivationStore


class LiveActivations(BackgroundBatches):
    """Infinite iterator over rank `rank`'s share of the global batches n = start_batch, start_batch + 1, ...

    Each rank harvests blocks of the text that no other does. With `source.deterministic` batch n is a function of
    (seed, n, rank) for a given text, subject, ring and number of harvesters and ranks; else of timing. `states` are
    what the ranks' `state()` were at `start_batch`. Raises UserError for a ring that is too small, and for states of
    another number of harvesters where that decides.
    """

    def __init__(
        self,
        live: LiveText,
        source: SourceConfig,
        *,
        batch_size_tokens: int,
        rank: int = 0,
        ranks: int = 1,
        start_batch: int = 0,
        states: Sequence[Mapping[str, Any]] = (),
        device: torch.device | None = None,
    ) -> None:
        sample, count = live.sample, max(1, source.harvesters)
        super().__init__(
            BatchShape(sample.layout, batch_size_tokens, ranks, sample.n_layers),
            start_batch=start_batch,
            prefetch_bytes=source.prefetch_bytes,
            threads=source.threads,
            decoded=True,
            device=device,
        )
        unit_rows = live.store.batch_contexts * live.text.context_length
        layout = ring_layout(sample.layout, source, unit_rows=unit_rows, share=self._shape.share)
        shares = [rank * count + number for number in range(count)]
        self._places, state = begin(states, rank=rank, ranks=ranks, harvesters=count, exact=source.deterministic)
        self._mixer: Mixer
        if source.deterministic:
            units = max(1, layout.part_rows // 2 // unit_rows)
            pool = state.get("pool", 0)
            self._mixer = PoolMixer(seed=[source.seed, rank], units=units, places=self._places, pool=pool)
        else:
            fill = max(1, int(source.fill_fraction * layout.rows))
            self._mixer = RandomMixer(seed=source.seed + rank, fill_rows=fill, places=self._places)
        # Rows of the first pool that were drawn before.
        self._skip = int(state.get("drawn", 0))
        self._state = dict(state)
        self._ring = Ring.create(layout)
        self.harvesters: list[Harvester] = []
        try:
            for part, share in enumerate(shares):
                job = _job(
                    live,
                    source,
                    layout,
                    part=part,
                    share=share,
                    shares=ranks * count,
                    device=device,
                    start=self._places[part],
                )
                self.harvesters.append(Harvester(job, self._ring, own_process=source.harvesters > 0))
        except BaseException:
            self._end_harvest()
            raise
        names = ", ".join(map(str, self.harvesters))
        report(f"live: {human_bytes(layout.bytes)} of shared memory for {layout.rows:,} rows, filled by {names}")
        self._thread.start()

    @property
    def epochs(self) -> float:
        """How often every harvester has gone through its share of the text, whole times alone."""
        places = self._state.get("places", self._places)
        return float(min(place[0] for place in places))

    @property
    def ring_bytes(self) -> int:
        """Shared memory."""
        return self._ring.layout.bytes

    def close(self) -> None:
        """Ends threads and harvesters."""
        super().close()
        self._end_harvest()

    def _end_harvest(self) -> None:
        for harvester in self.harvesters:
            harvester.close()
        if self.harvesters or not self._stop.is_set():
            self._ring.close()
        self.harvesters = []

    def _take(self, number: int) -> tuple[StoredBatch, dict[str, Any]]:
        while self._skip:
            rows = self._draw(self._skip)
            self._skip -= len(rows)
            self._free(rows)
        share = self._shape.share
        stored = self._new_batch()
        done = 0
        while done < share:
            rows = self._draw(share - done)
            self._gather(rows, stored, slice(done, done + len(rows)))
            done += len(rows)
            self._free(rows)
        state = self._mixer.state()
        epoch = min(place[0] for place in state["places"])
        return StoredBatch(epoch, stored.columns, stored.rows), state

    def _draw(self, most: int) -> IntRows:
        """At least one row, once it is there."""
        self._receive(0.0)
        while not len(rows := self._mixer.draw(most)):
            self._receive(POLL_SECONDS)
        return rows

    def _receive(self, timeout: float) -> None:
        """What harvesters have said, or nothing after `timeout` seconds. Raises UserError if one has ended."""
        if self._stop.is_set():
            raise RuntimeError("closed while it waited for rows")
        by_connection = {harvester.connection: number for number, harvester in enumerate(self.harvesters)}
        for connection in wait(list(by_connection), timeout):
            number = next(number for known, number in by_connection.items() if known is connection)
            message, rows = self.harvesters[number].receive()
            self._mixer.add(number, message, rows)

    def _new_batch(self) -> StoredBatch:
        share, keep = self._shape.share, 2 * (self._ready + 3)
        columns = {
            array.name: self._buffers.take(
                (self._shape.n_columns, share, *array.tail_shape), array.dtype, keep=2 * keep
            )
            for array in self._ring.layout.arrays()
        }
        return StoredBatch(0, columns, self._buffers.take((share,), np.dtype(np.int64), keep=keep))

    def _gather(self, rows: IntRows, stored: StoredBatch, places: slice) -> None:
        """Copies rows of the ring to `places` of a batch, layer by layer."""
        stored.rows[places] = self._ring.origins[rows]
        for name, column in stored.columns.items():
            ring = self._ring.columns[name]
            for layer, out in enumerate(column):
                out[places] = ring[rows, layer]

    def _free(self, rows: IntRows) -> None:
        parts = rows // self._ring.layout.part_rows
        for number, harvester in enumerate(self.harvesters):
            mine = rows[parts == number]
            if len(mine):
                harvester.free(mine)


def ring_layout(store: StoreLayout, source: SourceConfig, *, unit_rows: int, share: int) -> RingLayout:
    """The ring of a rank. Raises UserError if it is too small for what is harvested or drawn at once."""
    count = max(1, source.harvesters)
    layout = RingLayout.within(store, source.ring_bytes, count)
    rows = 2 * unit_rows * count
    if not source.deterministic:
        rows = max(rows, -(-share // count) * count)
    if layout.rows < rows:
        raise UserError(
            f"source.ring_bytes={source.ring_bytes} holds {layout.rows} rows, fewer than a batch of {share} or two "
            f"forwards of {unit_rows} tokens for each of {count} harvesters; use at least {rows * row_bytes(store)}"
        )
    return layout


def _job(
    live: LiveText,
    source: SourceConfig,
    layout: RingLayout,
    *,
    part: int,
    share: int,
    shares: int,
    device: torch.device | None,
    start: TextPlace,
) -> HarvesterJob:
    manifest, statistics = live.sample.manifest, live.sample.statistics()
    devices = source.harvester_devices or [str(device or "cpu")]
    return HarvesterJob(
        subject=live.subject,
        text=live.text,
        store=live.store,
        device=devices[part % len(devices)],
        threads=source.harvester_threads,
        share=share,
        shares=shares,
        part=part,
        layout=layout,
        start=start,
        norm_means_L2=torch.stack([statistics.input_norm_mean_L, statistics.output_norm_mean_L], dim=1).numpy(),
        outlier_factor=manifest.outlier_factor,
        special_token_ids=tuple(manifest.special_token_ids),
    )
