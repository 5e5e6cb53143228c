"""W_enc and W_dec in bfloat16 give the losses and gradients of float32 parameters with the same values."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.cases import all_losses, context, kill, make_model
from trainer.calibrate import calibrate_thresholds
from trainer.config import KernelsConfig
from trainer.loss import compute_loss
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.functions import row_norms

CASES: list[dict[str, Any]] = [
    {"kind": "topk", "skip": True},
    {"kind": "topk", "scope": "all_layers", "score": "decoder_norm"},
    {"kind": "batchtopk", "score": "decoder_norm"},
    {"kind": "jumprelu", "skip": True},
    {"kind": "relu", "span": "per_layer"},
]


def _store_tables(model: CrossLayerTranscoder, dtype: torch.dtype) -> None:
    """bfloat16 with float32 gradients, as the optimizer does; or back."""
    for name, parameter in model.named_parameters():
        if name.endswith(("W_enc", "W_dec")):
            parameter.grad, parameter.data = None, parameter.data.to(dtype)
            parameter.grad_dtype = torch.float32


def _loss_and_gradients(
    model: CrossLayerTranscoder, x: Tensor, y: Tensor, *, mixed: bool, dense_above: float
) -> tuple[Tensor, dict[str, Tensor]]:
    activation, _ = all_losses(model)
    for parameter in model.parameters():
        parameter.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        output = compute_loss(
            model,
            x,
            y,
            context(model),
            activation=activation,
            kernels=KernelsConfig(dense_above_density=dense_above),
        )
    output.total.backward()  # type: ignore[no-untyped-call]
    assert output.y_hat_BTD.dtype == torch.float32
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.total.detach(), gradients


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("dense_above", [0.0, 1.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_losses_and_gradients(case: dict[str, Any], buffers: bool, dense_above: float, mixed: bool) -> None:
    model, x, y = make_model(dtype=torch.float32, **case)
    # The compiled kernels take float32 alone and sum in another order.
    model.backend = "reference"
    model.gradient_buffers.enabled = buffers
    kill(model)
    _store_tables(model, torch.bfloat16)
    loss, gradients = _loss_and_gradients(model, x, y, mixed=mixed, dense_above=dense_above)
    _store_tables(model, torch.float32)
    wanted_loss, wanted = _loss_and_gradients(model, x, y, mixed=mixed, dense_above=dense_above)
    assert torch.equal(loss, wanted_loss)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        # The pre-activation loss's gradient of W_enc is rounded to bfloat16 by autograd, before it is added: half a
        # spacing of a small term.
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=2e-5 * float(wanted[name].abs().max()))


def test_several_backward_passes_add_up_in_float32() -> None:
    model, x, y = make_model(dtype=torch.float32, kind="topk")
    activation, _ = all_losses(model)
    _store_tables(model, torch.bfloat16)
    parts = []
    for rows in (slice(0, 20), slice(20, 41)):
        output = compute_loss(model, x[rows], y[rows], context(model), activation=activation)
        before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        output.total.backward()  # type: ignore[no-untyped-call]
        parts.append({n: p.grad - before.get(n, 0.0) for n, p in model.named_parameters() if p.grad is not None})
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, parts[0][name] + parts[1][name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("score", ["activation", "decoder_norm"])
def test_calibration_inference_and_reconstruction(score: str) -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model, x, _ = make_model(dtype=torch.float32, kind="batchtopk", score=score, skip=True)
        model.backend = "reference"
        _store_tables(model, torch.bfloat16)
        _store_tables(model, dtype)
        calibrate_thresholds(model, [x], "feature")
        found.append((model.threshold_LF, model.reconstruct(x), model.reconstruct(x, rule="training")))
    for ours, wanted in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, wanted)


def test_norms_of_16_bit_rows_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.model.functions._NORM_BLOCK_VALUES", 1_000)
    rows = torch.randn(37, 300).bfloat16()
    exact = rows.double().square().sum(dim=1).sqrt()
    found = row_norms(rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
