"""What the processes of test_resume_mesh.py run."""

from typing import Any

import trainer.train
from trainer.config import RunConfig
from trainer.model.clt import CrossLayerTranscoder
from trainer.train import TrainSummary, train


class KilledError(Exception):
    """Stands for the end of the process: nothing in the trainer catches it."""


def train_until(config: RunConfig, step: int) -> None:
    """Trains, and dies in that step on every rank, after its gradients."""
    real = trainer.train.check_finite

    def die(*args: Any, **kwargs: Any) -> float:
        if kwargs["step"] == step:
            raise KilledError
        return real(*args, **kwargs)

    trainer.train.check_finite = die
    try:
        train(config)
    except KilledError:
        return
    finally:
        trainer.train.check_finite = real
    raise AssertionError("the run ended")


def in_double(function: Any, *args: Any) -> Any:
    """The function's result, with training in float64."""
    real = trainer.train.build_model

    def build(*args: Any, **kwargs: Any) -> CrossLayerTranscoder:
        return real(*args, **kwargs).double()

    trainer.train.build_model = build
    try:
        return function(*args)
    finally:
        trainer.train.build_model = real


def resumed(config: RunConfig) -> int | None:
    """The step that a call of `train` went on from."""
    summary: TrainSummary = train(config)
    return summary.resumed_from
