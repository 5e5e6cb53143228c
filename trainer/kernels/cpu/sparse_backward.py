"""sparse_backward, compiled: feature-major, a row's chunk and its gradient in L1 while the tokens' gradients pass by.

Legend: B tokens, F features, C columns of a row, N entries.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.kernels import sparse_backward as reference
from trainer.kernels.build_csc import FeatureIndex
from trainer.kernels.cpu.compiling import block_of, float32_array, helper, int64_array, kernel, next_part
from trainer.kernels.cpu.row_tasks import RowTasks, row_tasks
from trainer.kernels.cpu.sparse_decode import add_rows
from trainer.kernels.cpu.support import covers, rows_of
from trainer.kernels.cpu.threads import launch
from trainer.kernels.cpu.vectors import Vector, axpy, dot, dot_axpy, dot_axpy2
from trainer.kernels.strides import check_written

_CHUNK = 1024
_TOKENS = 16
Ints = np.ndarray[tuple[int], np.dtype[np.int64]]


def decoder_backward(
    grad_BC: Tensor,
    rows_FC: Tensor,
    offsets: Tensor,
    feature_ids_N: Tensor,
    tokens_N: Tensor,
    index: FeatureIndex,
    values_N: Tensor,
    compute_dtype: torch.dtype,
    *,
    out_FC: Tensor | None,
    accumulate: bool,
    dots: bool,
) -> Tensor | None:
    """See the reference; other dtypes than float32 go to it."""
    if not covers(compute_dtype, grad_BC, rows_FC, values_N, out_FC):
        return reference.decoder_backward(
            grad_BC,
            rows_FC,
            offsets,
            feature_ids_N,
            tokens_N,
            index,
            values_N,
            compute_dtype,
            out_FC=out_FC,
            accumulate=accumulate,
            dots=dots,
        )
    check_written(out_FC=out_FC)
    index, n = index.contiguous(), feature_ids_N.numel()
    if not dots:
        if out_FC is not None:
            row_gradients(index, values_N, grad_BC, compute_dtype, out_FC=out_FC, accumulate=accumulate)
        return None
    if out_FC is None:
        dots_N = grad_BC.new_zeros(n)
        parts = -(-grad_BC.shape[0] // _TOKENS) if n else 0
        ids_N = feature_ids_N.contiguous()
        launch(
            _token_dots,
            parts,
            *grad_BC.shape,
            *rows_of(grad_BC),
            *rows_of(rows_FC),
            n,
            offsets.contiguous(),
            ids_N,
            dots_N,
        )
        return dots_N
    tasks = row_tasks(index.offsets, rows_FC.shape[1], idle_cost=1)
    dots_N = hot_dots(tasks, index, grad_BC, rows_FC)
    values_N = values_N.contiguous()
    launch(
        _rows_and_dots,
        tasks.n_rows,
        *rows_FC.shape,
        *rows_of(grad_BC),
        *rows_of(rows_FC),
        *rows_of(out_FC),
        n,
        index.offsets,
        index.order_N,
        index.tokens_N,
        values_N,
        dots_N,
        tasks.rows,
        int(accumulate),
    )
    return dots_N


def row_gradients(
    index: FeatureIndex,
    weights_N: Tensor,
    tokens_BC: Tensor,
    compute_dtype: torch.dtype,
    *,
    out_FC: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """See the reference; other dtypes than float32 go to it."""
    if not covers(compute_dtype, weights_N, tokens_BC, out_FC):
        return reference.row_gradients(index, weights_N, tokens_BC, compute_dtype, out_FC=out_FC, accumulate=accumulate)
    if out_FC is None:
        out_FC = tokens_BC.new_empty(index.offsets.numel() - 1, tokens_BC.shape[1])
    check_written(out_FC=out_FC)
    index = index.contiguous()
    tasks = row_tasks(index.offsets, out_FC.shape[1], idle_cost=1)
    sorted_N = weights_N[index.order_N]
    launch(
        _rows,
        tasks.n_rows,
        *out_FC.shape,
        *rows_of(tokens_BC),
        *rows_of(out_FC),
        sorted_N.numel(),
        index.offsets,
        index.tokens_N,
        sorted_N,
        tasks.rows,
        int(accumulate),
    )
    return out_FC


def feature_sums(index: FeatureIndex, weights_N: Tensor) -> Tensor:
    """See the reference; other dtypes than float32 go to it."""
    if not covers(torch.float32, weights_N):
        return reference.feature_sums(index, weights_N)
    n_features, index, weights_N = index.offsets.numel() - 1, index.contiguous(), weights_N.contiguous()
    sums_F = weights_N.new_empty(n_features)
    parts = -(-n_features // 1024)
    launch(_sums, parts, n_features, weights_N.numel(), index.offsets, index.order_N, weights_N, sums_F)
    return sums_F


def hot_dots(tasks: RowTasks, index: FeatureIndex, tokens_BC: Tensor, rows_FC: Tensor) -> Tensor:
    """(N) zeros, and at the entries of hot features tokens[token] . rows[feature]."""
    dots_N = tokens_BC.new_zeros(index.order_N.numel())
    launch(
        _hot_dots,
        tasks.n_dots,
        *rows_FC.shape,
        *rows_of(tokens_BC),
        *rows_of(rows_FC),
        dots_N.numel(),
        index.offsets,
        index.order_N,
        index.tokens_N,
        dots_N,
        tasks.dots,
    )
    return dots_N


@helper
def chunked_dot(u: Vector, i: int, v: Vector, j: int, size: int) -> np.float32:
    """u[i : i + size] . v[j : j + size] by chunks, in the order in which a row's pass adds them."""
    total = np.float32(0)
    for c in range(0, size, _CHUNK):
        width = min(_CHUNK, size - c)
        total += dot(u[i + c : i + c + width], v[j + c : j + c + width])
    return total


