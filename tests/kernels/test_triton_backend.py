"""A whole loss on the Triton backend against the same on the reference: every op, assembled. Float32, tiny."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.sparse_cases import DEVICE
from tests.model.cases import all_losses, context, kill, make_model
from trainer.config import KernelsConfig
from trainer.loss import LossOutput, compute_loss

pytest.importorskip("triton")

CASES = [
    {"kind": "topk", "scope": "layer", "score": "activation", "span": "cross_layer", "skip": True},
    {"kind": "batchtopk", "scope": "all_layers", "score": "decoder_norm", "span": "cross_layer"},
    {"kind": "jumprelu", "scope": "layer", "score": "activation", "span": "per_layer"},
]


def on(backend: str, case: dict[str, Any]) -> tuple[LossOutput, dict[str, Tensor]]:
    """The loss and the gradients, on the sparse path."""
    model, x, y = make_model(n_tokens=7, dtype=torch.float32, n_features=23, k=3, **case)
    kill(model)
    model.running_threshold_L.copy_(torch.tensor([0.5, 0.75, 0.875]))
    model.backend = backend
    model.to(DEVICE)
    config, _ = all_losses(model)
    kernels = KernelsConfig(dense_above_density=1.0)
    output = compute_loss(model, x.to(DEVICE), y.to(DEVICE), context(model), activation=config, kernels=kernels)
    output.total.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["kind"])
def test_loss_and_gradients_are_the_references(case: dict[str, Any]) -> None:
    wanted, wanted_gradients = on("reference", case)
    found, gradients = on("triton", case)
    torch.testing.assert_close(found.total, wanted.total, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.y_hat_BTD, wanted.y_hat_BTD, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        scale = float(wanted_gradients[name].abs().max())
        torch.testing.assert_close(
            gradient, wanted_gradients[name], rtol=0, atol=1e-5 * scale + 1e-30, msg=lambda m, n=name: f"{n}: {m}"
        )
