"""Calibrated thresholds: the inference rule fires as often as the training rule, counted exactly."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.cases import F, K, L, make_model
from trainer.calibrate import calibrate_thresholds
from trainer.model.clt import CrossLayerTranscoder


def counts(model: CrossLayerTranscoder, batches: list[Tensor], rule: str) -> Tensor:
    """(L, F) firings over all batches."""
    total = torch.zeros(L, F, dtype=torch.int64)
    for mlp_in in batches:
        features = model.encode(mlp_in, rule=rule)
        total += torch.stack([features[s].counts() for s in range(L)])
    return total


def batches_of(x: Tensor, unlike: bool) -> list[Tensor]:
    """Three batches; `unlike`: of very different sizes of activation, so that one pass is not enough."""
    return [x[:10] * (0.01 if unlike else 1), x[10:20] * (50 if unlike else 1), x[20:]]


@pytest.mark.parametrize("unlike", [False, True])
@pytest.mark.parametrize("score", ["activation", "decoder_norm"])
@pytest.mark.parametrize("scope", ["layer", "all_layers"])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_layer_thresholds_keep_l0(kind: str, scope: str, score: str, unlike: bool) -> None:
    model, x, _ = make_model(kind=kind, scope=scope, score=score)
    batches = batches_of(x, unlike)
    calibrate_thresholds(model, batches)
    expected, found = counts(model, batches, "training").sum(1), counts(model, batches, "inference").sum(1)
    assert torch.equal(found, expected)
    assert bool((model.threshold_LF >= 0).all())
    tau = model.threshold_LF * torch.stack(model.decoder_norms()) if score == "decoder_norm" else model.threshold_LF
    torch.testing.assert_close(tau, tau[:, :1].expand_as(tau))


@pytest.mark.parametrize("unlike", [False, True])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_feature_thresholds_keep_every_firing_rate(kind: str, unlike: bool) -> None:
    model, x, _ = make_model(kind=kind, scope="all_layers", score="decoder_norm")
    batches = batches_of(x, unlike)
    calibrate_thresholds(model, batches, "feature")
    expected = counts(model, batches, "training")
    assert torch.equal(counts(model, batches, "inference"), expected)
    assert bool((expected == 0).any())


def test_one_shot_iterators_are_read_once() -> None:
    model, x, _ = make_model(kind="batchtopk")
    batches = batches_of(x, unlike=False)

    def stream() -> Iterator[Tensor]:
        yield from batches

    calibrate_thresholds(model, stream())
    streamed = model.threshold_LF.clone()
    calibrate_thresholds(model, batches)
    assert torch.equal(streamed, model.threshold_LF)


def test_relu_and_jumprelu_have_their_own() -> None:
    for kind, value in (("relu", 0.0), ("jumprelu", None)):
        model, x, _ = make_model(kind=kind)
        calibrate_thresholds(model, [x])
        for s, layer in enumerate(model.source_layers):
            wanted = torch.full((F,), value).double() if value is not None else layer.log_threshold.detach().exp()
            assert torch.equal(model.threshold_LF[s], wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(([], "layer"), "no rows to calibrate"), (([], "token"), "threshold_scope=token is unknown")],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate_thresholds(make_model(k=K)[0], *arguments)


def test_nothing_ever_active() -> None:
    model, x, _ = make_model(kind="topk")
    with torch.no_grad():
        for layer in model.source_layers:
            layer.b_enc.fill_(-100.0)
    for scope in ("layer", "feature"):
        calibrate_thresholds(model, [x], scope)
        assert torch.equal(model.threshold_LF, torch.zeros(L, F).double())


@pytest.mark.parametrize("scope", ["layer", "feature"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_end_with_an_error(broken: float, scope: str) -> None:
    model, x, _ = make_model(kind="batchtopk")
    with torch.no_grad():
        model.source_layers[1].b_enc[3] = broken
    with pytest.raises(ValueError, match="layer 1 has scores that are not finite") as caught:
        calibrate_thresholds(model, [x[:20], x[20:]], scope)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("score", ["activation", "decoder_norm"])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_a_feature_that_never_fired_does_not_fire_on_a_little_more(kind: str, score: str) -> None:
    """Feature scope: one feature without a positive pre-activation, one with but never selected."""
    model, x, _ = make_model(kind=kind, score=score)
    layer = model.source_layers[0]
    with torch.no_grad():
        layer.b_enc[4] = -100.0
        layer.W_enc[5] *= 1e-3
        layer.b_enc[5] = 0.01
    calibrate_thresholds(model, [x], "layer")
    threshold_F = model.threshold_LF[0].clone()
    calibrate_thresholds(model, [x], "feature")
    counts_F = counts(model, [x], "training")[0]
    assert counts_F[4] == counts_F[5] == 0
    assert bool((model.threshold_LF[0, [4, 5]] >= threshold_F[[4, 5]]).all())
    assert float(model.threshold_LF[0, 4]) > 0
    assert torch.equal(counts(model, [x], "inference")[0], counts_F)
