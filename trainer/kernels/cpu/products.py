"""Blocks of pre-activations without bias, small enough to stay in cache, and bf16 products with their error bounds.

A product of bf16 operands runs three to four times as fast as one of float32 where the CPU has units for it. It cannot
choose among close entries, but with a rigorous bound of its error it excludes nearly all of them, and the few that
remain are computed in float32. For float32 x, w and their bf16 roundings x', w' (sums in float32 of d products)

    |x' . w' - x . w|  <=  |x - x'| |w| + |x'| |w - w'| + rounding of the sums,     |x'| <= (1 + 2^-8) |x|

with Euclidean norms: about 0.003 |x| |w|, where entries have a standard deviation of |x| |w| / sqrt(d).

Legend: B tokens, R tokens of a block, D d_model, F features, G groups of neighbouring features.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainer.kernels.cpu.compiling import (
    bfloat16_to_float32,
    block_of,
    fast_helper,
    float32_array,
    kernel,
    next_part,
    uint16_array,
)
from trainer.kernels.cpu.support import rows_of
from trainer.kernels.cpu.threads import launch
from trainer.kernels.cpu.vectors import Vector

# Values and rows of a block.
_BLOCK_VALUES = 2**20
_BLOCK_ROWS = (32, 256)
# Rows of one part of the error norms.
_ROWS = 64
# What a number may be of which float32 loses the square, or bf16 units the number itself.
_LOST = np.float32(2**-62)


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware, through the library that torch uses for it."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    found = [getattr(torch.cpu, name, None) for name in names]
    return _has_onednn() and any(supported is not None and supported() for supported in found)


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def blocks(n_tokens: int, n_features: int) -> Iterator[slice]:
    """Ranges of tokens whose pre-activations fit a block."""
    low, high = _BLOCK_ROWS
    rows = max(low, min(high, _BLOCK_VALUES // max(n_features, 1)))
    return (slice(start, min(start + rows, n_tokens)) for start in range(0, n_tokens, rows))


def float32_product(x_RD: Tensor, weight_FD: Tensor) -> Tensor:
    """x W^T. oneDNN is faster at few rows than the BLAS behind torch.mm, which some builds lack it."""
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _has_onednn() else None
    if linear is None or 0 in (*x_RD.shape, *weight_FD.shape):
        return functional.linear(x_RD, weight_FD)
    product_RF: Tensor = linear(x_RD.contiguous(), weight_FD, None, "none", [], "")
    return product_RF


@dataclass(frozen=True, slots=True)
class Rounded:
    """A matrix in bf16, and per row its norm and that of its rounding error."""

    matrix: Tensor
    norms: Tensor
    errors: Tensor


def rounded(table_RD: Tensor) -> Rounded:
    """Round a float32 matrix (rows with any stride)."""
    matrix = table_RD.to(torch.bfloat16).contiguous()
    norms, errors = table_RD.new_empty(table_RD.shape[0]), table_RD.new_empty(table_RD.shape[0])
    launch(_error_norms, -(-table_RD.shape[0] // _ROWS), *table_RD.shape, *rows_of(table_RD), matrix, norms, errors)
    return Rounded(matrix, norms, errors)


def group_maxima(values_F: Tensor, group: int) -> Tensor:
    """(G) maxima of groups of neighbours; NaN wins."""
    padding = -values_F.numel() % group
    return functional.pad(values_F, (0, padding)).view(-1, group).amax(dim=1)


@dataclass(frozen=True, slots=True)
class ErrorBounds:
    """For token b and group g: |bf16 product - product| <= x_norms[b] * near_G[g] + x_errors[b] * far_G[g]
    + base_G[g], before the product itself is rounded to bf16."""

    near_G: Tensor
    far_G: Tensor
    base_G: Tensor


def error_bounds(weight: Rounded, bias_F: Tensor, group: int) -> ErrorBounds:
    """Bounds by groups of features. The factor 1.001 covers the rounding of the norms and of the bounds."""
    sums = weight.matrix.shape[1] * 2.0**-22
    near_F = (weight.errors * (1 + 2.0**-8) + weight.norms * sums) * 1.001
    base_G = group_maxima(bias_F.abs(), group) * 2.0**-7 + 1e-30
    return ErrorBounds(group_maxima(near_F, group), group_maxima(weight.norms * 1.001, group), base_G)


@kernel
def _error_norms(pointer: Any) -> None:
    a = block_of(pointer)
    n_rows, n_columns, stride = a[2], a[3], a[5]
    table, matrix = float32_array(a[4], a[6]), uint16_array(a[7], n_rows * n_columns)
    norms, errors = float32_array(a[8], n_rows), float32_array(a[9], n_rows)
    part = next_part(pointer)
    while part < a[1]:
        for r in range(part * _ROWS, min((part + 1) * _ROWS, n_rows)):
            norms[r], errors[r] = _norm_and_error(
                table[r * stride : r * stride + n_columns], matrix[r * n_columns : (r + 1) * n_columns]
            )
        part = next_part(pointer)


@fast_helper
def _norm_and_error(row: Vector, bits: Any) -> Any:
    norm, error = np.float32(0), np.float32(0)
    for c in range(row.shape[0]):
        difference = row[c] - bfloat16_to_float32(bits[c])
        norm += row[c] * row[c]
        error += difference * difference
    lost = _LOST * np.sqrt(np.float32(row.shape[0]))
    return np.sqrt(norm) + lost, np.sqrt(error) + lost
