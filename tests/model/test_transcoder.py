"""Scaling, initialisation, inference, decoding layer by layer, dead-feature state, errors."""

from typing import Any

import pytest
import torch

from tests.model.cases import B, D, F, K, L, all_losses, context, kill, make_model
from tests.model.dense_reference import Settings, selected
from trainer.config import ActivationConfig
from trainer.loss import StepContext, compute_loss
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.scaling import shift_and_scale
from trainer.model.spec import ModelSpec


def small(**spec: Any) -> CrossLayerTranscoder:
    return CrossLayerTranscoder(ModelSpec(**{"n_layers": L, "d_model": D, "n_features": F, "k": K, **spec}))


# --- scaling and initialisation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "layer", "dimension", "standardize"])
def test_scaling_does_what_its_name_says(kind: str) -> None:
    rows = torch.randn(500, L, D, dtype=torch.float64) * torch.rand(L, D) * 9 + torch.randn(L, D)
    shift, scale = shift_and_scale(kind, rows.mean(0), rows.square().mean(0))
    scaled = (rows - shift) * scale
    if kind == "none":
        assert torch.equal(scaled, rows)
    elif kind == "layer":
        torch.testing.assert_close(scaled.square().mean(dim=(0, 2)), torch.ones(L).double(), rtol=1e-5, atol=0)
        assert bool((scale == scale[:, :1]).all())
    elif kind == "dimension":
        torch.testing.assert_close(scaled.square().mean(dim=0), torch.ones(L, D).double(), rtol=1e-5, atol=0)
    else:
        torch.testing.assert_close(scaled.mean(dim=0), torch.zeros(L, D).double(), rtol=0, atol=1e-5)
        torch.testing.assert_close(scaled.var(dim=0, correction=0), torch.ones(L, D).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["layer", "dimension", "standardize"])
@pytest.mark.parametrize("constant", [0.0, 3.0, 1e4])
def test_a_dead_dimension_stays_finite(kind: str, constant: float) -> None:
    rows = torch.randn(50, L, D, dtype=torch.float64)
    rows[:, 0, 3] = constant
    rows[:, 1] = 0.0
    shift, scale = shift_and_scale(kind, rows.mean(0), rows.square().mean(0))
    assert bool(scale.isfinite().all())
    assert bool((scale > 0).all())
    assert float(((rows - shift) * scale).abs().max()) < 1e3


def test_unknown_scaling() -> None:
    with pytest.raises(ValueError, match="scaling=zscore is unknown"):
        shift_and_scale("zscore", torch.zeros(1, 1), torch.zeros(1, 1))


def test_initial_parameters() -> None:
    model = small(n_features=4000, kind="jumprelu", skip=True, encoder_init_scale=2.0, threshold_init=0.03)
    for layer in model.source_layers:
        for weight, bound in ((layer.W_enc.detach(), 2 / 4000**0.5), (layer.W_dec.detach(), 1 / (L * D) ** 0.5)):
            assert 0.99 * bound < float(weight.abs().max()) <= bound
            assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
        assert layer.log_threshold is not None
        assert layer.W_skip is not None
        torch.testing.assert_close(layer.log_threshold.exp(), torch.full((4000,), 0.03))
        assert not layer.b_enc.any()
        assert not layer.W_skip.any()
    assert model.source_layers[0].W_dec.shape == (4000, L, D)
    assert model.source_layers[L - 1].W_dec.shape == (4000, 1, D)
    assert not small(decoder_init="zeros").source_layers[0].W_dec.any()


