"""`evaluate` on a feature axis, where no rank has the whole transcoder: the figures are those of one process.

A covering choice runs by default; `make test-matrix` runs every activation on 1x2 and 1x4 with both splits.
"""

import json
import os
import shutil
from functools import cache
from pathlib import Path

import pytest

from activation_store.errors import UserError
from tests.parallel import evaluate_cases as cases
from tests.parallel.processes import Processes
from tests.training.runs import ACTIVATIONS, assert_close, tiny_run
from trainer.config import ParallelConfig, RunConfig
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.inputs import INPUTS_FILE
from trainer.evaluation.ranks import columns_split
from trainer.model.spec import ModelSpec
from trainer.train import train

# Skips, decoder norms and a selection over layers; a selection over rows; spans of one layer; bands; density.
_COVERING = [
    ("topk_all_layers", 2, "columns"),
    ("topk_all_layers", 2, "rows"),
    ("batchtopk", 2, "columns"),
    ("batchtopk_all_layers", 2, "rows"),
    ("jumprelu", 2, "columns"),
    ("relu", 2, "rows"),
]
_OTHERS = [
    case
    for activation in ACTIVATIONS
    for size in (2, 4)
    for split in ("columns", "rows")
    if (case := (activation, size, split)) not in _COVERING
]


class Runs:
    """Runs of one process, trained when they are first asked for, and their figures."""

    def __init__(self, store: RunConfig, folder: Path) -> None:
        self._store, self._folder, self._copies = store, folder, 0
        self.trained, self.wanted = cache(self._trained), cache(self._wanted)

    def copy(self, activation: str) -> Path:
        """Of the run, to evaluate."""
        self._copies += 1
        return Path(shutil.copytree(self.trained(activation), self._folder / f"copy_{self._copies}"))

    def _trained(self, activation: str) -> Path:
        config = tiny_run(self._store, self._folder / activation, ACTIVATIONS[activation])
        train(config)
        return Path(config.run)

    def _wanted(self, activation: str) -> cases.Answer:
        return cases.evaluated(self.copy(activation), ParallelConfig())


@pytest.fixture(scope="module")
def runs(tiny_store: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What the tests below share."""
    return Runs(tiny_store, tmp_path_factory.mktemp("evaluate_mesh"))


@pytest.mark.parametrize(
    ("activation", "size", "split"), [*_COVERING, *(pytest.param(*case, marks=pytest.mark.matrix) for case in _OTHERS)]
)
def test_figures_are_those_of_one_process(
    runs: Runs, request: pytest.FixtureRequest, activation: str, size: int, split: str
) -> None:
    ranks: Processes = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[size])
    run, wanted = runs.copy(activation), runs.wanted(activation)
    answers = ranks.run(cases.evaluated, run, cases.parallel(size, split))
    found = answers[0].evaluation
    assert all(answer.evaluation == found for answer in answers)
    assert json.loads((run / "evaluation.json").read_text()) == found
    assert_close(found, wanted.evaluation, activation, rel=1e-6, absolute=1e-9)
    for name in ("silent_fraction", "density_histogram", "dead_fraction_per_layer", "parameters", "tokens"):
        assert found[name] == wanted.evaluation[name], name
    assert wanted.held == found["parameters"]
    # Split by rows, what is added to the sum lies on every rank: a bias, and a skip, of each layer.
    everywhere = 3 * (16 + 16 * 16 * (activation == "topk_all_layers")) if split == "rows" else 0
    assert [answer.held for answer in answers] == [everywhere + (wanted.held - everywhere) // size] * size
    assert [len(answer.lines) > 0 for answer in answers] == [True] + [False] * (size - 1)


def test_the_fixtures_exercise_what_they_are_for(runs: Runs) -> None:
    for activation in ("batchtopk", "jumprelu"):
        wanted = runs.wanted(activation).evaluation
        assert wanted["replacement"] != wanted["replacement_all_positions"]
        assert 0 < wanted["silent_fraction"] < 1
        assert wanted["l0"] > 1


def test_all_ranks_take_the_same_rows(runs: Runs, two_ranks: Processes) -> None:
    answers = two_ranks.run(cases.evaluated, runs.copy("batchtopk"), cases.parallel(2), "rounded", timeout=240)
    for answer in answers:
        assert_close(answer.evaluation, runs.wanted("batchtopk").evaluation, "", rel=1e-6, absolute=1e-9)


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ("full", "AgreedError", "the disk of {run} is full"),
        ("removed", "AgreedError", "was removed while it was about to be read"),
        ("signal", "AgreedInterruptError", ""),
    ],
)
def test_what_one_rank_meets_ends_all(runs: Runs, two_ranks: Processes, fault: str, kind: str, said: str) -> None:
    run = runs.copy("batchtopk")
    first, second = two_ranks.run(cases.error_of, run, cases.parallel(2), fault, timeout=240)
    assert first == second
    assert first[0] == kind
    assert said.format(run=run) in first[1]
    assert "\n" not in first[1]
    assert not (run / "evaluation.json").exists()


def test_a_damaged_checkpoint_is_passed_over_on_all_ranks(runs: Runs, two_ranks: Processes) -> None:
    run = runs.copy("jumprelu")
    os.truncate(run / "checkpoints/step_00000012/model_00000.safetensors", 1000)
    answers = two_ranks.run(cases.evaluated, run, cases.parallel(2), timeout=240)
    said = [line for answer in answers for line in answer.lines if "damaged" in line]
    assert len(said) == 1, said
    assert json.loads((run / INPUTS_FILE).read_text())["checkpoint"] == "step_00000010"
    assert answers[0].evaluation == answers[1].evaluation
    assert answers[0].evaluation != runs.wanted("jumprelu").evaluation


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ({"data": 2}, "parallel.data=2: .* use parallel.data=1 and parallel.feature=2"),
        ({"data": 2, "feature": 3}, "parallel.feature=6"),
        ({"feature": 0}, "parallel.feature=0 must be at least 1"),
        ({"feature": 2}, "wants 2 processes, and 1 was started"),
    ],
)
def test_meshes_that_cannot_be_are_refused(runs: Runs, mesh: dict[str, int], said: str) -> None:
    run = runs.copy("jumprelu")
    with pytest.raises(UserError, match=said) as error:
        evaluate(run, cases.CONFIG, parallel=ParallelConfig(**mesh), device="cpu")
    assert "\n" not in str(error.value)
    assert not (run / "evaluation.json").exists()


def test_uneven_splits_are_refused_and_auto_is_columns_where_they_can_be() -> None:
    spec = ModelSpec(n_layers=1, d_model=16, n_features=60, kind="relu")
    with pytest.raises(UserError, match=r"n_features=60 .* parallel.feature=8; use parallel.feature=6 or 10"):
        columns_split(cases.parallel(8), spec)
    with pytest.raises(UserError, match=r"d_model=16 .* parallel.feature=3.* use parallel.feature=2 or 4"):
        columns_split(cases.parallel(3, "columns"), spec)
    assert columns_split(cases.parallel(4), spec)
    assert not columns_split(cases.parallel(3), spec)
    assert not columns_split(cases.parallel(4, "rows"), spec)
