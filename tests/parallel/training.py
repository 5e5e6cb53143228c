"""Runs for tests on a mesh: trained in float64, so that a mesh and one process differ by rounding alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trainer.setup
import trainer.train
from trainer.config import RunConfig
from trainer.model.clt import CrossLayerTranscoder
from trainer.train import TrainSummary


@contextmanager
def in_double() -> Iterator[None]:
    """While it lasts, `train` trains in float64."""
    real = trainer.setup.build_model

    def build(*args: Any, **kwargs: Any) -> CrossLayerTranscoder:
        return real(*args, **kwargs).double()

    trainer.setup.build_model = build
    try:
        yield
    finally:
        trainer.setup.build_model = real


def train_all(configs: list[RunConfig]) -> list[TrainSummary]:
    """One after another, in float64."""
    with in_double():
        return [trainer.train.train(config) for config in configs]