@kernel
def _token_dots(pointer: Any) -> None:
    a = block_of(pointer)
    n_tokens, n_columns, grad_stride, row_stride, n = a[2], a[3], a[5], a[8], a[10]
    grad, rows = float32_array(a[4], a[6]), float32_array(a[7], a[9])
    offsets, ids, dots = int64_array(a[11], n_tokens + 1), int64_array(a[12], n), float32_array(a[13], n)
    part = next_part(pointer)
    while part < a[1]:
        for b in range(part * _TOKENS, min((part + 1) * _TOKENS, n_tokens)):
            for i in range(offsets[b], offsets[b + 1]):
                dots[i] = chunked_dot(grad, b * grad_stride, rows, ids[i] * row_stride, n_columns)
        part = next_part(pointer)


@kernel
def _hot_dots(pointer: Any) -> None:
    a = block_of(pointer)
    n_features, n_columns, token_stride, row_stride, n = a[2], a[3], a[5], a[8], a[10]
    table, rows = float32_array(a[4], a[6]), float32_array(a[7], a[9])
    offsets, order, tokens = int64_array(a[11], n_features + 1), int64_array(a[12], n), int64_array(a[13], n)
    dots, tasks = float32_array(a[14], n), int64_array(a[15], 2 * a[1])
    part = next_part(pointer)
    while part < a[1]:
        f = np.searchsorted(offsets, tasks[2 * part], side="right") - 1
        for i in range(tasks[2 * part], tasks[2 * part + 1]):
            dots[order[i]] = chunked_dot(table, tokens[i] * token_stride, rows, f * row_stride, n_columns)
        part = next_part(pointer)


