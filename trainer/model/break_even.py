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
_SHIPPED: dict[tuple[str, str, torch.dtype, str], tuple[float, float]] = {
    ("reference", "cpu", torch.float32, "topk"): (0.14, 0.14),
    ("reference", "cpu", torch.float32, "relu"): (0.15, 0.15),
}
_NARROW_COLUMNS = 2048
# Where nothing was measured.
_OTHERWISE = 0.05


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
        return BreakEven(_OTHERWISE, "not measured for this backend and device")
    wide = mean_span(spec) * spec.d_model > _NARROW_COLUMNS
    return BreakEven(measured[int(wide)], "the table in the code")
