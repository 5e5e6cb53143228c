"""The steps that the benchmarks time: shapes, batches, and a mode's whole training step through the real engine.

A step does what `trainer.loop` does for one: loss and gradients, exact norm, check that it is finite, clip, Adam,
dead-feature state. Learning rate 1e-8: Adam does its whole work, and the situation stays that of the first step, so
that the k-th step of one mode compares with the k-th of another, and JumpReLU keeps the L0 that it was given. It runs
in the mode in which training runs (trainer.reproducibility.deterministic); the dense step without.

Legend: B tokens, L layers, D d_model, F features of a layer, K active features per token and layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from activation_store.batch import ActivationBatch
from benchmarks.dense_step import DenseStep
from benchmarks.measure import Step
from benchmarks.models import new_model
from trainer.config import (
    ActivationConfig,
    ActivationKind,
    KernelBackend,
    KernelsConfig,
    OptimConfig,
    Precision,
    RunConfig,
    SelectionScope,
    TrainConfig,
)
from trainer.kernels.dispatch import kernels
from trainer.loss import StepContext
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.spec import ModelSpec
from trainer.parallel.plain import PlainEngine
from trainer.reproducibility import deterministic

LR = 1e-8
# Of the recipe's JumpReLU (conf/activation/jumprelu.yaml).
RECIPE_BANDWIDTH, RECIPE_TANH_LAMBDA = 1.0, 1e-3


class Shape(NamedTuple):
    """L, d, F, B, K."""

    n_layers: int
    d_model: int
    n_features: int
    n_tokens: int
    k: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From `L,d,F,B,K`."""
        try:
            return cls(*map(int, text.split(",")))
        except (TypeError, ValueError) as error:
            raise SystemExit(f"--shape={text}: it wants five numbers L,d,F,B,K, such as 6,256,4096,1024,16") from error

    def __str__(self) -> str:
        return ", ".join(f"{name} = {size}" for name, size in zip("LdFBK", self, strict=True))

    @property
    def words(self) -> str:
        """As `parse` reads it."""
        return ",".join(map(str, self))

    @property
    def parameters(self) -> int:
        """Parameters of the transcoder."""
        n_layers, d_model, n_features = self[:3]
        decoders = n_layers * (n_layers + 1) // 2
        return n_features * d_model * (n_layers + decoders) + n_layers * (n_features + d_model)

    @property
    def state_mib(self) -> float:
        """Parameters and Adam's two moments in fp32."""
        return self.parameters * 12 / 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """One way to do the step. `backend` is that of the kernels, or `dense` for benchmarks.dense_step.

    bandwidth: jumprelu, eps; tanh: with the tanh penalty of the recipe.
    """

    name: str
    backend: str
    fused: bool = False
    bf16: bool = False
    kind: str = "topk"
    scope: str = "layer"
    bandwidth: float = RECIPE_BANDWIDTH
    tanh: bool = False


# The recipe's mode of a backend clips by the exact norm and then updates; `fused` updates in the backward pass.
MODES = {
    mode.name: mode
    for mode in (
        Mode(name="dense", backend="dense"),
        Mode(name="dense bf16", backend="dense", bf16=True),
        Mode(name="reference", backend="reference"),
        Mode(name="cpu", backend="cpu"),
        Mode(name="cpu fused", backend="cpu", fused=True),
        Mode(name="triton", backend="triton"),
        Mode(name="triton fused", backend="triton", fused=True),
        Mode(name="triton bf16", backend="triton", bf16=True),
        Mode(name="triton bf16 fused", backend="triton", bf16=True, fused=True),
    )
}


def modes_for(device: torch.device) -> list[Mode]:
    """The dense step first, then what runs on the device."""
    wanted = {"cpu": ("reference", "cpu"), "cuda": ("triton",)}.get(device.type, ("reference",))
    there = {"dense", *(backend for backend in wanted if runs(backend, device))}
    return [mode for mode in MODES.values() if mode.backend in there and (not mode.bf16 or device.type == "cuda")]


def runs(backend: str, device: torch.device) -> bool:
    """Whether the kernels of that backend run on the device here."""
    try:
        kernels(backend, device)
    except ValueError:
        return False
    return True


