"""Whole runs in every precision: resumed bit for bit, saved in the best there is, as large as counted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from activation_store.store import ActivationStore
from tests.training.runs import assert_same_bits, checkpoint_tensors, records, tiny_run
from tests.training.test_resume import KilledError, _die_in_update
from trainer.build import build_model, checkpoint_bytes, table_bytes
from trainer.config import RunConfig
from trainer.held_out import evaluate_rows
from trainer.load import load_run
from trainer.parallel.engine import build_engine
from trainer.publish.fold_model import fold_layer
from trainer.rows import held_out_batches
from trainer.train import train

# With them, every activation, accumulation, products in bf16, a second gradient of the tables (AuxK), W_skip.
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16 states": {"optim.state_dtype": "bf16", "model.skip": True},
    "8-bit states": {"optim.state_dtype": "int8", "activation.kind": "batchtopk", "train.microbatch_tokens": 48},
    "master": {"optim.param_dtype": "bf16", "optim.state_dtype": "bf16", "activation.score": "decoder_norm"},
    "no master": {
        "optim.param_dtype": "bf16",
        "optim.master": "none",
        "activation.kind": "jumprelu",
        "activation.tanh_lambda": 0.01,
        "activation.pre_act_lambda": 0.01,
        "train.precision": "bf16",
    },
    "smallest": {
        "optim.param_dtype": "bf16",
        "optim.master": "none",
        "optim.state_dtype": "int8",
        "train.precision": "bf16",
    },
}


@pytest.fixture(scope="module", params=list(PRECISIONS))
def finished(request: pytest.FixtureRequest, tiny_store: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """For every precision a finished run: its name and its config."""
    config = tiny_run(tiny_store, tmp_path_factory.mktemp("precision") / "run", PRECISIONS[request.param])
    train(config)
    return request.param, config


def test_killed_and_resumed_gives_the_same_bits(
    finished: tuple[str, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, config = finished
    again = tiny_run(config, tmp_path / "run", PRECISIONS[name])
    with monkeypatch.context() as patch:
        _die_in_update(patch, step=8)
        with pytest.raises(KilledError):
            train(again)
    assert train(again).resumed_from == 5
    assert_same_bits(checkpoint_tensors(again.run), checkpoint_tensors(config.run))
    assert records(again.run) == records(config.run)


def test_a_checkpoint_has_the_dtypes_and_the_size_that_were_counted(finished: tuple[str, RunConfig]) -> None:
    _, config = finished
    optim, tensors = config.optim, checkpoint_tensors(config.run)
    spec = load_run(config.run).model.spec
    saved = torch.bfloat16 if optim.master.value == "none" else torch.float32
    moment = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}[optim.state_dtype.value]
    bytes_of = {"weights": 0, "moments": 0}
    for name, tensor in tensors.items():
        table = "W_enc" in name or "W_dec" in name
        if name.endswith(("W_enc", "W_dec")):
            assert tensor.dtype == saved
            bytes_of["weights"] += tensor.nbytes
        elif table and not name.endswith(".step"):
            assert tensor.dtype == (torch.float32 if name.endswith(".scales") else moment), name
            bytes_of["moments"] += tensor.nbytes
        elif tensor.is_floating_point():
            assert tensor.dtype == torch.float32, name
    counted = table_bytes(spec, optim)
    assert bytes_of == {"weights": counted.master or counted.weights, "moments": counted.moments}
    written = sum(
        file.stat().st_size for file in (Path(config.run) / "checkpoints/step_00000012").glob("*.safetensors")
    )
    assert checkpoint_bytes(spec, optim) < written < checkpoint_bytes(spec, optim) + 50_000


def test_what_is_loaded_measures_as_it_did_in_training(finished: tuple[str, RunConfig]) -> None:
    _, config = finished
    loaded = load_run(config.run)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    for name, saved in checkpoint_tensors(config.run).items():
        if name.endswith(("W_enc", "W_dec")):
            assert torch.equal(loaded.model.state_dict()[name], saved.float())
    store = ActivationStore.open(config.store.path)
    held_out = store.held_out()
    assert held_out is not None
    batches = held_out_batches(held_out, batch_rows=96, device=torch.device("cpu"))
    found = evaluate_rows(loaded.model, batches, mean_out_LD=store.statistics().out_mean_LD)
    measured = [record["eval"] for record in records(config.run) if "eval" in record][-1]
    assert found["fvu"] == pytest.approx(measured["fvu"], rel=1e-5)
    assert found["l0"] == measured["l0"]
    fold_layer(loaded.model, 1, torch.float32)


def test_the_options_reach_the_optimizer_and_change_what_is_learnt(tiny_store: RunConfig, tmp_path: Path) -> None:
    config = tiny_run(tiny_store, tmp_path / "run", {"optim.param_dtype": "bf16"})
    statistics = ActivationStore.open(config.store.path).statistics()
    model = build_model(config, statistics, device=torch.device("cpu"))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = build_engine(config, model)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, dtype in dtypes.items():
        table = name.endswith(("W_enc", "W_dec"))
        assert dtype == (torch.bfloat16 if table else torch.float32)
        assert torch.equal(model.get_parameter(name), start[name].to(dtype))
    with engine.master_weights():
        assert all(torch.equal(parameter, start[name]) for name, parameter in model.named_parameters())
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dtypes


def test_the_same_seed_rounds_alike_and_another_does_not(tiny_store: RunConfig, tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate((1, 1, 2)):
        config = tiny_run(tiny_store, tmp_path / str(number), PRECISIONS["bf16 states"])
        config.train = replace(config.train, tokens=3 * 96)
        config.model = replace(config.model, seed=seed)
        train(config)
        found.append(checkpoint_tensors(config.run))
    assert_same_bits(found[0], found[1])
    assert not torch.equal(found[0]["optimizer.layers.0.W_enc.exp_avg"], found[2]["optimizer.layers.0.W_enc.exp_avg"])
