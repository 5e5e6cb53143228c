"""What the processes of test_resume_mesh.py run."""

from typing import Any

import trainer.loop
import trainer.setup
from trainer.config import RunConfig
from trainer.model.clt import CrossLayerTranscoder
from trainer.train import TrainSummary, train


class KilledError(Exception):
    """Stands for the end of the process: nothing in the trainer catches it."""


def train_until(config: RunConfig, step: int) -> None:
    """Trains, and dies in that step on every rank, after its gradients."""
    real = trainer.loop.check_finite

    def die(*args: Any, **kwargs: Any) -> float:
        if kwargs["step"] == step:
            raise KilledError
        return real(*args, **kwargs)

    trainer.loop.check_finite = die
    try:
        train(config)
    except KilledError:
        return
    finally:
        trainer.loop.check_finite = real
    raise AssertionError("the run ended")


def in_double(function: Any, *args: Any) -> Any:
    """The function's result, with training in float64."""
    real = trainer.setup.build_model

    def build(*args: Any, **kwargs: Any) -> CrossLayerTranscoder:
        return real(*args, **kwargs).double()

    trainer.setup.build_model = build
    try:
        return function(*args)
    finally:
        trainer.setup.build_model = real


def resumed(config: RunConfig) -> int | None:
    """The step that a call of `train` went on from."""
    summary: TrainSummary = train(config)
    return summary.resumed_from
