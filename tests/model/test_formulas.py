"""Every formula against the dense float64 reference: forward, every loss term, the gradient of every parameter."""

from typing import Any

import pytest
import torch

from tests.model import dense_reference
from tests.model.cases import (
    CASES,
    all_losses,
    available_backends,
    case_name,
    context,
    kill,
    leaves,
    make_model,
    scaled,
)
from trainer.config import ActivationConfig, KernelsConfig
from trainer.loss import compute_loss
from trainer.model.clt import CrossLayerTranscoder

TERMS = ("total", "mse", "penalty", "auxk", "pre_act")


def check_against_reference(model: CrossLayerTranscoder, x: Any, y: Any, kernels: KernelsConfig | None = None) -> None:
    dead = kill(model)
    model.running_threshold_L.copy_(torch.tensor([0.5, 0.75, 0.875]))
    config, settings = all_losses(model)
    settings.running = [0.5, 0.75, 0.875]
    output = compute_loss(model, x, y, context(model), activation=config, kernels=kernels)
    output.total.backward()
    parameters = leaves(model)
    expected = dense_reference.loss(parameters, *scaled(model, x, y), dead, settings)
    expected["total"].backward()
    for term in TERMS:
        torch.testing.assert_close(getattr(output, term).detach(), expected[term].detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(output.y_hat_BTD, expected["y_hat"].detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(output.l0_L, expected["gate"].detach().sum(dim=2).mean(dim=0), rtol=0, atol=1e-12)
    fired = (expected["gate"].detach() > 0).any(dim=0)
    assert torch.equal(torch.stack(output.fired), fired)
    for name, parameter in model.named_parameters():
        wanted = parameters[name].grad
        assert wanted is not None, name
        assert wanted.abs().max() > 0, f"{name}: the reference has no gradient, the comparison would be empty"
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_losses_and_gradients_equal_the_reference(case: dict[str, Any]) -> None:
    model, x, y = make_model(**case)
    check_against_reference(model, x, y, KernelsConfig(dense_above_density=1.0))


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("case", [case for case in CASES if not case["skip"]], ids=case_name)
def test_float32_on_every_backend(case: dict[str, Any], backend: str) -> None:
    """Against the float64 reference from the same weights: the same entries, and gradients within 2e-5 of their largest
    (JumpReLU's theta: 1e-4, for its terms are large and cancel)."""
    model, x, y = make_model(**case, dtype=torch.float32)
    model.backend = backend
    dead = kill(model)
    running = torch.tensor([0.5, 0.75, 0.875])
    model.running_threshold_L.copy_(running)
    config, settings = all_losses(model)
    settings.running = running.tolist()
    output = compute_loss(
        model, x, y, context(model), activation=config, kernels=KernelsConfig(dense_above_density=1.0)
    )
    output.total.backward()
    model.double()
    parameters = leaves(model)
    expected = dense_reference.loss(parameters, *scaled(model, x.double(), y.double()), dead, settings)
    expected["total"].backward()
    for s, codes in enumerate(output.codes):
        assert codes is not None
        assert torch.equal(codes.to_dense() > 0, expected["gate"][:, s] > 0), f"layer {s}: other entries are selected"
    assert float(output.total.detach()) == pytest.approx(float(expected["total"].detach()), rel=1e-5)
    for name, parameter in model.named_parameters():
        wanted, found = parameters[name].grad, parameter.grad
        assert wanted is not None
        assert found is not None, name
        share = 1e-4 if "log_threshold" in name else 2e-5
        assert float((found.double() - wanted).abs().max()) <= share * float(wanted.abs().max()), name


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("span", ["cross_layer", "per_layer"])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batchtopk"])
def test_the_dense_path_equals_the_reference(kind: str, span: str, skip: bool) -> None:
    model, x, y = make_model(kind=kind, span=span, skip=skip)
    check_against_reference(model, x, y, KernelsConfig(dense_above_density=0.0))


def test_the_dense_path_of_relu_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [slice(0, 50), slice(50, 100), slice(100, 127)]
    monkeypatch.setattr("trainer.model.dense.feature_blocks", lambda n: blocks)
    model, x, y = make_model(kind="jumprelu")
    check_against_reference(model, x, y, KernelsConfig(dense_above_density=0.0))


@pytest.mark.parametrize("scope", ["layer", "all_layers"])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_the_dense_path_of_topk_in_several_blocks(kind: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """41 tokens in blocks of 11; with selection over all layers some tokens select nothing in a layer."""
    monkeypatch.setattr("trainer.model.dense_codes._MIN_BLOCK", 1)
    model, x, y = make_model(kind=kind, scope=scope, score="decoder_norm")
    check_against_reference(model, x, y, KernelsConfig(dense_above_density=0.0))


@pytest.mark.parametrize("dense_above", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batchtopk"])
def test_gradients_written_into_kept_buffers_are_the_same(kind: str, dense_above: float) -> None:
    """Two microbatches, then a second step into the same buffers."""
    config, kernels = all_losses(make_model(kind=kind)[0])[0], KernelsConfig(dense_above_density=dense_above)
    grads = []
    for enabled in (False, True):
        model, x, y = make_model(kind=kind)
        kill(model)
        model.running_threshold_L.fill_(0.5)
        model.gradient_buffers.enabled = enabled
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            for part in (slice(0, 20), slice(20, 41)):
                compute_loss(
                    model, x[part], y[part], context(model), activation=config, kernels=kernels
                ).total.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, plain in grads[0].items():
        torch.testing.assert_close(grads[1][name], plain, rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dense_above", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batchtopk"])
def test_finite_differences(kind: str, dense_above: float) -> None:
    """Central differences along random directions where the loss is smooth: all parameters but theta, no AuxK (whose
    target is detached)."""
    model, x, y = make_model(kind=kind)
    config = ActivationConfig(auxk_coefficient=0.0, tanh_lambda=0.0 if "topk" in kind else 0.3)
    kernels = KernelsConfig(dense_above_density=dense_above)

    def value() -> torch.Tensor:
        return compute_loss(model, x, y, context(model), activation=config, kernels=kernels).total

    value().backward()
    for name, parameter in model.named_parameters():
        if "log_threshold" in name:
            continue
        direction = torch.randn_like(parameter)
        slope = float((parameter.grad * direction).sum())
        step = 1e-7
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = float(value())
            parameter.sub_(direction, alpha=2 * step)
            below = float(value())
            parameter.add_(direction, alpha=step)
        assert (above - below) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("dense_above", [0.0, 1.0])
def test_jumprelu_estimator_by_hand(dense_above: float) -> None:
    """One feature, one token at a time: d a / d theta and d L0 / d theta have the stated values."""
    for pre, active, banded in ((0.2, False, False), (0.45, False, True), (0.6, True, True), (1.4, True, False)):
        model, _, _ = make_model(
            n_layers=1, d_model=1, n_features=1, kind="jumprelu", threshold_init=0.5, bandwidth=0.4, n_tokens=1
        )
        model.set_scaling(*(torch.tensor([[v]]) for v in (0.0, 1.0, 0.0, 1.0)))
        layer = model.source_layers[0]
        with torch.no_grad():
            layer.W_enc.fill_(1.0), layer.b_enc.zero_(), layer.W_dec.fill_(2.0), layer.b_dec.zero_()
            layer.log_threshold.fill_(float(torch.tensor(0.5).log()))
        config = ActivationConfig(auxk_coefficient=0.0, l0_lambda=3.0, l0_target=4.0)
        output = compute_loss(
            model,
            torch.tensor([[[pre]]]),
            torch.tensor([[[5.0]]]),
            context(model),
            activation=config,
            kernels=KernelsConfig(dense_above_density=dense_above),
        )
        output.total.backward()
        a = pre if active else 0.0
        d_a = 2 * (2.0 * a - 5.0) * 2.0
        d_l0 = 0.6 * 3.0 * (2 / 4.0) * 2 * (float(active) - 4.0)
        d_theta = (-(0.5 / 0.4) * d_a - (1 / 0.4) * d_l0) if banded else 0.0
        assert float(layer.log_threshold.grad) == pytest.approx(0.5 * d_theta, abs=1e-6), pre
        # L0 reaches theta only: the encoder sees the reconstruction alone.
        assert float(layer.b_enc.grad) == pytest.approx(d_a if active else 0.0, abs=1e-6), pre
