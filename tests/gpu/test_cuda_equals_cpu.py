"""The model on a CUDA device against itself on the CPU: losses and the gradient of every parameter, in float64.

Float64 on both sides: selection is discontinuous, and rounding alone must not decide it. Needs torch and pytest only.
"""

from typing import Any

import pytest
import torch

from tests.model.cases import CASES, all_losses, case_name, context, kill, make_model
from trainer.config import KernelsConfig
from trainer.loss import LossOutput, compute_loss
from trainer.model.clt import CrossLayerTranscoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def losses_on(device: str, case: dict[str, Any], density: float) -> tuple[CrossLayerTranscoder, LossOutput]:
    model, x, y = make_model(**case)
    kill(model)
    model.running_threshold_L.copy_(torch.tensor([0.5, 0.75, 0.875]))
    config, _ = all_losses(model)
    model.to(device)
    kernels = KernelsConfig(dense_above_density=density)
    output = compute_loss(model, x.to(device), y.to(device), context(model), activation=config, kernels=kernels)
    output.total.backward()
    return model, output


@pytest.mark.parametrize("density", [0.0, 1.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_losses_and_gradients_are_those_of_the_cpu(case: dict[str, Any], density: float) -> None:
    cpu_model, cpu = losses_on("cpu", case, density)
    cuda_model, cuda = losses_on("cuda", case, density)
    torch.testing.assert_close(cuda.y_hat_BTD.cpu(), cpu.y_hat_BTD, rtol=1e-9, atol=1e-11)
    for term in ("total", "mse", "penalty", "auxk", "pre_act", "l0_L"):
        torch.testing.assert_close(
            getattr(cuda, term).detach().cpu(), getattr(cpu, term).detach(), rtol=1e-9, atol=1e-11
        )
    for (name, ours), theirs in zip(cuda_model.named_parameters(), cpu_model.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None, name
        torch.testing.assert_close(
            ours.grad.cpu(), theirs.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