def random_batch(shape: Shape, device: torch.device) -> ActivationBatch:
    """Normal inputs and targets of mean square 1. No feature is hot: all fire on about as many tokens."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.n_tokens, shape.n_layers, shape.d_model)
    x_BLD, y_BLD = (torch.randn(size, generator=generator).to(device) for _ in range(2))
    return ActivationBatch(x_BLD, y_BLD, torch.arange(shape.n_tokens), 0)


def store_batch(path: str, shape: Shape, device: torch.device) -> tuple[Shape, ActivationBatch]:
    """The first shuffled rows of a store, scaled as the default config does; L and d become those of the store."""
    from activation_store.shuffle import ShuffledBatches
    from activation_store.store import ActivationStore
    from trainer.model.scaling import shift_and_scale

    store = ActivationStore.open(path)
    statistics = store.statistics()
    with ShuffledBatches(store, batch_size_tokens=shape.n_tokens) as batches:
        raw = next(batches)
    sides = (
        (raw.mlp_in, *shift_and_scale("dimension", statistics.in_mean_LD, statistics.in_mean_square_LD)),
        (raw.mlp_out, *shift_and_scale("layer", statistics.out_mean_LD, statistics.out_mean_square_LD)),
    )
    x_BLD, y_BLD = (((rows - shift) * scale).to(device) for rows, shift, scale in sides)
    shape = shape._replace(n_layers=store.n_layers, d_model=store.d_model)
    return shape, replace(raw, mlp_in=x_BLD, mlp_out=y_BLD)


def model_spec(shape: Shape, mode: Mode) -> ModelSpec:
    """The transcoder of a mode; without k where it has no meaning."""
    return ModelSpec(
        n_layers=shape.n_layers,
        d_model=shape.d_model,
        n_features=shape.n_features,
        kind=mode.kind,
        k=shape.k if mode.kind != "jumprelu" else 1,
        scope=mode.scope,
        bandwidth=mode.bandwidth,
    )


def run_config(shape: Shape, mode: Mode) -> RunConfig:
    """The config of a mode's engine."""
    activation = ActivationConfig(
        kind=ActivationKind(mode.kind),
        k=shape.k,
        scope=SelectionScope(mode.scope),
        bandwidth=mode.bandwidth,
        tanh_lambda=RECIPE_TANH_LAMBDA if mode.tanh else 0.0,
        auxk_coefficient=0.0,
    )
    return RunConfig(
        activation=activation,
        optim=OptimConfig(lr=LR, clip_norm=0.0 if mode.fused else 1.0, fused_update=mode.fused),
        train=TrainConfig(batch_size_tokens=shape.n_tokens, precision=Precision.bf16 if mode.bf16 else Precision.fp32),
        kernels=KernelsConfig(backend=KernelBackend(mode.backend)),
    )


def build_step(
    mode: Mode,
    shape: Shape,
    batch: ActivationBatch,
    *,
    make_model: Callable[..., CrossLayerTranscoder] = CrossLayerTranscoder,
    make_engine: Callable[..., Any] = PlainEngine,
) -> Step:
    """The mode's training step of this batch; a call returns the loss."""
    device = batch.mlp_in.device
    if mode.backend == "dense":
        return DenseStep(model_spec(shape, mode), batch, lr=LR, device=device, bf16=mode.bf16)
    config = run_config(shape, mode)
    model = new_model(model_spec(shape, mode), device, backend=mode.backend, make_model=make_model)
    if mode.kind == "jumprelu":
        for layer, theta in zip(model.source_layers, band(shape, batch).thetas, strict=True):
            layer.log_threshold.data.fill_(math.log(theta))  # type: ignore[union-attr]
    engine = make_engine(config, model)
    context = StepContext(k=shape.k, penalty_scale=1.0, dead_after_tokens=2**62, lr=LR)

    def step() -> float:
        with deterministic(device):
            loss = engine.backward([batch], context)
            norm = float(engine.gradient_norm())
            if not math.isfinite(norm):
                raise RuntimeError(f"{mode.name}: the gradient's norm is {norm}")
            engine.update(norm)
            model.record_step(loss.fired, shape.n_tokens, loss.batch_threshold_L)
            return float(loss.total)

    return step


class Band(NamedTuple):
    """JumpReLU at the L0 of topk: theta of each layer, the widest eps whose band holds at most K entries per token that
    are not active, in every layer, and how many it holds on average over layers."""

    thetas: list[float]
    bandwidth: float
    further: float


@torch.no_grad()
def band(shape: Shape, batch: ActivationBatch) -> Band:
    """From the pre-activations of the batch under the initial encoder."""
    model = new_model(model_spec(shape, MODES["dense"]), batch.mlp_in.device, backend="reference")
    n = shape.k * shape.n_tokens
    thetas, widths = [], []
    for s in range(shape.n_layers):
        pre_N = model.pre_activations(s, batch.mlp_in[:, s]).view(-1)
        best = torch.topk(pre_N, min(2 * n + 1, pre_N.numel())).values
        # Between two neighbours, so that exactly n and 2 n entries lie above.
        theta = float(best[n - 1 : n + 1].double().mean())
        thetas.append(theta)
        widths.append(2 * (theta - float(best[2 * n - 1 :].double().mean())))
    bandwidth = min(widths)
    further = [_further(model.pre_activations(s, batch.mlp_in[:, s]), thetas[s], bandwidth) for s in range(len(thetas))]
    return Band(thetas, bandwidth, sum(further) / len(further))


@torch.no_grad()
def band_share(shape: Shape, batch: ActivationBatch, thetas: list[float], bandwidth: float) -> float:
    """Share of all pre-activations with |pre - theta| < bandwidth / 2, under the initial encoder."""
    model = new_model(model_spec(shape, MODES["dense"]), batch.mlp_in.device, backend="reference")
    shares = [
        (model.pre_activations(s, batch.mlp_in[:, s]) - theta).abs_() < bandwidth / 2 for s, theta in enumerate(thetas)
    ]
    return sum(float(inside.float().mean()) for inside in shares) / len(shares)


def _further(pre_BF: Tensor, theta: float, bandwidth: float) -> float:
    """Entries per token in the band that are not active."""
    inside = (pre_BF <= theta) & (pre_BF - theta > -bandwidth / 2)
    return float(inside.sum()) / pre_BF.shape[0]
