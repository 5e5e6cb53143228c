"""What the processes of test_resume_mesh.py run."""

import io
import os
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any
from unittest import mock

import trainer.loop
import trainer.setup
from trainer.config import RunConfig
from trainer.model.clt import CrossLayerTranscoder
from trainer.train import TrainSummary, train


class KilledError(Exception):
    """Stands for the end of the process: nothing in the trainer catches it."""


def ended_by(act: Callable[[], None], error: type[BaseException], config: RunConfig, step: int) -> None:
    """Trains, with `act` called in that step on every rank, after its gradients; the run must end with `error`."""
    real = trainer.loop.check_finite

    def check(*args: Any, **kwargs: Any) -> float:
        if kwargs["step"] == step:
            act()
        return real(*args, **kwargs)

    with mock.patch.object(trainer.loop, "check_finite", check):
        try:
            train(config)
        except error:
            return
    raise AssertionError("the run ended")


def train_until(config: RunConfig, step: int) -> None:
    """Trains, and dies in that step on every rank, after its gradients."""

    def die() -> None:
        raise KilledError

    ended_by(die, KilledError, config, step)


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


def with_object_store(endpoint: str, function: Any, *args: Any) -> tuple[Any, list[str]]:
    """The function's result with the S3 server at `endpoint`, and the lines that this rank said."""
    said = io.StringIO()
    with mock.patch.dict(os.environ, s3_environment(endpoint)), redirect_stderr(said):
        found = function(*args)
    return found, said.getvalue().splitlines()


def s3_environment(endpoint: str) -> dict[str, str]:
    """What leads a process to tests/store/s3.py's server."""
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    return {"AWS_ENDPOINT_URL": endpoint, **keys}
