"""fused_adam_rows, compiled: per chunk of a row the gradient lies in L1, and Adam's update follows at once.

A chunk's part of the dots is taken before that chunk's update. Legend: F features, C columns, N entries.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.kernels import fused_adam_rows as reference
from trainer.kernels.build_csc import FeatureIndex
from trainer.kernels.cpu.compiling import (
    block_of,
    fast_helper,
    float32_array,
    float64_array,
    int64_array,
    kernel,
    next_part,
)
from trainer.kernels.cpu.row_tasks import row_tasks
from trainer.kernels.cpu.sparse_backward import add_and_dot, add_ordered, hot_dots
from trainer.kernels.cpu.support import covers, rows_of
from trainer.kernels.cpu.threads import launch
from trainer.kernels.cpu.vectors import Vector, squares
from trainer.kernels.fused_adam_rows import AdamHyper
from trainer.kernels.strides import check_written

_CHUNK = 1024
# Rows of parameters and moments are read and written: as dear as so many entries.
_IDLE_COST = 4


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
    """See the reference; other dtypes than float32 go to it."""
    moments = (exp_avg_FC, exp_avg_sq_FC)
    if not covers(torch.float32, rows_FC, *moments, weights_N, tokens_BC):
        return reference.fused_adam_rows(rows_FC, *moments, index, weights_N, tokens_BC, hyper, dots=dots)
    check_written(rows_FC=rows_FC, exp_avg_FC=exp_avg_FC, exp_avg_sq_FC=exp_avg_sq_FC)
    index = index.contiguous()
    tasks = row_tasks(index.offsets, rows_FC.shape[1], _IDLE_COST)
    dots_N = hot_dots(tasks, index, tokens_BC, rows_FC) if dots else None
    squares_P = torch.zeros(tasks.n_rows, dtype=torch.float64)
    weights_N = weights_N.contiguous()
    launch(
        _update_rows,
        tasks.n_rows,
        *rows_FC.shape,
        *rows_of(tokens_BC),
        *rows_of(rows_FC),
        *rows_of(exp_avg_FC),
        *rows_of(exp_avg_sq_FC),
        weights_N.numel(),
        index.offsets,
        index.order_N,
        index.tokens_N,
        weights_N,
        dots_N if dots_N is not None else 0,
        tasks.rows,
        _constants(hyper),
        squares_P,
    )
    return squares_P.sum(), dots_N


def _constants(hyper: AdamHyper) -> Tensor:
    """What the update multiplies with; rounded to float32 once."""
    return torch.tensor(
        [
            1 - hyper.beta1,
            hyper.beta2,
            1 - hyper.beta2,
            hyper.bias_correction2**-0.5,
            hyper.eps,
            hyper.lr / hyper.bias_correction1,
        ]
    )


@fast_helper
def adam(row: Vector, exp_avg: Vector, exp_avg_sq: Vector, gradient: Vector, constants: Vector) -> None:
    """Adam's update of one slice."""
    beta1_rest, beta2, beta2_rest, root, eps, step = (
        constants[0],
        constants[1],
        constants[2],
        constants[3],
        constants[4],
        constants[5],
    )
    for c in range(row.shape[0]):
        g = gradient[c]
        m = exp_avg[c] + beta1_rest * (g - exp_avg[c])
        v = beta2 * exp_avg_sq[c] + beta2_rest * (g * g)
        exp_avg[c] = m
        exp_avg_sq[c] = v
        row[c] -= step * m / (np.sqrt(v) * root + eps)


@kernel
def _update_rows(pointer: Any) -> None:
    a = block_of(pointer)
    n_features, token_stride, row_stride, avg_stride, sq_stride, n = a[2], a[5], a[8], a[11], a[14], a[16]
    table, rows = float32_array(a[4], a[6]), float32_array(a[7], a[9])
    avg, sq = float32_array(a[10], a[12]), float32_array(a[13], a[15])
    offsets, order, tokens = int64_array(a[17], n_features + 1), int64_array(a[18], n), int64_array(a[19], n)
    weights, dots, tasks = float32_array(a[20], n), float32_array(a[21], n), int64_array(a[22], 5 * a[1])
    constants, totals = float32_array(a[23], 6), float64_array(a[24], a[1])
    scratch = np.empty(_CHUNK, np.float32)
    part = next_part(pointer)
    while part < a[1]:
        f0, f1, c0, c1, with_dots = tasks[5 * part : 5 * part + 5]
        total = 0.0
        for f in range(f0, f1):
            n0, n1 = offsets[f], offsets[f + 1]
            for c in range(c0, c1, _CHUNK):
                size = min(_CHUNK, c1 - c)
                w = rows[f * row_stride + c : f * row_stride + c + size]
                g = scratch[:size]
                g[:] = 0
                if n1 > n0:
                    if with_dots and a[21] != 0:
                        add_and_dot(g, w, table, token_stride, c, order[n0:n1], tokens[n0:n1], weights, dots)
                    else:
                        add_ordered(g, table, token_stride, c, order[n0:n1], tokens[n0:n1], weights)
                    total += squares(g)
                i, j = f * avg_stride + c, f * sq_stride + c
                adam(w, avg[i : i + size], sq[j : j + size], g, constants)
        totals[part] = total
        part = next_part(pointer)
