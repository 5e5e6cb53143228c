"""A whole loss on the Triton backend against the same on the reference: every op, assembled; tiny.

In the interpreter a kernel's own casts to bfloat16 truncate: with bf16 products the tolerance is two such roundings.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.sparse_cases import DEVICE
from tests.model.cases import all_losses, context, kill, make_model
from trainer.config import KernelsConfig
from trainer.kernels.encode_topk import Selection
from trainer.loss import LossOutput, compute_loss
from trainer.model.runtime import Runtime

pytest.importorskip("triton")

CASES = [
    {"kind": "topk", "scope": "layer", "score": "activation", "span": "cross_layer", "skip": True},
    {"kind": "batchtopk", "scope": "all_layers", "score": "decoder_norm", "span": "cross_layer"},
    {"kind": "jumprelu", "scope": "layer", "score": "activation", "span": "per_layer"},
    {"kind": "relu", "scope": "layer", "score": "activation", "span": "cross_layer"},
]
SPARSE, DENSE = 1.0, 0.0


def on(
    backend: str, case: dict[str, Any], *, dense_above: float = SPARSE, bf16: bool = False
) -> tuple[LossOutput, dict[str, Tensor]]:
    """The loss and the gradients."""
    model, x, y = make_model(n_tokens=7, dtype=torch.float32, n_features=23, k=3, **case)
    kill(model)
    model.running_threshold_L.copy_(torch.tensor([0.5, 0.75, 0.875]))
    model.backend = backend
    model.to(DEVICE)
    config, _ = all_losses(model)
    kernels = KernelsConfig(dense_above_density=dense_above)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=bf16):
        output = compute_loss(model, x.to(DEVICE), y.to(DEVICE), context(model), activation=config, kernels=kernels)
    output.total.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dense_layer", [None, 0, 2])
@pytest.mark.parametrize("auxk", [0.0, 0.1])
def test_the_gradient_is_rounded_once_for_all_layers(
    monkeypatch: pytest.MonkeyPatch, auxk: float, dense_layer: int | None
) -> None:
    """Once for the loss and once for AuxK, whose dead features are not in layer 0; nothing is kept."""
    model, x, y = make_model(n_tokens=7, dtype=torch.float32, n_features=23, k=3, **CASES[0])
    kill(model)
    model.tokens_since_active_LF[0] = 0
    model.backend = "triton"
    model.to(DEVICE)
    config = replace(all_losses(model)[0], auxk_coefficient=auxk)
    given, real, runtimes = [], Runtime.gathered, []

    def gathered(self: Runtime, grad_BTD: Tensor) -> Tensor:
        runtimes.append(self)
        given.append((grad_BTD, real(self, grad_BTD)))
        return given[-1][1]

    monkeypatch.setattr(Runtime, "gathered", gathered)
    if dense_layer is not None:
        layer = model.source_layers[dense_layer]
        monkeypatch.setattr(layer, "begin_topk", partial(_all_of, layer.begin_topk))
    kernels = KernelsConfig(dense_above_density=0.5)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = compute_loss(model, x.to(DEVICE), y.to(DEVICE), context(model), activation=config, kernels=kernels)
    output.total.backward()
    assert len({id(grad_BTD) for grad_BTD, _ in given}) == len({id(copy) for _, copy in given}) == (2 if auxk else 1)
    assert all(torch.equal(copy, grad_BTD.bfloat16()) for grad_BTD, copy in given)
    # Layer 0 takes its turn last, where it is in the pass: AuxK's copy goes when the loss' comes.
    assert all(runtime._rounded is None for runtime in runtimes)


def _all_of(
    begin: Callable[..., Callable[[], Selection]], x_BD: Tensor, k: int, norm_F: Tensor | None, runtime: Runtime
) -> Callable[[], Selection]:
    """Many more than k: above the density that goes dense."""
    return begin(x_BD, 23, norm_F, runtime)


# Of the two dense paths, and of the two ways to select, one each: the interpreter takes seconds for some.
TOPK_AND_RELU = [CASES[0], CASES[3]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["kind"])
def test_loss_and_gradients_are_the_references(case: dict[str, Any]) -> None:
    compare(case, dense_above=SPARSE, bf16=False, tolerance=1e-5)


@pytest.mark.parametrize("case", TOPK_AND_RELU, ids=lambda case: case["kind"])
def test_dense_layers(case: dict[str, Any]) -> None:
    compare(case, dense_above=DENSE, bf16=False, tolerance=1e-5)


@pytest.mark.parametrize("case", TOPK_AND_RELU, ids=lambda case: case["kind"])
def test_bf16_products(case: dict[str, Any]) -> None:
    """The same entries, from the same rounded product, and all else within the roundings."""
    compare(case, dense_above=SPARSE, bf16=True, tolerance=1.6e-2)


def compare(case: dict[str, Any], *, dense_above: float, bf16: bool, tolerance: float) -> None:
    wanted, wanted_gradients = on("reference", case, dense_above=dense_above, bf16=bf16)
    found, gradients = on("triton", case, dense_above=dense_above, bf16=bf16)
    torch.testing.assert_close(found.total, wanted.total, rtol=tolerance, atol=0)
    torch.testing.assert_close(found.l0_L, wanted.l0_L, rtol=0, atol=0)
    torch.testing.assert_close(found.y_hat_BTD, wanted.y_hat_BTD, rtol=10 * tolerance, atol=tolerance)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        scale = float(wanted_gradients[name].abs().max())
        torch.testing.assert_close(
            gradient, wanted_gradients[name], rtol=0, atol=tolerance * scale + 1e-30, msg=lambda m, n=name: f"{n}: {m}"
        )
