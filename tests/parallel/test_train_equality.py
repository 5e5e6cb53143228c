"""A run trained on a mesh is the run that one process trains: its metrics and checkpoints, and what one process then
measures and publishes of it.

A covering choice runs by default; `make test-matrix` runs every activation on every mesh with both splits.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.measured import assert_same_evaluation, assert_same_publication, measured_and_published
from tests.parallel.processes import Processes
from tests.parallel.training import train_all
from tests.training.runs import ACTIVATIONS, assert_close, checkpoint_tensors, records, tiny_run
from trainer.config import RunConfig
from trainer.train import TrainSummary

_STEPS = {"train.tokens": 20 * 96, "train.eval_every": 8, "train.log_every": 1, "train.checkpoint_every": 0}
_SPECIAL: dict[str, dict[str, Any]] = {
    "batchtopk_all_layers": {"train.precision": "fp32"},
    "relu": {"train.microbatch_tokens": 48},
}
# No layout has the skips of a cross-layer transcoder.
_UNPUBLISHABLE = {"topk_all_layers"}


@dataclass(frozen=True)
class Case:
    """An activation on a mesh, with an engine."""

    activation: str
    data: int
    feature: int
    split: str
    engine: str = "plain"

    def __str__(self) -> str:
        return f"{self.activation}-{self.data}x{self.feature}-{self.split}-{self.engine}"

    @property
    def mesh(self) -> dict[str, Any]:
        """The mesh and the engine as settings."""
        mesh = {"parallel.data": self.data, "parallel.feature": self.feature, "parallel.decoder_split": self.split}
        return {**mesh, "engine.kind": self.engine}


COVERING = [
    Case("topk", 2, 2, "columns"),
    Case("topk_all_layers", 1, 4, "rows"),
    Case("jumprelu", 2, 2, "rows"),
    Case("batchtopk", 4, 1, "columns"),
    Case("batchtopk_all_layers", 2, 2, "columns"),
    Case("relu", 1, 4, "columns"),
]
_MESHES = [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)]
_OTHERS = [
    case
    for activation in ACTIVATIONS
    for data, feature in _MESHES
    for split in (("columns", "rows") if feature > 1 else ("columns",))
    if (case := Case(activation, data, feature, split)) not in COVERING
]
# DeepSpeed has no float64.
_ENGINES = [
    Case(activation, data, feature, "columns", engine)
    for engine in ("fsdp", "accelerate")
    for activation in ACTIVATIONS
    for data, feature in _MESHES
    if data > 1
]
every_case = pytest.mark.parametrize(
    "case", [*COVERING, *(pytest.param(case, marks=pytest.mark.matrix) for case in _OTHERS + _ENGINES)], ids=str
)


class Runs:
    """Runs of one process and of meshes: each is trained, and measured and published, when it is first asked for."""

    def __init__(self, store: RunConfig, folder: Path, ranks: dict[int, Processes]) -> None:
        self._store, self._folder, self._ranks = store, folder, ranks
        self.serial, self.meshed = cache(self._serial), cache(self._meshed)
        self.measured = cache(self._measured)

    def _serial(self, activation: str) -> RunConfig:
        config = self._config(activation, self._folder / "serial" / activation)
        train_all([config])
        return config

    def _meshed(self, case: Case) -> RunConfig:
        config = self._config(case.activation, self._folder / "mesh" / str(case), case.mesh)
        summaries = self._ranks[case.data * case.feature].run(train_all, [config])
        assert all(_without_seconds(each) == _without_seconds(summaries[0]) for each in summaries)
        return config

    def _measured(self, run: str, activation: str) -> Path:
        return measured_and_published(run, publishable=activation not in _UNPUBLISHABLE)

    def _config(self, activation: str, run: Path, mesh: dict[str, Any] | None = None) -> RunConfig:
        words = {**ACTIVATIONS[activation], **_SPECIAL.get(activation, {}), **_STEPS, **(mesh or {})}
        return tiny_run(self._store, run, words)


@pytest.fixture(scope="module")
def runs(
    tiny_store: RunConfig, two_ranks: Processes, four_ranks: Processes, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    """What the tests below share."""
    return Runs(tiny_store, tmp_path_factory.mktemp("equality"), {2: two_ranks, 4: four_ranks})


def _without_seconds(summaries: list[TrainSummary]) -> list[TrainSummary]:
    return [replace(summary, seconds=0.0) for summary in summaries]


@every_case
def test_every_line_of_the_metrics_is_that_of_one_process(runs: Runs, case: Case) -> None:
    wanted, found = records(runs.serial(case.activation).run), records(runs.meshed(case).run)
    assert len(wanted) == 23
    for line, other in zip(wanted, found, strict=True):
        assert_close(other, line, f"{case} step {line['step']}", rel=1e-6, absolute=1e-9)


@every_case
def test_the_last_checkpoint_is_that_of_one_process(runs: Runs, case: Case) -> None:
    serial, meshed = (checkpoint_tensors(run.run) for run in (runs.serial(case.activation), runs.meshed(case)))
    assert serial.keys() == meshed.keys()
    for key, wanted in serial.items():
        _same_tensor(meshed[key], wanted, f"{case} {key}")


@every_case
def test_evaluation_and_published_files_are_those_of_one_process(runs: Runs, case: Case) -> None:
    wanted = runs.measured(runs.serial(case.activation).run, case.activation)
    found = runs.measured(runs.meshed(case).run, case.activation)
    assert_same_evaluation(found, wanted)
    if case.activation not in _UNPUBLISHABLE:
        assert_same_publication(found / "published", wanted / "published")


def _same_tensor(found: Tensor, wanted: Tensor, where: str) -> None:
    assert found.shape == wanted.shape, where
    difference = (found.double() - wanted.double()).nan_to_num(0.0).abs()
    assert torch.equal(found.isnan(), wanted.isnan()), where
    assert float(difference.max()) <= 1e-7 * max(float(wanted.double().nan_to_num(0.0).abs().max()), 1e-6), where


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_the_fixtures_exercise_what_they_are_for(runs: Runs, activation: str) -> None:
    last = records(runs.serial(activation).run)[-2]
    assert last["step"] == 20
    if activation != "relu":
        assert last["auxk"] > 0
