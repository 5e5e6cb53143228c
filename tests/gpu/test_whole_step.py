"""Whole steps on a CUDA device, on every backend: peak memory, and two runs equal bit for bit."""

import pytest
import torch

from tests.model.cases import all_losses, context, kill, make_model
from tests.model.peak_memory import ALL_LAYERS_BYTES, CASES, LIMITS, beside_a_mask, peak_bytes, prepare
from trainer.config import KernelsConfig
from trainer.loss import compute_loss
from trainer.reproducibility import deterministic

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
BACKENDS = ["reference", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_never_holds_all_layers(case: str, backend: str) -> None:
    """By the allocator's count; a layer's pre-activations take a sixteenth, a mask of all layers a quarter: beside what
    a step needs anyway, it breaks the limit."""
    step = prepare(case, backend, CUDA)
    limit = max(LIMITS[case], 0.25) * ALL_LAYERS_BYTES
    assert 0 < peak_bytes(step, CUDA) < limit < peak_bytes(beside_a_mask(step, CUDA), CUDA)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dense_above", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batchtopk"])
def test_two_runs_are_equal_bit_for_bit(kind: str, dense_above: float, backend: str) -> None:
    """Five Adam steps in fp32, as training runs them."""
    weights = []
    with deterministic(CUDA):
        for _ in range(2):
            model, x, y = make_model(
                kind=kind, n_layers=3, d_model=100, n_features=1271, n_tokens=410, dtype=torch.float32
            )
            model.backend = backend
            kill(model)
            model.to(CUDA).gradient_buffers.enabled = True
            config, _ = all_losses(model)
            kernels = KernelsConfig(dense_above_density=dense_above)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
            for _ in range(5):
                optimizer.zero_grad(set_to_none=True)
                output = compute_loss(model, x.to(CUDA), y.to(CUDA), context(model), activation=config, kernels=kernels)
                output.total.backward()
                optimizer.step()
                model.record_step(output.fired, x.shape[0], output.batch_threshold_L)
            weights.append(model.state_dict())
    for name, first in weights[0].items():
        assert torch.equal(first.nan_to_num(), weights[1][name].nan_to_num()), name
