"""The whole job on a CUDA device: harvest to publish, every activation and precision, broken off and continued.

Needs the package's own dependencies too, unlike the other files here: without them it is skipped.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from trainer.config import RunConfig

NEEDED = ("zarr", "hydra", "datasets", "transformers", "gguf")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason=f"needs {', '.join(NEEDED)}"),
]

# Further ones of tests.training.runs.ACTIVATIONS.
ACTIVATIONS = ["relu", "jumprelu", "topk", "topk_all_layers", "batchtopk", "batchtopk_all_layers"]
# What is set beside the default, by the recipes that a GPU is used for.
OPTIONS: dict[str, dict[str, Any]] = {
    "fused": {"optim.fused_update": True, "optim.clip_norm": 0.0, "activation.auxk_coefficient": 0.0},
    "bf16": {"train.precision": "bf16"},
    "bf16 fused": {
        "train.precision": "bf16",
        "optim.fused_update": True,
        "optim.clip_norm": 0.0,
        "activation.auxk_coefficient": 0.0,
    },
    "bf16 parameters": {"train.precision": "bf16", "optim.param_dtype": "bf16", "optim.state_dtype": "bf16"},
    "8-bit states": {"optim.state_dtype": "int8"},
    "reference": {"kernels.backend": "reference"},
    "dense": {"kernels.dense_above_density": 0.0},
    "microbatches": {"train.microbatch_tokens": 32},
}


def run_on(device: str, store: "RunConfig", folder: Path, overrides: dict[str, Any]) -> "RunConfig":
    """A run of 12 steps, done."""
    from tests.training.runs import tiny_run
    from trainer.train import train

    config = tiny_run(store, folder, {**overrides, "device": device})
    train(config)
    return config


def overrides_of(name: str) -> dict[str, Any]:
    """Of an activation, or of TopK with an option; sparse, which so small layers would not be by themselves on CUDA."""
    from tests.training import runs

    return {"kernels.dense_above_density": 1.0, **OPTIONS.get(name, runs.ACTIVATIONS.get(name, {}))}


@pytest.mark.parametrize("name", [*ACTIVATIONS, *OPTIONS])
def test_training_is_that_of_the_cpu(tiny_store: "RunConfig", tmp_path: Path, name: str) -> None:
    """The first steps' losses, before rounding parts the ways of the two."""
    from tests.training.runs import records

    overrides = overrides_of(name) | {"train.log_every": 1}
    cpu = {**overrides, "kernels.backend": "auto"}
    runs = [
        run_on(device, tiny_store, tmp_path / device, words) for device, words in (("cuda", overrides), ("cpu", cpu))
    ]
    found, wanted = ([record["loss"] for record in records(run.run) if "loss" in record] for run in runs)
    assert len(found) == len(wanted) == 12
    low = "bf16" in str(overrides)
    assert found[:3] == pytest.approx(wanted[:3], rel=2e-2 if low else 1e-4)
    assert found == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("name", [*ACTIVATIONS, *OPTIONS])
def test_killed_and_resumed_gives_the_same_bits(
    tiny_store: "RunConfig", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from tests.training.runs import assert_same_bits, checkpoint_tensors, records, tiny_run
    from trainer.parallel.plain import PlainEngine
    from trainer.train import train

    whole = run_on("cuda", tiny_store, tmp_path / "whole", overrides_of(name))
    again = tiny_run(tiny_store, tmp_path / "again", {**overrides_of(name), "device": "cuda"})
    steps, real = iter(range(1, 100)), PlainEngine.update

    def update(self: PlainEngine, norm: float) -> None:
        if next(steps) == 8:
            raise KeyError("killed")
        real(self, norm)

    with monkeypatch.context() as patch:
        patch.setattr(PlainEngine, "update", update)
        with pytest.raises(KeyError, match="killed"):
            train(again)
    assert train(again).resumed_from == 5
    assert_same_bits(checkpoint_tensors(again.run), checkpoint_tensors(whole.run))
    assert records(again.run) == records(whole.run)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_from_harvest_to_publish(tiny_llama: Path, tiny_text: Path, tmp_path: Path, device: str) -> None:
    """harvest, train, evaluate and publish; what was trained here is read anywhere."""
    from activation_store.store import ActivationStore
    from launch.main import main
    from tests.job import tiny_words, working_in
    from trainer.model.clt import CrossLayerTranscoder

    words = [*tiny_words(tiny_llama, tiny_text), f"device={device}", "kernels.dense_above_density=1"]
    with working_in(tmp_path):
        assert main(["harvest", *words]) == 0
        assert main(["train", *words]) == 0
        own = ["run=run", "launch.threads=1", f"device={device}"]
        assert main(["evaluate", *own, "eval.documents=6"]) == 0
        assert main(["publish", *own, "output=published"]) == 0
    rows = ActivationStore.open(tmp_path / "store")[0:50].mlp_in
    of_run, of_published = (CrossLayerTranscoder.load(tmp_path / name) for name in ("run", "published"))
    assert float((of_run.reconstruct(rows) - of_published.reconstruct(rows)).abs().max()) < 1e-4


def test_live(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    """The LM and the trainer on one device."""
    from launch.main import main
    from tests.job import tiny_words, working_in

    # A small ring: it is half full before the first batch.
    live = ["source=live", "source.statistics_tokens=600", "source.ring_bytes=400_000"]
    words = [*tiny_words(tiny_llama, tiny_text), "device=cuda", "kernels.dense_above_density=1", *live]
    with working_in(tmp_path):
        assert main(["train", *words]) == 0


def test_a_store_harvested_here_is_that_of_the_cpu(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    from activation_store.store import ActivationStore
    from launch.main import main
    from tests.job import tiny_words, working_in

    rows = {}
    for device in ("cuda", "cpu"):
        (tmp_path / device).mkdir()
        with working_in(tmp_path / device):
            words = [*tiny_words(tiny_llama, tiny_text), f"device={device}", "store.dtype=float32"]
            assert main(["harvest", *words]) == 0
        rows[device] = ActivationStore.open(tmp_path / device / "store")[0:1000]
    for side in ("mlp_in", "mlp_out"):
        torch.testing.assert_close(getattr(rows["cuda"], side), getattr(rows["cpu"], side), rtol=1e-3, atol=1e-4)
