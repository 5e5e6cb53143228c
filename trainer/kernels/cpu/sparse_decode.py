"""sparse_decode, compiled: tokens by groups, a chunk of columns at a time so that the sums stay in L1.

Legend: B tokens, F features, C columns, N entries.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.kernels import sparse_decode as reference
from trainer.kernels.cpu.compiling import block_of, float32_array, helper, int64_array, kernel, next_part
from trainer.kernels.cpu.support import covers, rows_of
from trainer.kernels.cpu.threads import launch
from trainer.kernels.cpu.vectors import Vector, axpy, axpy4
from trainer.kernels.strides import check_written

_CHUNK = 1024
_TOKENS = 32
# Chunks of all rows that about stay in L2 (2 MB; some features are idle) while every token passes by. With 768 features
# that was 4% faster than all columns at once, with 1,024 a tenth slower.
_RESIDENT_FEATURES = 768


def sparse_decode(
    y_BC: Tensor, offsets: Tensor, feature_ids_N: Tensor, values_N: Tensor, rows_FC: Tensor, compute_dtype: torch.dtype
) -> None:
    """See the reference; other dtypes than float32 go to it."""
    if not covers(compute_dtype, y_BC, values_N, rows_FC):
        reference.sparse_decode(y_BC, offsets, feature_ids_N, values_N, rows_FC, compute_dtype)
        return
    check_written(y_BC=y_BC)
    n_tokens, n_columns = y_BC.shape
    ids_N, weights_N = feature_ids_N.contiguous(), values_N.contiguous()
    width = _CHUNK if rows_FC.shape[0] <= _RESIDENT_FEATURES else n_columns
    parts = -(-n_tokens // _TOKENS) * -(-n_columns // width) if n_columns and ids_N.numel() else 0
    launch(
        _decode,
        parts,
        n_tokens,
        n_columns,
        width,
        *rows_of(y_BC),
        *rows_of(rows_FC),
        ids_N.numel(),
        offsets.contiguous(),
        ids_N,
        weights_N,
    )


@kernel
def _decode(pointer: Any) -> None:
    a = block_of(pointer)
    n_tokens, n_columns, width, y_stride, row_stride, n = a[2], a[3], a[4], a[6], a[9], a[11]
    y, rows = float32_array(a[5], a[7]), float32_array(a[8], a[10])
    offsets, ids, values = int64_array(a[12], n_tokens + 1), int64_array(a[13], n), float32_array(a[14], n)
    groups = -(-n_tokens // _TOKENS)
    part = next_part(pointer)
    while part < a[1]:
        first, b0 = part // groups * width, part % groups * _TOKENS
        for b in range(b0, min(b0 + _TOKENS, n_tokens)):
            n0, n1 = offsets[b], offsets[b + 1]
            for c0 in range(first, min(first + width, n_columns), _CHUNK):
                size, start = min(_CHUNK, n_columns - c0), b * y_stride + c0
                add_rows(y[start : start + size], rows, row_stride, c0, ids[n0:n1], values[n0:n1])
        part = next_part(pointer)


@helper
def add_rows(
    y: Vector,
    table: Vector,
    stride: int,
    column: int,
    ids: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    weights: Vector,
) -> None:
    """y += sum_n weights[n] * table[ids[n], column : column + size of y], four rows at a time."""
    size = y.shape[0]
    n, last = 0, ids.shape[0]
    while n + 3 < last:
        i, j = ids[n] * stride + column, ids[n + 1] * stride + column
        k, m = ids[n + 2] * stride + column, ids[n + 3] * stride + column
        axpy4(
            y,
            weights[n],
            table[i : i + size],
            weights[n + 1],
            table[j : j + size],
            weights[n + 2],
            table[k : k + size],
            weights[n + 3],
            table[m : m + size],
        )
        n += 4
    while n < last:
        i = ids[n] * stride + column
        axpy(y, weights[n], table[i : i + size])
        n += 1
