"""The backend of a run: refused before anything is written where it cannot run; a GPU's run is looked at anywhere."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from activation_store.errors import UserError
from tests.model.cases import all_losses, context, make_model
from tests.training.runs import records
from trainer.checkpoint import Checkpointer
from trainer.config import (
    KernelBackend,
    KernelsConfig,
    OptimConfig,
    ParamDtype,
    Precision,
    RunConfig,
    TrainConfig,
)
from trainer.kernels import dispatch, encode_topk, sparse_backward, sparse_decode
from trainer.load import load_run
from trainer.loss import compute_loss
from trainer.model.spec import ModelSpec
from trainer.run_folder import load_config, save_config
from trainer.train import train
from trainer.tuned import choose_kernels


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton as a user has it; the other tests run it in its interpreter where there is no GPU."""
    monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


def test_a_backend_that_cannot_run_is_refused_before_anything_is_written(run: RunConfig) -> None:
    run.kernels = KernelsConfig(backend=KernelBackend.triton)
    with pytest.raises(UserError, match=r"kernels\.backend=triton runs on device=cuda, not on cpu; use .*backend=auto"):
        train(run)
    assert not Path(run.run).exists()


@pytest.mark.parametrize("backend", [KernelBackend.auto, KernelBackend.cpu])
def test_the_log_names_what_runs(backend: KernelBackend) -> None:
    """On a CPU products of bfloat16 are the reference's, whatever backend was chosen."""
    pytest.importorskip("numba")
    spec, kernels = ModelSpec(n_layers=3, d_model=16, n_features=64, k=2), KernelsConfig(backend=backend)
    own = {KernelBackend.auto: "cpu (auto: float32 on a CPU), ", KernelBackend.cpu: "cpu (as asked for), "}[backend]
    configs = {
        own: RunConfig(kernels=kernels),
        "bf16 products": RunConfig(kernels=kernels, train=TrainConfig(precision=Precision.bf16)),
        "bf16 parameters": RunConfig(kernels=kernels, optim=OptimConfig(param_dtype=ParamDtype.bf16)),
    }
    why = "auto: " if backend is KernelBackend.auto else ""
    low = f"reference ({why}the compiled kernels of a CPU take float32, not bfloat16; index and sums: cpu), "
    for name, config in configs.items():
        line = choose_kernels(config, spec, torch.device("cpu")).line
        assert line.startswith(f"kernels: {own if name == own else low}"), line


def test_what_the_log_says_of_bf16_is_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op with bfloat16 operands goes to the reference, and the index and sums of float32 do not."""
    pytest.importorskip("numba")
    called = []
    for module in (encode_topk, sparse_decode, sparse_backward):
        for name in ("encode_topk", "sparse_decode", "decoder_backward", "row_gradients", "feature_sums"):
            if hasattr(module, name):
                op = getattr(module, name)
                monkeypatch.setattr(module, name, lambda *a, _op=op, _n=name, **k: called.append(_n) or _op(*a, **k))
    for low, expected in (
        (False, set()),
        (True, {"encode_topk", "sparse_decode", "decoder_backward", "row_gradients"}),
    ):
        called.clear()
        model, x, y = make_model(dtype=torch.float32, kind="topk")
        model.backend = "cpu"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            kernels, (config, _) = KernelsConfig(dense_above_density=1.0), all_losses(model)
            loss = compute_loss(model, x, y, context(model), activation=config, kernels=kernels)
        loss.total.backward()
        assert set(called) == expected


def test_a_run_of_another_backend_is_loaded_and_says_which_it_was(run: RunConfig) -> None:
    run.kernels = KernelsConfig(backend=KernelBackend.reference, dense_above_density=0.25)
    train(run)
    assert records(run.run)
    checkpoint = Checkpointer(run.run).newest_good()
    assert checkpoint is not None
    environment = checkpoint.state["environment"]
    assert (environment["kernels"], environment["dense_above_density"]) == ("reference", 0.25)
    assert load_run(run.run).model.kernels.name == "reference"

    config = load_config(run.run)
    config.kernels.backend = KernelBackend.triton
    save_config(run.run, config)
    assert load_run(run.run).model.backend == "auto"