@kernel
def _rows_and_dots(pointer: Any) -> None:
    a = block_of(pointer)
    n_features, grad_stride, row_stride, out_stride, n = a[2], a[5], a[8], a[11], a[13]
    grad, rows, out = float32_array(a[4], a[6]), float32_array(a[7], a[9]), float32_array(a[10], a[12])
    offsets, order, tokens = int64_array(a[14], n_features + 1), int64_array(a[15], n), int64_array(a[16], n)
    values, dots, tasks = float32_array(a[17], n), float32_array(a[18], n), int64_array(a[19], 5 * a[1])
    part = next_part(pointer)
    while part < a[1]:
        f0, f1, c0, c1, with_dots = tasks[5 * part : 5 * part + 5]
        for f in range(f0, f1):
            n0, n1 = offsets[f], offsets[f + 1]
            for c in range(c0, c1, _CHUNK):
                size = min(_CHUNK, c1 - c)
                y = out[f * out_stride + c : f * out_stride + c + size]
                if a[20] == 0:
                    y[:] = 0
                w = rows[f * row_stride + c : f * row_stride + c + size]
                if with_dots:
                    add_and_dot(y, w, grad, grad_stride, c, order[n0:n1], tokens[n0:n1], values, dots)
                else:
                    add_ordered(y, grad, grad_stride, c, order[n0:n1], tokens[n0:n1], values)
        part = next_part(pointer)


@helper
def add_and_dot(
    y: Vector,
    w: Vector,
    table: Vector,
    stride: int,
    column: int,
    order: Ints,
    tokens: Ints,
    values: Vector,
    dots: Vector,
) -> None:
    """y += sum_i values[order[i]] * table[tokens[i], columns of y]; dots[order[i]] += w . the same."""
    size = y.shape[0]
    i, last = 0, order.shape[0]
    while i + 1 < last:
        m, n = order[i], order[i + 1]
        s, t = tokens[i] * stride + column, tokens[i + 1] * stride + column
        p, q = dot_axpy2(y, w, values[m], table[s : s + size], values[n], table[t : t + size])
        dots[m] += p
        dots[n] += q
        i += 2
    if i < last:
        m, s = order[i], tokens[i] * stride + column
        dots[m] += dot_axpy(y, w, values[m], table[s : s + size])


@helper
def add_ordered(y: Vector, table: Vector, stride: int, column: int, order: Ints, tokens: Ints, values: Vector) -> None:
    """y += sum_i values[order[i]] * table[tokens[i], columns of y]."""
    size = y.shape[0]
    for i in range(order.shape[0]):
        s = tokens[i] * stride + column
        axpy(y, values[order[i]], table[s : s + size])


@kernel
def _rows(pointer: Any) -> None:
    a = block_of(pointer)
    n_features, token_stride, out_stride, n = a[2], a[5], a[8], a[10]
    table, out = float32_array(a[4], a[6]), float32_array(a[7], a[9])
    offsets, tokens = int64_array(a[11], n_features + 1), int64_array(a[12], n)
    weights, tasks = float32_array(a[13], n), int64_array(a[14], 5 * a[1])
    part = next_part(pointer)
    while part < a[1]:
        f0, f1, c0, c1, _ = tasks[5 * part : 5 * part + 5]
        for f in range(f0, f1):
            n0, n1 = offsets[f], offsets[f + 1]
            for c in range(c0, c1, _CHUNK):
                size = min(_CHUNK, c1 - c)
                y = out[f * out_stride + c : f * out_stride + c + size]
                if a[15] == 0:
                    y[:] = 0
                add_rows(y, table, token_stride, c, tokens[n0:n1], weights[n0:n1])
        part = next_part(pointer)


@kernel
def _sums(pointer: Any) -> None:
    a = block_of(pointer)
    n_features, n = a[2], a[3]
    offsets, order = int64_array(a[4], n_features + 1), int64_array(a[5], n)
    weights, sums = float32_array(a[6], n), float32_array(a[7], n_features)
    part = next_part(pointer)
    while part < a[1]:
        for f in range(part * 1024, min((part + 1) * 1024, n_features)):
            total = np.float32(0)
            for i in range(offsets[f], offsets[f + 1]):
                total += weights[order[i]]
            sums[f] = total
        part = next_part(pointer)
