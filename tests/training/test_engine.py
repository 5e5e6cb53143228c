"""The engine and the optimizer against torch's own Adam and float64 norms."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from activation_store.batch import ActivationBatch
from activation_store.shuffle import ShuffledBatches
from activation_store.store import ActivationStore
from tests.training.runs import tiny_run
from trainer.build import build_model
from trainer.config import OptimConfig, RunConfig
from trainer.loss import StepContext
from trainer.model.clt import CrossLayerTranscoder
from trainer.optimizer import NamedAdam, gradient_norm
from trainer.parallel.engine import build_engine

CONTEXT = StepContext(k=2, penalty_scale=1.0, dead_after_tokens=10**9)


def _model(config: RunConfig) -> CrossLayerTranscoder:
    statistics = ActivationStore.open(config.store.path).statistics()
    return build_model(config, statistics, device=torch.device("cpu"))


def _batch(config: RunConfig) -> ActivationBatch:
    store = ActivationStore.open(config.store.path)
    with ShuffledBatches(store, batch_size_tokens=96, seed=3, pool_rows=256) as batches:
        return next(batches)


def _parts(batch: ActivationBatch, tokens: int | None) -> list[ActivationBatch]:
    """Microbatches of so many tokens (None: one)."""
    return [
        replace(batch, mlp_in=batch.mlp_in[rows], mlp_out=batch.mlp_out[rows], rows=batch.rows[rows])
        for rows in (slice(start, start + (tokens or 96)) for start in range(0, 96, tokens or 96))
    ]


def _parameters(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (5, 7), "rows": (3, 4, 5), "vector": (11,)}
    return {n: nn.Parameter(torch.randn(*s, generator=generator, dtype=dtype)) for n, s in shapes.items()}


@pytest.mark.parametrize("clip", [0.0, 0.7, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_those_of_torchs_adam_after_torchs_clipping(clip: float, dtype: torch.dtype) -> None:
    config = OptimConfig(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    ours, theirs = _parameters(1, dtype), _parameters(1, dtype)
    adam = NamedAdam(ours, config)
    reference = torch.optim.Adam(theirs.values(), lr=0.3, betas=(0.8, 0.9), eps=1e-6, fused=False, foreach=False)
    for step in range(4):
        gradients = _parameters(10 + step, dtype)
        for name, gradient in gradients.items():
            if not (name == "vector" and step == 2):  # a gradient that is missing counts as zeros
                ours[name].grad = gradient.detach().clone()
            theirs[name].grad = gradient.detach().clone() * float(not (name == "vector" and step == 2))
        norm = float(gradient_norm(ours))
        if clip:
            expected = torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
            assert norm == pytest.approx(float(expected), rel=1e-6)
        adam.step(0.3, divide_gradients_by=norm / clip if clip and norm > clip else 1.0)
        adam.zero_grad()
        reference.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=3e-6, atol=3e-6)
    assert float(adam.tensors()["matrix.step"]) == 4


def test_the_state_can_be_put_into_a_new_optimizer() -> None:
    config = OptimConfig()
    first = NamedAdam(_parameters(1), config)
    for step in range(3):
        for name, gradient in _parameters(20 + step).items():
            first.parameters[name].grad = gradient.detach()
        first.step(0.1)
    second = NamedAdam({n: nn.Parameter(p.detach().clone()) for n, p in first.parameters.items()}, config)
    for name, tensor in second.tensors().items():
        tensor.copy_(first.tensors()[name])
    for optimizer in (first, second):
        for name, gradient in _parameters(30).items():
            optimizer.parameters[name].grad = gradient.detach().clone()
        optimizer.step(0.1)
    assert all(torch.equal(first.parameters[name], second.parameters[name]) for name in first.parameters)


def test_the_norm_of_many_entries_is_exact() -> None:
    # A float32 sum over the whole tensor is off by some 1e-4 here.
    parameter = nn.Parameter(torch.zeros(4_000, 1_000))
    parameter.grad = torch.full_like(parameter, 1e-3) + torch.rand(4_000, 1_000) * 1e-3
    exact = float(parameter.grad.double().square().sum().sqrt())
    assert float(gradient_norm({"p": parameter})) == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_microbatches_add_up_to_the_batch(tiny_store: RunConfig, tmp_path: Path, kind: str) -> None:
    config = tiny_run(tiny_store, tmp_path, {"activation.kind": kind, "model.initial_density": None})
    config.activation = replace(config.activation, auxk_coefficient=0.0)
    batch = _batch(config)
    gradients: list[dict[str, Tensor]] = []
    losses = []
    for microbatch in (None, 48, 32):
        model = _model(config)
        engine = build_engine(config, model)
        # Twice: what the first call left in the gradients' memory must not show.
        engine.backward(_parts(batch, microbatch), CONTEXT)
        losses.append(engine.backward(_parts(batch, microbatch), CONTEXT, residual=True))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert gradient.keys() == gradients[0].keys()
        for name, value in gradient.items():
            torch.testing.assert_close(value, gradients[0][name], rtol=1e-4, atol=1e-5)
        for name in ("total", "mse", "mse_L", "l0_L", "residual_L"):
            torch.testing.assert_close(getattr(loss, name), getattr(losses[0], name), rtol=1e-5, atol=1e-6)
        assert all(a.equal(b) for a, b in zip(loss.fired, losses[0].fired, strict=True))


def test_an_update_clips_by_the_global_norm(tiny_store: RunConfig, tmp_path: Path) -> None:
    config = tiny_run(tiny_store, tmp_path, {"optim.clip_norm": 0.5})
    model = _model(config)
    engine = build_engine(config, model)
    engine.backward([_batch(config)], CONTEXT)
    gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert float(engine.gradient_norm()) == pytest.approx(float(norm), rel=1e-6)
    assert norm > 0.5
    engine.update(float(engine.gradient_norm()))
    # After one step, Adam's first moment is (1 - beta1) times the clipped gradient.
    for name, gradient in gradients.items():
        moment = engine.optimizer_tensors()[f"{name}.exp_avg"].double()
        torch.testing.assert_close(moment, 0.1 * gradient * 0.5 / norm, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu"])
def test_updates_inside_the_backward_pass_are_the_same_updates(
    tiny_store: RunConfig, tmp_path: Path, kind: str
) -> None:
    """Twelve steps, the last of them with dead features, whose second gradient the fused update must not miss."""
    weights: list[dict[str, Tensor]] = []
    norms: list[list[float]] = []
    for fused in (False, True):
        words = {"optim.clip_norm": 0.0, "optim.fused_update": fused, "activation.kind": kind, "activation.auxk_k": 3}
        words["kernels.dense_above_density"] = 1.0
        config = tiny_run(tiny_store, tmp_path, words)
        model = _model(config)
        engine = build_engine(config, model)
        batch = _batch(config)
        norms.append([])
        for step in range(12):
            dead_after = 96 if step == 8 else 10**9
            engine.backward([batch], replace(CONTEXT, lr=1e-3, dead_after_tokens=dead_after))
            written = [name for name, p in model.named_parameters() if p.grad is not None and p.dim() > 1]
            assert bool(written) == (not fused or step == 8)
            norms[-1].append(float(engine.gradient_norm()))
            engine.update(norms[-1][-1])
            model.record_step([torch.zeros_like(t, dtype=torch.bool) for t in model.tokens_since_active_LF], 96)
        weights.append({**model.state_dict(), **engine.optimizer_tensors()})
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    for name, wanted in weights[0].items():
        # Adam divides by the root of a mean square: where gradients are tiny, rounding is not.
        torch.testing.assert_close(
            weights[1][name], wanted, rtol=1e-3, atol=2e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_mixed_precision_computes_in_bf16_and_keeps_float32(tiny_store: RunConfig, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        config = tiny_run(tiny_store, tmp_path, {"train.precision": precision})
        model = _model(config)
        losses[precision] = float(build_engine(config, model).backward([_batch(config)], CONTEXT).mse)
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert losses["fp32"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_a_microbatch_without_a_selection_leaves_the_threshold_to_the_others(
    tiny_store: RunConfig, tmp_path: Path
) -> None:
    config = tiny_run(tiny_store, tmp_path, {"activation.kind": "batchtopk"})
    model, batch = _model(config), _batch(config)
    engine = build_engine(config, model)
    losses = []
    for broken in (False, True):
        if broken:
            # Scaled inputs that no encoder row has a positive product with, in the second microbatch.
            with torch.no_grad():
                for layer in model.source_layers:
                    layer.W_enc.abs_()
                    layer.b_enc.fill_(-1e-3)
            model.input_shift_LD.zero_()
            batch.mlp_in.abs_()
            batch.mlp_in[32:64] *= -1
        losses.append(engine.backward(_parts(batch, 32), CONTEXT))
    assert losses[0].batch_threshold_L is not None
    assert bool(losses[0].batch_threshold_L.isfinite().all())
    mixed_L = losses[1].batch_threshold_L
    assert mixed_L is not None
    first, _, third = _parts(batch, 32)
    single = [engine.backward([part], CONTEXT).batch_threshold_L for part in (first, third)]
    assert single[0] is not None
    assert single[1] is not None
    torch.testing.assert_close(mixed_L, (single[0] + single[1]) / 2)