def test_the_seed_decides_the_initialisation() -> None:
    spec = ModelSpec(n_layers=L, d_model=D, n_features=F, k=K)
    first, same, other = (CrossLayerTranscoder(spec, seed=seed).source_layers[1].W_enc for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("density", [0.02, 0.3])
def test_initial_density_and_decoder_bias(kind: str, density: float) -> None:
    model, x, y = make_model(kind=kind, n_tokens=1000, dtype=torch.float32)
    model.initialise_from_data(y.mean(0), x, density)
    for s, layer in enumerate(model.source_layers):
        theta = layer.log_threshold.exp() if layer.log_threshold is not None else 0.0
        share_F = (model.pre_activations(s, x[:, s]) > theta).float().mean(dim=0)
        torch.testing.assert_close(share_F, torch.full((F,), density), rtol=0, atol=1.5e-3)
        torch.testing.assert_close(layer.b_dec.detach(), model.scale_targets(y)[:, s].mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"initial_density=1\.5 must lie between 0 and 1"):
        model.initialise_from_data(y.mean(0), x, 1.5)
    with pytest.raises(ValueError, match="needs rows of mlp_in"):
        model.initialise_from_data(y.mean(0), None, 0.1)


# --- inference and decoding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("span", ["cross_layer", "per_layer"])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batchtopk"])
def test_inference_is_jumprelu_in_raw_units(kind: str, span: str, skip: bool) -> None:
    """reconstruct against the definition spelled out densely, and against a walk layer by layer."""
    model, x, _ = make_model(kind=kind, span=span, skip=skip)
    model.threshold_LF.copy_(torch.rand(L, F))
    theta = torch.zeros(L, F) if kind == "relu" else model.threshold_LF
    if kind == "jumprelu":
        theta = torch.stack([layer.log_threshold for layer in model.source_layers]).exp()
    scaled = (x - model.input_shift_LD) * model.input_scale_LD
    y = torch.zeros_like(x)
    for s, layer in enumerate(model.source_layers):
        pre = scaled[:, s] @ layer.W_enc.T + layer.b_enc
        a = pre * (pre > theta[s])
        y[:, s] += layer.b_dec.detach() + (scaled[:, s] @ layer.W_skip.T.detach() if layer.W_skip is not None else 0)
        for j, t in enumerate(layer.targets):
            y[:, t] += (a @ layer.W_dec[:, j]).detach()
        torch.testing.assert_close(model.encode_layer(s, x[:, s]).to_dense(), a.detach(), rtol=1e-9, atol=1e-9)
    raw = y / model.target_scale_LD + model.target_shift_LD
    torch.testing.assert_close(model.reconstruct(x, chunk_tokens=7), raw, rtol=1e-9, atol=1e-9)
    walked = model.empty_output(B)
    for s in range(L):
        walked = model.decode_into(walked, s, model.encode_layer(s, x[:, s]), x[:, s]).detach()
    torch.testing.assert_close(model.unscale_targets(walked), raw, rtol=1e-9, atol=1e-9)


def test_the_training_rule_reconstructs_what_the_loss_saw() -> None:
    for kind in ("relu", "jumprelu", "topk", "batchtopk"):
        model, x, y = make_model(kind=kind)
        config = ActivationConfig(auxk_coefficient=0.0)
        output = compute_loss(model, x, y, context(model), activation=config)
        reconstructed = model.reconstruct(x, rule="training", chunk_tokens=5)
        torch.testing.assert_close(model.scale_targets(reconstructed), output.y_hat_BTD, rtol=1e-9, atol=1e-9)


def test_jumprelu_codes_hold_the_band_only_with_gradients() -> None:
    model, x, _ = make_model(kind="jumprelu", bandwidth=0.5)
    with_gradients = model.encode(x)
    with torch.no_grad():
        without = model.encode(x)
    for s in range(L):
        assert bool((with_gradients[s].values == 0).any())
        assert bool((without[s].values > 0).all())
        torch.testing.assert_close(with_gradients.to_dense(s).detach(), without.to_dense(s))
    torch.testing.assert_close(with_gradients.l0_L(), without.l0_L())


def test_encode_then_decode_carries_gradients() -> None:
    model, x, _ = make_model(skip=True)
    model.decode(model.encode(x), x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    with pytest.raises(ValueError, match="together with mlp_in"):
        model.decode(model.encode(x))


def test_thresholds_that_are_not_there() -> None:
    model, x, _ = make_model(kind="topk")
    with pytest.raises(ValueError, match="layer 0 has no threshold; the inference rule of topk wants"):
        model.reconstruct(x)
    model, x, _ = make_model(kind="batchtopk", score="decoder_norm")
    model.running_threshold_L.copy_(torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close(model.inference_threshold(2), 2.0 / model.decoder_norms()[2])


# --- statistics of training -------------------------------------------------------------------------------------------


def test_dead_feature_state_and_running_threshold() -> None:
    model = small(kind="batchtopk")
    fired = [torch.zeros(F, dtype=torch.bool) for _ in range(L)]
    fired[1][5] = True
    nan = float("nan")
    model.record_step(fired, 100, torch.tensor([1.0, 2.0, nan]), 0.9)
    model.record_step(fired, 50, torch.tensor([2.0, nan, 4.0]), 0.9)
    assert int(model.tokens_since_active_LF[1, 5]) == 0
    assert int(model.tokens_since_active_LF[1, 4]) == 150
    torch.testing.assert_close(model.running_threshold_L, torch.tensor([1.1, 2.0, 4.0]))


@pytest.mark.parametrize("scope", ["layer", "all_layers"])
@pytest.mark.parametrize("score", ["activation", "decoder_norm"])
def test_batch_threshold_is_the_smallest_selected_score(scope: str, score: str) -> None:
    model, x, y = make_model(kind="batchtopk", scope=scope, score=score)
    output = compute_loss(model, x, y, context(model), activation=ActivationConfig())
    norms = model.decoder_norms()
    smallest = []
    for s, codes in enumerate(output.codes):
        assert codes is not None
        score_N = codes.values * (norms[s][codes.feature_ids] if score == "decoder_norm" else 1)
        smallest.append(score_N.min())
    expected = torch.stack(smallest)
    expected = expected.min().expand(L) if scope == "all_layers" else expected
    assert output.batch_threshold_L is not None
    torch.testing.assert_close(output.batch_threshold_L, expected)


def test_batchtopk_per_token_is_topk() -> None:
    """The first share of a run may select per token; the threshold of such steps is the smallest score selected."""
    for scope in ("layer", "all_layers"):
        per_token = StepContext(k=K, penalty_scale=1.0, dead_after_tokens=10**9, per_token=True)
        batch, x, y = make_model(kind="batchtopk", scope=scope)
        token, _, _ = make_model(kind="topk", scope=scope)
        first = compute_loss(batch, x, y, per_token, activation=ActivationConfig())
        second = compute_loss(token, x, y, context(token), activation=ActivationConfig())
        assert torch.equal(first.total.detach(), second.total.detach())
        smallest_L = torch.stack([codes.values.min() for codes in second.codes if codes is not None])
        assert first.batch_threshold_L is not None
        assert torch.equal(first.batch_threshold_L, smallest_L if scope == "layer" else smallest_L.min().expand(L))


def test_k_of_the_step_and_k_equal_to_all_features() -> None:
    model, x, y = make_model(kind="topk")
    for k in (1, 3, F):
        step = StepContext(k=k, penalty_scale=1.0, dead_after_tokens=10**9)
        output = compute_loss(model, x, y, step, activation=ActivationConfig())
        positive = torch.stack([(model.pre_activations(s, x[:, s]) > 0).sum(1).clamp_max(k) for s in range(L)])
        torch.testing.assert_close(output.l0_L, positive.double().mean(dim=1))


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batchtopk"])
def test_all_pre_activations_negative(kind: str) -> None:
    """Nothing active: the loss is that of the biases, gradients are zero or finite, nothing crashes."""
    model, x, y = make_model(kind=kind)
    dead = kill(model)
    with torch.no_grad():
        for layer in model.source_layers:
            layer.b_enc.fill_(-100.0)
    config, _ = all_losses(model)
    output = compute_loss(model, x, y, context(model), activation=config)
    output.total.backward()
    bias = torch.stack([layer.b_dec.detach() for layer in model.source_layers])
    expected = (bias - model.scale_targets(y)).square().sum(dim=(1, 2)).mean()
    torch.testing.assert_close(output.mse, expected)
    assert not output.l0_L.any()
    assert not torch.stack(output.fired).any()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    assert bool(dead.any())
    if kind == "batchtopk":
        for scope in ("layer", "all_layers"):
            empty, _, _ = make_model(kind=kind, scope=scope)
            empty.load_state_dict(model.state_dict())
            nothing = compute_loss(empty, x, y, context(empty), activation=config).batch_threshold_L
            assert nothing is not None
            assert bool(nothing.isnan().all())


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batchtopk"])
def test_a_broken_weight_shows_in_the_loss(kind: str) -> None:
    model, x, y = make_model(kind=kind)
    with torch.no_grad():
        model.source_layers[1].W_enc[3, 2] = torch.nan
    output = compute_loss(model, x, y, context(model), activation=ActivationConfig())
    assert not bool(output.total.isfinite())
    assert bool(output.mse_L[0].isfinite())
    assert not bool(output.mse_L[1].isfinite())


@pytest.mark.parametrize("scope", ["layer", "all_layers"])
@pytest.mark.parametrize("score", ["activation", "decoder_norm"])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_a_broken_decoder_shows_in_the_loss(kind: str, score: str, scope: str) -> None:
    """With score=decoder_norm too, where a norm that hid the NaN would keep the feature from being selected."""
    model, x, y = make_model(kind=kind, score=score, scope=scope)
    with torch.no_grad():
        model.source_layers[1].W_enc[3] *= 20
        model.source_layers[1].W_dec[3, 0, 2] = torch.nan
    output = compute_loss(model, x, y, context(model), activation=ActivationConfig())
    assert not bool(output.total.isfinite())
    assert bool(output.mse_L[0].isfinite())
    assert not bool(output.mse_L[1].isfinite())
    assert bool(model.decoder_norm(1)[3].isnan())


@pytest.mark.parametrize("running", [0.0, 0.7])
def test_dead_features_without_a_decoder_do_not_break_the_pre_activation_loss(running: float) -> None:
    model, x, y = make_model(kind="batchtopk", score="decoder_norm")
    dead = kill(model)
    model.running_threshold_L.copy_(torch.tensor([running, running, torch.nan]))
    with torch.no_grad():
        model.source_layers[0].W_dec[1] = 0.0
    assert bool(dead[0, 1])
    config = ActivationConfig(auxk_coefficient=0.0, pre_act_lambda=0.05)
    output = compute_loss(model, x, y, context(model), activation=config)
    output.total.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    # The layer whose running threshold is not known yet has no term.
    expected = x.new_zeros(())
    for s in range(2):
        norm_F = model.decoder_norms()[s]
        for f in dead[s].nonzero()[:, 0].tolist():
            if norm_F[f] > 0:
                pre_B = model.pre_activations(s, x[:, s])[:, f]
                expected = expected + (torch.relu(running / norm_F[f] - pre_B) * norm_F[f]).sum()
    torch.testing.assert_close(output.pre_act, 0.05 * expected / B)
    # A feature without a decoder never fires under the inference rule.
    assert float(model.running_threshold(0)[1]) == torch.finfo(torch.float64).max
    assert bool(model.running_threshold(2).isnan().all())


def test_zero_decoders_have_finite_gradients() -> None:
    """decoder_init=zeros: norms are 0 at the start, and their gradient must not be 0 / 0."""
    for kind in ("relu", "jumprelu"):
        model, x, y = make_model(kind=kind)
        kill(model)
        with torch.no_grad():
            for layer in model.source_layers:
                layer.W_dec.zero_()
        config, _ = all_losses(model)
        compute_loss(model, x, y, context(model), activation=config).total.backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_named() -> None:
    model, x, y = make_model(kind="topk")
    for arguments, message in (
        ({"tanh_lambda": 0.1}, r"tanh_lambda=0\.1 is for relu and jumprelu, not topk"),
        ({"l0_lambda": 0.1, "l0_target": 1.0}, r"l0_lambda=0\.1 is for jumprelu, not topk"),
        ({"pre_act_lambda": 0.1}, r"pre_act_lambda=0\.1 needs a threshold, which topk has not"),
    ):
        with pytest.raises(ValueError, match=message):
            compute_loss(model, x, y, context(model), activation=ActivationConfig(**arguments))
    jump, _, _ = make_model(kind="jumprelu")
    with pytest.raises(ValueError, match=r"l0_target=0\.0 must be above 0"):
        compute_loss(jump, x, y, context(jump), activation=ActivationConfig(l0_lambda=1.0))
    with pytest.raises(ValueError, match=r"mlp_in has shape \(41, 2, 10\)"):
        model.encode(x[:, :2])
    with pytest.raises(ValueError, match="mlp_in requires grad"):
        model.encode(x.clone().requires_grad_())
    with pytest.raises(ValueError, match="rule=greedy is unknown"):
        model.encode(x, rule="greedy")
    with pytest.raises(ValueError, match="rule=greedy is unknown"):
        model.reconstruct(x, rule="greedy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": F + 1}, f"k={F + 1} must lie between 1 and n_features={F}"),
        ({"n_features": 0}, "n_features=0; it must be at least 1"),
        ({"span": "diagonal"}, "span=diagonal is unknown; use one of cross_layer, per_layer"),
        ({"kind": "jumprelu", "bandwidth": 0.0}, r"bandwidth=0\.0: jumprelu wants both above 0"),
    ],
)
def test_specifications_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_every_parameter_says_how_it_may_be_split() -> None:
    model = small(kind="jumprelu", skip=True)
    for name, parameter in model.named_parameters():
        partition = parameter.partition
        if partition.feature_dim is not None:
            assert parameter.shape[partition.feature_dim] == F, name
        if partition.column_dim is not None:
            assert parameter.shape[partition.column_dim] == D, name
        assert (partition.feature_dim, partition.column_dim) != (None, None), name


