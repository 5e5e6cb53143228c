"""Means and ratios over documents, with their standard error by the delete-one-document jackknife.

A statistic theta is a function of sums S over documents, S = sum_i S_i. With n documents and theta_i = theta(S - S_i),

    se = sqrt((n - 1) / n * sum_i (theta_i - mean_j theta_j)^2)        (Tukey's jackknife)

Tokens of one document are not independent, so documents, not tokens, are the units. For a mean over documents of equal
length this is the plain standard error s / sqrt(n), exactly; a mean over tokens of documents of unequal length is a
ratio, sum of values over sum of counts, and is treated as one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Statistic = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Estimate:
    """A statistic's value and standard error, of the same shape; NaN where it is not defined."""

    value: Tensor
    se: Tensor


def jackknife(sums: Mapping[str, Tensor], statistic: Statistic) -> Estimate:
    """Evaluates `statistic` on sums over documents.

    `sums` maps names to tensors of shape (documents, ...). `statistic` gets the same names with the first axis summed
    away. The standard error is NaN with fewer than two documents, and wherever leaving one document out leaves the
    statistic undefined.
    """
    totals = {name: per_document.sum(0) for name, per_document in sums.items()}
    value = statistic(totals)
    documents = len(next(iter(sums.values())))
    if documents < 2:
        return Estimate(value, torch.full_like(value, math.nan))
    left_out = torch.stack([statistic({name: totals[name] - sums[name][i] for name in sums}) for i in range(documents)])
    spread = (left_out - left_out.mean(0)).square().sum(0)
    return Estimate(value, ((documents - 1) / documents * spread).sqrt())


def as_json(value: Tensor) -> float | list[float | None] | None:
    """A tensor as JSON numbers; `null` where it is not finite (a ratio without a denominator, one document's error)."""
    if value.ndim == 0:
        number = float(value)
        return number if math.isfinite(number) else None
    return [number if math.isfinite(number) else None for number in value.tolist()]
