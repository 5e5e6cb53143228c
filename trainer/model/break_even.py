"""From which share of selected entries on the dense path of a layer is faster than the sparse one.

The table below was measured; `layerloom tune` measures a user's own machine (trainer/tune.py).
"""

from typing import NamedTuple

import torch

from trainer.model.spec import ModelSpec


class BreakEven(NamedTuple):
    """The density above which a layer goes dense, and where the number comes from."""

    density: float
    source: str


# (backend, device, dtype of the products, family) -> densities for rows of at most 2,048 columns, and for wider ones.
# `python -m benchmarks.break_even` on two cores of an AMD EPYC with torch 2.13: 896 columns (F = 4,096, B = 1,024) and
# 4,992 (F = 8,192, B = 256).
_SHIPPED: dict[tuple[str, str, torch.dtype, str], tuple[float, float]] = {
    ("cpu", "cpu", torch.float32, "topk"): (0.33, 0.20),
    ("cpu", "cpu", torch.float32, "relu"): (0.36, 0.20),
    ("reference", "cpu", torch.float32, "topk"): (0.14, 0.09),
    ("reference", "cpu", torch.float32, "relu"): (0.15, 0.11),
}
_NARROW_COLUMNS = 2048
# By type of device, where nothing was measured: on CUDA a product of matrices is cheaper still beside a gather.
_OTHERWISE = {"cpu": 0.1, "cuda": 0.01}


# Sparse codes of all layers wait for the backward pass, 16 bytes an entry (24 with the tanh penalty): at this density
# 0.4 (0.6) of what the pre-activations of all layers would take in float32. Denser layers go dense unless a user says
# otherwise.
MOST_SPARSE = 0.1


def family(spec: ModelSpec) -> str:
    """Kinds that share a dense path: `topk` rebuilds activations from codes, `relu` computes pre-activations anew."""
    return "topk" if spec.is_topk else "relu"


def mean_span(spec: ModelSpec) -> float:
    """Target layers of a source layer, on average."""
    return sum(len(spec.targets(s)) for s in range(spec.n_layers)) / spec.n_layers


def shipped_break_even(backend: str, device: str, compute_dtype: torch.dtype, spec: ModelSpec) -> BreakEven:
    """The number for this backend, type of device, dtype of the products and width of the decoder's rows."""
    measured = _SHIPPED.get((backend, device, compute_dtype, family(spec)))
    if measured is None:
        return BreakEven(_OTHERWISE.get(device, 0.05), "a guess; layerloom tune measures it here")
    wide = mean_span(spec) * spec.d_model > _NARROW_COLUMNS
    return limited(BreakEven(measured[int(wide)], "the table in the code"))


def limited(found: BreakEven) -> BreakEven:
    """At most MOST_SPARSE, and says so."""
    if found.density <= MOST_SPARSE:
        return found
    return BreakEven(MOST_SPARSE, f"for memory; by time {found.density:.3g}, {found.source}")
