"""Small transcoders on odd sizes for the tests of the model."""

import contextlib
import itertools
from typing import Any

import torch
from torch import Tensor

from tests.model.dense_reference import Settings
from trainer.config import ActivationConfig, ActivationKind
from trainer.kernels.dispatch import kernels
from trainer.loss import StepContext
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.spec import ModelSpec

B, L, D, F, K = 41, 3, 10, 127, 7

# Every activation x scope x score x span x skip (relu and jumprelu have no scope and no score).
CASES = [
    {"kind": kind, "scope": scope, "score": score, "span": span, "skip": skip}
    for kind, scope, score, span, skip in itertools.product(
        ("relu", "jumprelu", "topk", "batchtopk"),
        ("layer", "all_layers"),
        ("activation", "decoder_norm"),
        ("cross_layer", "per_layer"),
        (False, True),
    )
    if "topk" in kind or (scope, score) == ("layer", "activation")
]


def available_backends() -> list[str]:
    """Backends that run on this machine's CPU."""
    names = ["reference"]
    with contextlib.suppress(ValueError):
        names.append(kernels("cpu").name)
    return names


def case_name(case: dict[str, Any]) -> str:
    """A readable test id."""
    return "-".join([case["kind"], case["scope"], case["score"], case["span"], "skip" if case["skip"] else "noskip"])


def make_model(
    seed: int = 0, *, n_tokens: int = B, dtype: torch.dtype = torch.float64, **spec: Any
) -> tuple[CrossLayerTranscoder, Tensor, Tensor]:
    """A model with random parameters everywhere (no zeros that hide a mistake), and raw inputs and targets."""
    shape = {"n_layers": L, "d_model": D, "n_features": F, "k": K, "threshold_init": 0.3, **spec}
    model = CrossLayerTranscoder(ModelSpec(**shape), seed=seed).to(dtype)
    n_layers, d_model = model.spec.n_layers, model.spec.d_model
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64).to(dtype)
            parameter.add_(noise * (0.3 if "W_" in name or "b_enc" in name else 0.2))
        shift = torch.randn(4, n_layers, d_model, generator=g, dtype=torch.float64)
        model.set_scaling(shift[0], shift[1].abs() + 0.5, shift[2], shift[3].abs() + 0.5)
    x = torch.randn(n_tokens, n_layers, d_model, generator=g, dtype=torch.float64).to(dtype)
    y = torch.randn(n_tokens, n_layers, d_model, generator=g, dtype=torch.float64).to(dtype)
    return model, x, y


def kill(model: CrossLayerTranscoder, every: int = 5, tokens: int = 1000) -> Tensor:
    """Mark every fifth feature (and no feature of the last layer but one) as dead; (L, F) bool."""
    dead = torch.zeros_like(model.tokens_since_active_LF, dtype=torch.bool)
    dead[:, 1::every] = True
    dead[-1, 2:] = False
    model.tokens_since_active_LF.copy_(dead * tokens)
    return dead


def all_losses(model: CrossLayerTranscoder) -> tuple[ActivationConfig, Settings]:
    """Every loss that the activation can have, for trainer and reference."""
    kind = model.spec.kind
    penalised = kind in {"relu", "jumprelu"}
    config = ActivationConfig(
        kind=ActivationKind(kind),
        k=model.spec.k,
        tanh_lambda=0.3 if penalised else 0.0,
        tanh_c=1.7,
        l0_lambda=0.02 if kind == "jumprelu" else 0.0,
        l0_target=11.0,
        auxk_coefficient=0.7,
        auxk_k=4,
        pre_act_lambda=0.0 if kind == "topk" else 0.05,
    )
    settings = Settings(
        kind=kind,
        scope=model.spec.scope,
        score=model.spec.score,
        per_layer=model.spec.span == "per_layer",
        k=model.spec.k,
        bandwidth=model.spec.bandwidth,
        tanh_lambda=config.tanh_lambda,
        tanh_c=config.tanh_c,
        l0_lambda=config.l0_lambda,
        l0_target=config.l0_target,
        penalty_scale=0.6,
        auxk_coefficient=config.auxk_coefficient,
        auxk_k=config.auxk_k,
        pre_act_lambda=config.pre_act_lambda,
    )
    return config, settings


def context(model: CrossLayerTranscoder) -> StepContext:
    """The step that `all_losses` describes."""
    return StepContext(k=model.spec.k, penalty_scale=0.6, dead_after_tokens=1000)


def scaled(model: CrossLayerTranscoder, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets in scaled units, by the definition."""
    return (x - model.input_shift_LD) * model.input_scale_LD, (y - model.target_shift_LD) * model.target_scale_LD


def leaves(model: CrossLayerTranscoder) -> dict[str, Tensor]:
    """Copies of the parameters as float64 leaves for the reference."""
    return {name: p.detach().double().clone().requires_grad_() for name, p in model.named_parameters()}
