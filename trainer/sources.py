"""Where a run's rows come from: one small interface, so that the training loop does not care.

`open_source(config)` refuses what can be refused and writes nothing; `prepare()`, in the locked run folder, makes what
must be there before training; `reference` is a store of rows for statistics, held-out figures and calibration;
`batches(...)` are what is trained on; `checkpointed(position)` says that a checkpoint is durable: what it does not need
may go.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from activation_store.batch import ActivationBatch
from activation_store.config import SourceKind
from activation_store.layout import StoreLayout
from activation_store.shuffle import ShuffledBatches
from activation_store.store import ActivationStore
from trainer.config import RunConfig
from trainer.rows import open_training_store, store_identity
from trainer.run_folder import RunFolder
from trainer.sample import batch_rows, harvest_sample


class Batches(Protocol):
    """An endless iterator over one rank's share of the global microbatches, the batches of this module.

    Close it (or use `with`) to stop its threads.
    """

    @property
    def position(self) -> int:
        """The n of the batch that `next` gives next."""

    @property
    def epochs(self) -> float:
        """How often the text was gone through by the batches given so far."""

    def state(self) -> dict[str, Any]:
        """What a resume at `position` needs besides it, as JSON: a few integers, or nothing."""

    def __next__(self) -> ActivationBatch: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class Source(Protocol):
    """Where the rows of a run come from."""

    @property
    def n_layers(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def reference(self) -> ActivationStore:
        """Statistics, held-out rows, calibration rows, subject and layers; there after `prepare`."""

    @property
    def identity(self) -> str:
        """Another value when rows or statistics differ: what a checkpoint remembers. There after `prepare`."""

    @property
    def path(self) -> str:
        """What to call it in an error: its setting and value."""

    def prepare(self, states: Sequence[Mapping[str, Any]], *, first: bool = True) -> None:
        """Makes what must be there before training, or (not `first`) finds it. The run folder exists and is locked.

        `states`: as of `batches`. Raises UserError.
        """

    def batches(
        self,
        position: int,
        states: Sequence[Mapping[str, Any]],
        *,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
        decoded: bool = True,
    ) -> Batches:
        """Batches from `position` on; `states`: of all ranks' batches at the checkpoint there ([] at the start).

        decoded=False: as they are stored will do, where a source has them so.
        """

    def checkpointed(self, position: int) -> None:
        """A checkpoint at `position` is durable: rows of batches before it will not be asked for again.

        Called by the thread that wrote it, while others take batches.
        """


def open_source(config: RunConfig) -> Source:
    """The source that `config.source` names. Raises UserError for one that cannot serve this run; writes nothing."""
    from trainer.rolling_source import RollingSource

    kinds: dict[SourceKind, Callable[[RunConfig], Source]] = {
        SourceKind.disk: DiskSource,
        SourceKind.live: LiveSource,
        SourceKind.rolling: RollingSource,
    }
    return kinds[config.source.kind](config)


@dataclass(slots=True)
class DiskSource:
    """A complete store on disk (or at a URL)."""

    config: RunConfig
    reference: ActivationStore = field(init=False)

    def __post_init__(self) -> None:
        self.reference = open_training_store(self.config)

    @property
    def n_layers(self) -> int:
        return self.reference.n_layers

    @property
    def d_model(self) -> int:
        return self.reference.d_model

    @property
    def identity(self) -> str:
        return store_identity(self.reference)

    @property
    def path(self) -> str:
        return f"store.path={self.config.store.path}"

    def prepare(self, states: Sequence[Mapping[str, Any]], *, first: bool = True) -> None:
        """Everything is there."""

    def batches(
        self,
        position: int,
        states: Sequence[Mapping[str, Any]],
        *,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
        decoded: bool = True,
    ) -> ShuffledBatches:
        source = self.config.source
        return ShuffledBatches(
            self.reference,
            batch_size_tokens=batch_rows(self.config),
            seed=source.seed,
            pool_rows=source.pool_rows,
            lanes=source.lanes,
            run_rows=source.run_rows,
            rank=rank,
            ranks=ranks,
            start_batch=position,
            prefetch_bytes=source.prefetch_bytes,
            threads=source.threads,
            decoded=decoded,
            device=device,
        )

    def checkpointed(self, position: int) -> None:
        """The store stays."""


@dataclass(slots=True)
class LiveSource:
    """The subject itself, run while training goes on; statistics, held-out and calibration rows are a sample's."""

    config: RunConfig
    n_layers: int = field(init=False)
    d_model: int = field(init=False)
    _sample: ActivationStore | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        from activation_store.hooks import layer_range
        from activation_store.live import ring_layout
        from activation_store.subject import describe_subject  # transformers: seconds

        info, store = describe_subject(self.config.subject), self.config.store
        self.n_layers = len(layer_range(info.n_layers, store.layer_start, store.layer_stop))
        self.d_model = info.d_model
        layout = StoreLayout(self.n_layers, self.d_model, store.dtype, store.chunk_rows, store.shard_rows)
        unit_rows = store.batch_contexts * self.config.text.context_length
        share = batch_rows(self.config) // (self.config.parallel.data * self.config.parallel.feature)
        ring_layout(layout, self.config.source, unit_rows=unit_rows, share=share)

    @property
    def reference(self) -> ActivationStore:
        assert self._sample is not None, "prepare() comes first"
        return self._sample

    @property
    def identity(self) -> str:
        return store_identity(self.reference)

    @property
    def path(self) -> str:
        return f"the sample in {RunFolder(self.config.run).sample}"

    def prepare(self, states: Sequence[Mapping[str, Any]], *, first: bool = True) -> None:
        """Harvests the sample, or finds it there."""
        self._sample = harvest_sample(self.config)

    def batches(
        self,
        position: int,
        states: Sequence[Mapping[str, Any]],
        *,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
        decoded: bool = True,
    ) -> Batches:
        from activation_store.live import LiveActivations, LiveText

        config = self.config
        return LiveActivations(
            LiveText(config.subject, config.text, config.store, self.reference),
            config.source,
            batch_size_tokens=batch_rows(config),
            rank=rank,
            ranks=ranks,
            start_batch=position,
            states=states,
            device=device,
        )

    def checkpointed(self, position: int) -> None:
        """Nothing is kept for a resume: it harvests again."""
