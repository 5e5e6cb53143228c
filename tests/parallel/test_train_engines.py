"""The command with every engine on two processes: a run that one engine begins, a signal stops and another continues by
the verb is, line by line and weight by weight, what one process trains, measures and publishes.

In float32, for DeepSpeed has no other: the fixture's smallest selection gap is asserted.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from activation_store.batch import ActivationBatch
from launch.main import main
from tests.parallel import engine_legs as legs
from tests.parallel.processes import Processes
from tests.parallel.test_engines import ROUNDING, SMALLEST_GAP, difference, zero
from tests.training.runs import assert_close, checkpoint_tensors, records, tiny_run
from trainer.config import RunConfig
from trainer.metrics import flat
from trainer.parallel.plain import PlainEngine
from trainer.train import train

_MESH = {"parallel.data": 2}
_RUN = {
    "train.tokens": 12 * 24,
    "train.batch_size_tokens": 24,
    "train.microbatch_tokens": 12,
    "train.log_every": 1,
    "train.checkpoint_every": 0,
    "activation.auxk_coefficient": 0.0,
    "kernels.backend": "reference",
    "model.seed": 9,
}
_STOP = 7
# Who begins and who continues: DeepSpeed's stages each write a checkpoint and read one, of another engine.
LEGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "plain to zero 2": ({}, ["engine=deepspeed"]),
    "zero 1 to plain": (zero(1), ["engine=plain"]),
    "zero 2 to accelerate": (zero(2), ["engine=accelerate"]),
    "accelerate to zero 1": ({"engine.kind": "accelerate"}, ["engine=deepspeed", "engine.zero_stage=1"]),
    "zero 3 to fsdp": (zero(3), ["engine=fsdp"]),
    "fsdp to zero 3": ({"engine.kind": "fsdp"}, ["engine=deepspeed", "engine.zero_stage=3"]),
}


@pytest.fixture(scope="module")
def serial(tiny_store: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The run of one process."""
    config = tiny_run(tiny_store, tmp_path_factory.mktemp("engines") / "serial", _RUN)
    gaps: list[float] = []
    real = PlainEngine.backward

    def backward(engine: PlainEngine, microbatches: list[ActivationBatch], *args: Any, **kwargs: Any) -> Any:
        for batch in microbatches:
            for layer in range(engine.model.spec.n_layers):
                best_Bk = engine.model.pre_activations(layer, batch.mlp_in[:, layer]).topk(3, dim=1).values
                gaps.append(float((best_Bk[:, 1] - best_Bk[:, 2]).min()))
        return real(engine, microbatches, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainEngine, "backward", backward)
        train(config)
    assert len(gaps) == 12 * 2 * 3
    assert min(gaps) > SMALLEST_GAP
    return config


@pytest.fixture(scope="module")
def measured(serial: RunConfig) -> Path:
    """The run of one process, evaluated and published."""
    return measure(Path(serial.run))


@pytest.fixture(scope="module")
def runs(
    tiny_store: RunConfig, two_ranks: Processes, serial: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Every leg's run."""
    folder, found = tmp_path_factory.mktemp("legs"), {}
    for name, (first, second) in LEGS.items():
        config = tiny_run(tiny_store, folder / name.replace(" ", "_"), {**_RUN, **_MESH, **first})
        two_ranks.run(legs.interrupted, config, _STOP, timeout=120)
        words = ["train", f"run={config.run}", "launch.threads=1", *second]
        assert two_ranks.run(legs.commanded, words, timeout=120) == [0, 0]
        found[name] = Path(config.run)
    return found


@pytest.mark.parametrize("name", list(LEGS))
def test_what_one_engine_begins_another_ends_as_one_process(
    runs: dict[str, Path], serial: RunConfig, name: str
) -> None:
    check_trained(runs[name], Path(serial.run))


def test_it_is_measured_and_published_as_one_process(runs: dict[str, Path], measured: Path) -> None:
    check_measured(measure(runs["fsdp to zero 3"]), measured)


@pytest.mark.matrix
@pytest.mark.parametrize("mesh", [(2, 1), (4, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_of_zero_trains_and_is_measured_and_published_as_one_process(
    tiny_store: RunConfig,
    two_ranks: Processes,
    four_ranks: Processes,
    measured: Path,
    tmp_path: Path,
    stage: int,
    mesh: tuple[int, int],
) -> None:
    words = {**_RUN, "parallel.data": mesh[0], "parallel.feature": mesh[1], **zero(stage)}
    config = tiny_run(tiny_store, tmp_path / "run", words)
    (two_ranks if mesh == (2, 1) else four_ranks).run(train, config)
    check_trained(Path(config.run), measured)
    check_measured(measure(Path(config.run)), measured)


def check_trained(run: Path, serial: Path) -> None:
    """Every line of the metrics and the last checkpoint."""
    wanted, found = records(serial), records(run)
    assert [line["step"] for line in wanted if "eval" in line] == [4, 8, 12]
    assert len(wanted) == 15
    for line, other in zip(wanted, found, strict=True):
        assert_close(other, line, f"{run} step {line['step']}", rel=1e-4, absolute=1e-7)
    tensors, expected = checkpoint_tensors(run), checkpoint_tensors(serial)
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert difference(tensors[key].double(), tensor.double()) <= ROUNDING, f"{run} {key}"


def measure(run: Path) -> Path:
    """Evaluates the run and publishes it into `published`, by the commands."""
    assert main(["evaluate", f"run={run}", "eval.documents=4", "launch.threads=1"]) == 0
    assert main(["publish", f"run={run}", f"output={run}/published", "launch.threads=1"]) == 0
    return run


def check_measured(run: Path, serial: Path) -> None:
    """Figures and published weights."""
    theirs, ours = (json.loads((folder / "evaluation.json").read_text()) for folder in (serial, run))
    for key in ("fvu", "fvu_per_layer", "l0", "l0_per_layer", "training_rule", "replacement"):
        assert_close(ours[key], theirs[key], key, rel=1e-4, absolute=1e-7)
    wanted, found = (
        {path.name: path for path in (folder / "published").glob("*.safetensors")} for folder in (serial, run)
    )
    assert wanted
    assert wanted.keys() == found.keys()
    for name, path in wanted.items():
        published = load_file(found[name])
        for key, tensor in load_file(path).items():
            assert difference(published[key].double(), tensor.double()) <= ROUNDING, f"{name} {key}"


def test_runs_of_wandb_are_started_by_accelerate_with_that_engine(
    tiny_store: RunConfig, two_ranks: Processes, tmp_path: Path
) -> None:
    words = {**_RUN, **_MESH, "engine.kind": "accelerate", "log.wandb": "offline", "train.tokens": 4 * 24}
    config = tiny_run(tiny_store, tmp_path / "run", words)
    assert two_ranks.run(legs.tracked, config, timeout=120) == [1, 0]
    lines, settings = legs.wandb_history(config.run)
    logged = [{key: value for key, value in line.items() if not key.startswith("_")} for line in lines]
    # wandb's own step, and what is logged under one step is one line of its.
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    expected: dict[int, dict[str, Any]] = {}
    for record in records(config.run):
        expected.setdefault(record["step"], {}).update(flat(record))
    assert logged == list(expected.values())
    assert settings["engine"]["kind"] == "accelerate"
    assert settings["model"]["n_features"] == 64
