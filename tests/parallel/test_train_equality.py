"""A run trained on a mesh is the run that one process trains."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.processes import Processes
from tests.parallel.training import train_all
from tests.training.runs import ACTIVATIONS, assert_close, checkpoint_tensors, records, tiny_run
from trainer.config import RunConfig

# Name -> mesh, decoder split, what the run is.
CASES: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "topk": (2, 2, "columns", ACTIVATIONS["topk"]),
    "topk_all_layers": (1, 4, "rows", ACTIVATIONS["topk_all_layers"]),
    "jumprelu": (2, 2, "rows", ACTIVATIONS["jumprelu"]),
    "batchtopk": (4, 1, "columns", ACTIVATIONS["batchtopk"]),
    "batchtopk_all_layers": (2, 2, "columns", ACTIVATIONS["batchtopk_all_layers"] | {"train.precision": "fp32"}),
    "relu": (1, 4, "columns", ACTIVATIONS["relu"] | {"train.microbatch_tokens": 48}),
}
_STEPS = {"train.tokens": 20 * 96, "train.eval_every": 8, "train.log_every": 1, "train.checkpoint_every": 0}


@pytest.fixture(scope="module")
def trained(
    tiny_store: RunConfig, four_ranks: Processes, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[RunConfig, RunConfig]]:
    """Every case trained by one process and on its mesh."""
    folder = tmp_path_factory.mktemp("equality")
    serial, meshed = {}, {}
    for name, (data, feature, split, overrides) in CASES.items():
        overrides = {**overrides, **_STEPS}  # noqa: PLW2901
        mesh = {"parallel.data": data, "parallel.feature": feature, "parallel.decoder_split": split}
        serial[name] = tiny_run(tiny_store, folder / "serial" / name, overrides)
        meshed[name] = tiny_run(tiny_store, folder / "mesh" / name, overrides | mesh)
    train_all(list(serial.values()))
    summaries = four_ranks.run(train_all, list(meshed.values()), timeout=240)
    assert all(each == summaries[0] for each in _without_seconds(summaries))
    return {name: (serial[name], meshed[name]) for name in CASES}


def _without_seconds(summaries: list[Any]) -> list[Any]:
    for summary in (each for of_rank in summaries for each in of_rank):
        object.__setattr__(summary, "seconds", 0.0)
    return summaries


@pytest.mark.parametrize("name", list(CASES))
def test_every_line_of_the_metrics_is_that_of_one_process(
    trained: dict[str, tuple[RunConfig, RunConfig]], name: str
) -> None:
    serial, meshed = trained[name]
    wanted, found = records(serial.run), records(meshed.run)
    assert len(wanted) == 23
    for line, other in zip(wanted, found, strict=True):
        assert_close(other, line, f"{name} step {line['step']}", rel=1e-6, absolute=1e-9)


@pytest.mark.parametrize("name", list(CASES))
def test_the_last_checkpoint_is_that_of_one_process(trained: dict[str, tuple[RunConfig, RunConfig]], name: str) -> None:
    serial, meshed = (checkpoint_tensors(config.run) for config in trained[name])
    assert serial.keys() == meshed.keys()
    for key, wanted in serial.items():
        _same_tensor(meshed[key], wanted, f"{name} {key}")


def _same_tensor(found: Tensor, wanted: Tensor, where: str) -> None:
    assert found.shape == wanted.shape, where
    difference = (found.double() - wanted.double()).nan_to_num(0.0).abs()
    assert torch.equal(found.isnan(), wanted.isnan()), where
    assert float(difference.max()) <= 1e-7 * max(float(wanted.double().nan_to_num(0.0).abs().max()), 1e-6), where


def test_the_fixtures_exercise_what_they_are_for(trained: dict[str, tuple[RunConfig, RunConfig]]) -> None:
    for name, (serial, _) in trained.items():
        last = records(serial.run)[-2]
        assert last["step"] == 20
        if name != "relu":
            assert last["auxk"] > 0, name
