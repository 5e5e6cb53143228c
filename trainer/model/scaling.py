"""Shifts and scales that bring activations to the units in which the model works: x_scaled = (x - shift) * scale."""

import torch
from torch import Tensor

# A dimension whose variance is below this share of its mean square is constant up to the rounding of float64 sums.
DEAD_VARIANCE = 1e-10


def shift_and_scale(kind: str, mean_LD: Tensor, mean_square_LD: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale (L, D), float32, from per-dimension means and mean squares of the training rows (float64).

    `none`: 0 and 1. `layer`: unit mean square per layer. `dimension`: unit mean square per layer and dimension.
    `standardize`: zero mean, unit variance per layer and dimension. A dead layer or dimension (nothing to divide by)
    keeps scale 1: what is constant stays constant, and nothing becomes infinite.

    Raises:
        ValueError: unknown kind.
    """
    mean_LD, mean_square_LD = mean_LD.double(), mean_square_LD.double()
    shift_LD = torch.zeros_like(mean_LD)
    if kind == "none":
        power_LD = torch.ones_like(mean_LD)
    elif kind == "layer":
        power_LD = mean_square_LD.mean(dim=1, keepdim=True).expand_as(mean_LD)
    elif kind == "dimension":
        power_LD = mean_square_LD
    elif kind == "standardize":
        shift_LD = mean_LD
        variance_LD = mean_square_LD - mean_LD.square()
        power_LD = torch.where(variance_LD > DEAD_VARIANCE * mean_square_LD, variance_LD, 0.0)
    else:
        raise ValueError(f"scaling={kind} is unknown; use none, layer, dimension or standardize")
    tiny = torch.finfo(torch.float32).tiny
    scale_LD = torch.where(power_LD > tiny, power_LD, 1.0).rsqrt()
    return shift_LD.float(), scale_LD.float()
