"""`source=rolling`: a store that harvests fill while training reads it and frees what checkpoints are past."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from activation_store.children import Child
from activation_store.manifest import read_commits
from activation_store.plan import HarvestPlan
from activation_store.rolling import RollingFolder, too_small, windows_within
from activation_store.rolling_batches import READ_AHEAD, RollingBatches, RollingBudget, check_same
from activation_store.store import ActivationStore
from trainer.config import RunConfig
from trainer.rows import store_identity
from trainer.run_folder import RunFolder
from trainer.sample import batch_rows, harvest_sample
from trainer.schedule import total_steps

# Windows may have fewer rows to train on than the sample's, by this share.
_FEWER = 0.9


@dataclass(slots=True)
class RollingSource:
    """A store within a budget; statistics, held-out and calibration rows are a sample's, in the run folder."""

    config: RunConfig
    n_layers: int = field(init=False)
    d_model: int = field(init=False)
    _plan: HarvestPlan = field(init=False)
    _folder: RollingFolder = field(init=False)
    _sample: ActivationStore | None = field(init=False, default=None)
    _resources: ExitStack = field(init=False, default_factory=ExitStack)
    _batches: RollingBatches | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        from activation_store.rolling_harvest import rolling_plan  # transformers and datasets: seconds

        config = self.config
        self._plan = rolling_plan(config.subject, config.text, config.store)
        self.n_layers, self.d_model = len(self._plan.layers), self._plan.info.d_model
        self._folder = RollingFolder(Path(config.store.path))
        self._folder.check()

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
        """Harvests the sample, or finds it there; it tells how many rows of a window are trained on, and so what must
        fit in the budget. The first rank begins the store where training begins.
        """
        sample = self._sample = harvest_sample(self.config)
        contexts = sum(commit.contexts for commit in read_commits(sample.path))
        self._check_budget(_FEWER * self._plan.window_contexts * sample.statistics().count / contexts)
        check_same(self._folder, sample)
        if first:
            self._resources.enter_context(self._folder.locked())
            group = states[0]["group"] if states else 0
            self._folder.begin(group * self.config.source.mixed_windows, self._budget().windows)

    def batches(
        self,
        position: int,
        states: Sequence[Mapping[str, Any]],
        *,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
        decoded: bool = True,
    ) -> RollingBatches:
        config, n_children = self.config, self.config.source.harvesters if rank == 0 else 0
        self._batches = RollingBatches(
            self._folder,
            self.reference,
            config.source,
            self._budget(),
            batch_size_tokens=batch_rows(config),
            rank=rank,
            ranks=ranks,
            start_batch=position,
            # All ranks' are the same.
            state=states[0] if states else None,
            device=device,
            children=[self._harvester(number) for number in range(n_children)],
            resources=self._resources,
        )
        return self._batches

    def checkpointed(self, position: int) -> None:
        """Frees what is before; at the end, tells the harvests that training is done."""
        assert self._batches is not None
        self._batches.checkpointed(position)
        if position == total_steps(self.config) * (self.config.train.batch_size_tokens // batch_rows(self.config)):
            self._batches.finish()

    def _harvester(self, number: int) -> Child:
        from activation_store.rolling_harvest import RollingJob

        config = self.config
        devices = config.source.harvester_devices or [config.device]
        device = devices[number % len(devices)]
        return Child(
            "activation_store.rolling_process",
            RollingJob(config.subject, config.text, config.store, config.source, device),
        )

    def _budget(self) -> RollingBudget:
        from activation_store.rolling_harvest import bytes_per_window

        config, window_bytes = self.config, bytes_per_window(self._plan)
        per_step = config.train.batch_size_tokens // batch_rows(config)
        windows = windows_within(config.source.budget_bytes, window_bytes)
        return RollingBudget(windows, window_bytes, config.train.checkpoint_every * per_step)

    def _check_budget(self, window_rows: float) -> None:
        """Raises UserError for a budget that cannot hold what is read between two checkpoints.

        `window_rows`: rows of a window that are trained on. Those rows, and what is read ahead, begin anywhere in a
        group and so reach over one group more.
        """
        budget, mixed = self._budget(), self.config.source.mixed_windows
        rows = (budget.checkpoint_batches + READ_AHEAD + 1) * batch_rows(self.config)
        wanted = mixed * (math.ceil(rows / (mixed * window_rows)) + 1)
        if budget.windows < wanted:
            raise too_small(self.config.source.budget_bytes, budget.windows, wanted, budget.window_bytes)
