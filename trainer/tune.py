"""Measures on this machine from which density on the dense path of a layer is faster: `layerloom tune`.

One source layer of the configured width and of the mean span stands for all: its forward and backward after selection
(which both paths share) are timed on random entries, sparse and dense in turn, at densities that double until dense
wins. Between the last two the logarithm of the ratio is interpolated.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from trainer.kernels.dispatch import Kernels
from trainer.kernels.encode_topk import Selection
from trainer.model.break_even import mean_span
from trainer.model.collectives import IdentityCollectives
from trainer.model.features import LayerCodes
from trainer.model.initialise import initialise_layer
from trainer.model.layer import SourceLayer
from trainer.model.runtime import FusedUpdates, GradientBuffers, Runtime
from trainer.model.spec import ModelSpec
from trainer.reproducibility import deterministic

DENSITIES = tuple(0.001 * 2**i for i in range(10))
# Timed pairs at each density, after one that is not counted.
_PAIRS = 3
# A pass longer than this is tried with half as many tokens, down to a least number.
_SLOW_PASS_SECONDS = 0.5
_MIN_TOKENS = 256
_CHUNK_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of one layer's forward and backward at one density."""

    density: float
    sparse_s: float
    dense_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """tokens: of a pass. density: the break-even; 1 if dense never won. timings: in order of densities."""

    tokens: int
    density: float
    timings: list[Timing]


def measure(
    spec: ModelSpec,
    *,
    n_tokens: int,
    kernels: Kernels,
    device: torch.device,
    compute_dtype: torch.dtype,
    seconds: float,
    tell: Callable[[Timing], None] | None = None,
) -> Measured:
    """The break-even of models of this shape with microbatches of `n_tokens`, in about `seconds`.

    `tell` hears of each density as it is done.
    """
    bench = _Bench(spec, kernels, device, compute_dtype)
    deadline = time.monotonic() + seconds
    bench.set_tokens(n_tokens)
    while bench.n_tokens > _MIN_TOKENS and bench.seconds_of(bench.dense, DENSITIES[0]) > _SLOW_PASS_SECONDS:
        bench.set_tokens(max(_MIN_TOKENS, bench.n_tokens // 2))
    timings: list[Timing] = []
    for density in DENSITIES:
        timings.append(bench.time(density))
        if tell is not None:
            tell(timings[-1])
        if timings[-1].sparse_s >= timings[-1].dense_s or time.monotonic() > deadline:
            break
    return Measured(bench.n_tokens, break_even(timings), timings)


def break_even(timings: list[Timing]) -> float:
    """Where sparse and dense take equally long.

    Below all densities: the first. Not reached: by the last ratio, for sparse costs grow with density at most in
    proportion; 1 at most, which means never.
    """
    last = timings[-1]
    ratio = last.sparse_s / last.dense_s
    if ratio < 1:
        return min(1.0, last.density / ratio)
    if len(timings) == 1:
        return last.density
    before = timings[-2]
    below, above = math.log(before.sparse_s / before.dense_s), math.log(ratio)
    share = -below / (above - below)
    return before.density * math.exp(share * math.log(last.density / before.density))


class _Bench:
    """A source layer with its input, and both ways to run it."""

    def __init__(self, spec: ModelSpec, kernels: Kernels, device: torch.device, compute_dtype: torch.dtype) -> None:
        # Every span is that of a source in the middle, so that one layer stands for the mean.
        spec = replace(spec, n_layers=max(1, round(mean_span(spec))), span="cross_layer", skip=False)
        self.spec, self.device = spec, device
        self.runtime = Runtime(kernels, GradientBuffers(enabled=True), FusedUpdates(), compute_dtype)
        self.generator = torch.Generator().manual_seed(0)
        self.layer = SourceLayer(spec, 0)
        initialise_layer(self.layer, spec, self.generator)
        self.layer.to(device)
        self.n_tokens = 0

    def set_tokens(self, n_tokens: int) -> None:
        """Makes input and gradient for passes of so many tokens."""
        self.n_tokens = n_tokens
        self.x_BD = torch.randn(n_tokens, self.spec.d_model, generator=self.generator).to(self.device)
        shape = (n_tokens, self.spec.n_layers, self.spec.d_model)
        self.grad_BTD = torch.randn(shape, generator=self.generator).to(self.device)

    def time(self, density: float) -> Timing:
        """Medians of pairs that alternate, so that a busy machine disturbs both alike."""
        selection = self._selection(density)
        pairs = [
            (self._seconds(self.sparse, selection), self._seconds(self.dense, selection)) for _ in range(1 + _PAIRS)
        ]
        return Timing(density, median(sparse for sparse, _ in pairs[1:]), median(dense for _, dense in pairs[1:]))

    def seconds_of(self, run: Callable[[Selection], Tensor], density: float) -> float:
        """Seconds of a second pass."""
        selection = self._selection(density)
        self._seconds(run, selection)
        return self._seconds(run, selection)

    def sparse(self, selection: Selection) -> Tensor:
        """Gathers of what is selected."""
        codes, _ = self.layer.attach(selection, self.x_BD, self.runtime)
        return self.layer.decode_into(torch.zeros_like(self.grad_BTD), codes, self.x_BD, self.runtime)

    def dense(self, selection: Selection) -> Tensor:
        """The dense path of this kind of activation."""
        y_BTD = torch.zeros_like(self.grad_BTD)
        if self.spec.is_topk:
            codes = LayerCodes(*selection, self.spec.n_features)
            return self.layer.dense_codes_into(y_BTD, codes, self.x_BD, self.runtime)
        return self.layer.dense_into(y_BTD, self.x_BD, None, 1.0, IdentityCollectives(), self.runtime).y_BTD

    def _seconds(self, run: Callable[[Selection], Tensor], selection: Selection) -> float:
        self.layer.zero_grad(set_to_none=True)
        self._wait()
        start = time.perf_counter()
        with deterministic(self.device):
            run(selection).backward(self.grad_BTD)  # type: ignore[no-untyped-call]
            self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _selection(self, density: float) -> Selection:
        """Random entries, each there with this probability, and positive values."""
        counts, ids = [], []
        for start in range(0, self.n_tokens, _CHUNK_TOKENS):
            n_rows = min(_CHUNK_TOKENS, self.n_tokens - start)
            chosen_bF = torch.rand(n_rows, self.spec.n_features, device=self.device) < density
            counts.append(chosen_bF.sum(dim=1))
            ids.append(chosen_bF.nonzero()[:, 1])
        ids_N = torch.cat(ids)
        values_N = torch.rand(ids_N.numel(), device=self.device) + 0.5
        return Selection(functional.pad(torch.cat(counts).cumsum(0), (1, 0)), ids_N, values_N)