@pytest.mark.parametrize("score", ["activation", "decoder_norm"])
@pytest.mark.parametrize("scope", ["layer", "all_layers"])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_ties_go_to_the_smallest_token_layer_feature(kind: str, scope: str, score: str) -> None:
    """Pre-activations of 0, 1 and 2 only, and equal decoder norms: nearly everything is tied."""
    model, _, _ = make_model(kind=kind, scope=scope, score=score, n_features=13, k=4, n_tokens=6)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, (6, L, D), generator=g).double()
    with torch.no_grad():
        model.set_scaling(torch.zeros(L, D), torch.ones(L, D), torch.zeros(L, D), torch.ones(L, D))
        for layer in model.source_layers:
            layer.W_enc.zero_()
            layer.W_enc[torch.arange(13), torch.arange(13) % D] = 1.0
            layer.b_enc.zero_()
            layer.W_dec.zero_()
            layer.W_dec[:, 0, 0] = 1.0
    pre = torch.stack([model.pre_activations(s, x[:, s]) for s in range(L)], dim=1)
    settings = Settings(kind=kind, scope=scope, score=score, k=4)
    wanted = selected(pre, torch.ones(L, 13).double(), settings) * pre
    features = model.encode(x)
    for s in range(L):
        assert torch.equal(features.to_dense(s).detach(), wanted[:, s])


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_streaming_over_layers_of_unlike_scale(kind: str) -> None:
    """Few tokens and features, each layer of another scale: what a late layer brings must still displace early ones."""
    for seed in range(40):
        model, x, _ = make_model(seed, kind=kind, scope="all_layers", n_layers=4, n_features=6, k=2, n_tokens=3)
        scales = torch.randn(4, generator=torch.Generator().manual_seed(seed)).exp()
        with torch.no_grad():
            for layer, scale in zip(model.source_layers, scales, strict=True):
                layer.W_enc.mul_(scale)
        pre = torch.stack([model.pre_activations(s, x[:, s]) for s in range(4)], dim=1)
        wanted = selected(pre, torch.ones(4, 6).double(), Settings(kind=kind, scope="all_layers", k=2)) * pre
        features = model.encode(x)
        for s in range(4):
            torch.testing.assert_close(features.to_dense(s).detach(), wanted[:, s], rtol=1e-12, atol=0)
