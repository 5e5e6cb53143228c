"""The sample of a run without a store of its own that stays: a store in the run folder.

It is harvested before training from the first `source.statistics_tokens` tokens of the text, with the held-out rows.
Statistics, outliers, calibration rows and figures on held-out rows come from it, in training and after, and a resume
finds the same.
"""

from dataclasses import replace
from pathlib import Path

from activation_store.config import SourceKind
from activation_store.places import Place, store_place
from activation_store.store import ActivationStore
from trainer.config import RunConfig
from trainer.rows import open_matching_store
from trainer.run_folder import RunFolder


def sample_config(config: RunConfig) -> RunConfig:
    """The config of the sample as a store of its own."""
    folder = RunFolder(config.run).sample
    return replace(config, store=replace(config.store, path=str(folder), tokens=config.source.statistics_tokens))


def harvest_sample(config: RunConfig) -> ActivationStore:
    """The sample, complete: harvested now, or found. Raises UserError."""
    from activation_store.harvest import harvest  # transformers: seconds

    sample = sample_config(config)
    harvest(sample.subject, sample.text, sample.store, device=sample.device)
    return open_matching_store(sample)


def reference_path(config: RunConfig, run: Path | str) -> Place:
    """Where the store lies that has statistics and held-out rows of the run in folder `run`."""
    return store_place(config.store) if config.source.kind is SourceKind.disk else RunFolder(run).sample


def batch_rows(config: RunConfig) -> int:
    """Rows of a batch of a source: a global microbatch."""
    return config.train.microbatch_tokens or config.train.batch_size_tokens
