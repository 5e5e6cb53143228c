"""fused_adam_rows: gradients of feature rows, and Adam's update of every row, in one pass.

    g[f] = sum_n w_n t[token_n];   m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    row  <- row - lr (m / c1) / (sqrt(v / c2) + eps);        c = 1 - b^step

Dense: a row without entries decays its moments and moves, as in torch.optim.Adam. No gradient of the size of the
parameter exists. Legend: F features, C columns of a row, N entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.kernels.build_csc import FeatureIndex
from trainer.kernels.row_sums import add_row_sums
from trainer.kernels.sparse_backward import entry_dots
from trainer.kernels.strides import check_written

# Entries of a gradient block: 16 MiB of fp32.
_BLOCK_VALUES = 2**22


class AdamHyper(NamedTuple):
    """One step's constants; bias_correction = 1 - beta^step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    bias_correction1: float
    bias_correction2: float


def fused_adam_rows(
    rows_FC: Tensor,
    exp_avg_FC: Tensor,
    exp_avg_sq_FC: Tensor,
    index: FeatureIndex,
    weights_N: Tensor,
    tokens_BC: Tensor,
    hyper: AdamHyper,
    *,
    dots: bool,
) -> tuple[Tensor, Tensor | None]:
    """Update rows and moments in place, a block of features at a time.

    weights_N: token-major. Returns the sum of squares of the gradient (0-dim float64) and, with `dots`, per entry (N,
    token-major) tokens[token] . row[feature] with the row as it was before its update.
    """
    check_written(rows_FC=rows_FC, exp_avg_FC=exp_avg_FC, exp_avg_sq_FC=exp_avg_sq_FC)
    index = index.contiguous()
    n_features, n_columns = rows_FC.shape
    dots_N = weights_N.new_empty(weights_N.numel()) if dots else None
    squares = torch.zeros((), dtype=torch.float64, device=rows_FC.device)
    sorted_N = weights_N[index.order_N]
    step = max(1, _BLOCK_VALUES // max(n_columns, 1))
    starts = [*range(0, n_features, step), n_features]
    bounds = index.offsets[torch.tensor(starts, device=index.offsets.device)].tolist()
    for block in range(len(starts) - 1):
        f, n = slice(starts[block], starts[block + 1]), slice(bounds[block], bounds[block + 1])
        offsets = index.offsets[f.start : f.stop + 1] - n.start
        if dots_N is not None and n.stop > n.start:
            dots_N[index.order_N[n]] = _dots(tokens_BC, rows_FC[f], index.tokens_N[n], offsets)
        gradient_fC = rows_FC.new_empty(f.stop - f.start, n_columns)
        add_row_sums(gradient_fC, offsets, index.tokens_N[n], sorted_N[n], tokens_BC, accumulate=False)
        squares += _adam(rows_FC[f], exp_avg_FC[f], exp_avg_sq_FC[f], gradient_fC, hyper)
    return squares, dots_N


def _dots(tokens_BC: Tensor, rows_fC: Tensor, tokens_N: Tensor, offsets: Tensor) -> Tensor:
    """(n): tokens[token] . row[feature] of feature-major entries, without an (n, C) temporary."""
    features_N = torch.arange(rows_fC.shape[0], device=rows_fC.device).repeat_interleave(offsets.diff())
    rows_fC, dtype = rows_fC.to(tokens_BC.dtype), rows_fC.dtype
    return entry_dots(rows_fC, tokens_BC.contiguous(), tokens_N, offsets, features_N).to(dtype)


def _adam(parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, hyper: AdamHyper) -> Tensor:
    """In place, with `gradient` as scratch; sum of squares of the gradient."""
    exp_avg.lerp_(gradient, 1 - hyper.beta1)
    gradient.square_()
    squares = gradient.sum(dtype=torch.float64)
    exp_avg_sq.mul_(hyper.beta2).add_(gradient, alpha=1 - hyper.beta2)
    torch.sqrt(exp_avg_sq, out=gradient)
    gradient.div_(hyper.bias_correction2**0.5).add_(hyper.eps)
    parameter.addcdiv_(exp_avg, gradient, value=-hyper.lr / hyper.bias_correction1)
    return squares
