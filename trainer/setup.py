"""What a call of `train` has checked and opened, and what is made of it on this process of the mesh."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from activation_store.store import ActivationStore
from trainer.build import build_model
from trainer.checkpoint import Checkpointer
from trainer.config import RunConfig
from trainer.dealing import Dealing
from trainer.model.clt import CrossLayerTranscoder
from trainer.parallel.agreement import Agreement
from trainer.parallel.collectives import collectives_of
from trainer.parallel.feed import Feed
from trainer.parallel.mesh import Axis, Mesh
from trainer.rows import CalibrationRows
from trainer.run_folder import RunFolder
from trainer.schedule import Schedule
from trainer.sources import Batches, Source
from trainer.tuned import ChosenKernels

# Rows from which b_enc is set when model.initial_density asks for it.
_INITIAL_ROWS = 4_096


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The parts that training works with. by_columns: how decoders are split over the feature axis."""

    config: RunConfig
    mesh: Mesh
    agreement: Agreement
    by_columns: bool
    folder: RunFolder
    source: Source
    schedule: Schedule
    checkpointer: Checkpointer
    device: torch.device
    kernels: ChosenKernels

    @property
    def store(self) -> ActivationStore:
        """Where statistics, calibration rows and held-out rows are."""
        return self.source.reference

    @property
    def batch_tokens(self) -> int:
        """Of an update, over the whole mesh."""
        return self.config.train.batch_size_tokens

    @property
    def microbatches_per_step(self) -> int:
        """Forward and backward passes of an update."""
        return self.batch_tokens // (self.config.train.microbatch_tokens or self.batch_tokens)

    def model(self) -> CrossLayerTranscoder:
        """A new one: this rank's part. Collective."""
        rows = None
        if self.config.model.initial_density is not None:
            rows_of = CalibrationRows(
                store=self.store, n_rows=_INITIAL_ROWS, batch_rows=_INITIAL_ROWS, device=self.device
            )
            with self.agreement.together():
                rows = next(iter(rows_of))
        return build_model(
            self.config,
            self.store.statistics(),
            device=self.device,
            initial_rows_BLD=rows,
            collectives=collectives_of(self.mesh, by_columns=self.by_columns),
        )

    def dealing(self) -> Dealing:
        """Of what is measured over the data axis."""
        mesh = self.mesh
        if mesh.size == 1:
            return Dealing()
        alone = collectives_of(replace(mesh, data=Axis()), by_columns=self.by_columns)
        return Dealing(mesh.data.rank, mesh.data.size, alone=alone, agreement=self.agreement)

    def batches(self, step: int, states: Sequence[Mapping[str, Any]], model: CrossLayerTranscoder) -> Batches:
        """This rank's microbatches after those of `step`. states: of the source, by rank, from its checkpoint."""
        with self.agreement.together():
            source = self.source.batches(
                step * self.microbatches_per_step,
                states,
                device=self.device,
                rank=self.mesh.rank,
                ranks=self.mesh.size,
                # What travels is what is stored, which is mostly half of what it becomes.
                decoded=self.mesh.feature.size == 1,
            )
        if self.mesh.size == 1:
            return source
        return Feed(source, self.mesh, model.collectives.partitioning, device=self.device)
