"""Entries above a bound, streamed by blocks of tokens: what encode_jumprelu and encode_candidates are made of.

Kept: entries with not (pre - theta <= shift), and whose key (candidate_key of pre and pre * norm) reaches a bound.
NaN is kept. With bf16 units blocks are screened first (products.py): `screen_F` is a value that the pre-activations
of kept entries reach, apart from rounding. Legend: R tokens of a block, F features, N entries.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.kernels.cpu.compiling import (
    bfloat16_to_float32,
    block_of,
    candidate_key,
    float32_array,
    float64_of_bits,
    helper,
    int32_array,
    int64_array,
    kernel,
    next_part,
    uint16_array,
)
from trainer.kernels.cpu.largest import Floats
from trainer.kernels.cpu.products import blocks, error_bounds, float32_product, has_bfloat16_units, rounded
from trainer.kernels.cpu.support import rows_of
from trainer.kernels.cpu.threads import float_bits, launch
from trainer.kernels.cpu.vectors import dot

_TOKENS = 8
_GROUP = 64
_OUTPUT_ERROR = np.float32(2**-7.9)
# A row with more possible entries than this share goes through float32 products.
_SHARE = 8


class Entries(NamedTuple):
    """Kept entries of a block in order of (token, feature): counts (R), ids (N) and pre-activations (N)."""

    counts: Tensor
    ids: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """What is kept; see above. norm_F: None for a score that is the pre-activation."""

    theta_F: Tensor
    shift: float
    screen_F: Tensor
    norm_F: Tensor | None = None
    key: int = 0


def entries_above(x_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, bound: Bound) -> Iterator[Entries]:
    """Block after block; all tensors float32, vectors contiguous."""
    screen = _Screen(x_BD, weight_FD, bias_F, bound) if has_bfloat16_units() else None
    for block in blocks(x_BD.shape[0], weight_FD.shape[0]):
        entries = screen.entries(block) if screen is not None else None
        if entries is None:
            screen = None
            entries = _plain(float32_product(x_BD[block], weight_FD), bias_F, bound)
        yield entries


def _plain(product_RF: Tensor, bias_F: Tensor, bound: Bound) -> Entries:
    n_rows, n_features = product_RF.shape
    counts = torch.empty(n_rows, dtype=torch.int64)
    parts = -(-n_rows // _TOKENS)
    shared = (
        n_rows,
        n_features,
        product_RF,
        bias_F,
        bound.theta_F,
        float_bits(bound.shift),
        bound.norm_F if bound.norm_F is not None else 0,
        bound.key,
        counts,
    )
    launch(_count_plain, parts, *shared)
    starts = counts.cumsum(0)
    n = int(starts[-1])
    entries = Entries(counts, counts.new_empty(n), product_RF.new_empty(n))
    launch(_fill_plain, parts, *shared, starts, n, entries.ids, entries.values)
    return entries


class _Screen:
    """The bf16 operands of a call, and their error bounds."""

    def __init__(self, x_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, bound: Bound) -> None:
        self.x_BD, self.weight_FD, self.bias_F, self.bound = x_BD, weight_FD, bias_F, bound
        self.weight, self.x = rounded(weight_FD), rounded(x_BD)
        self.bounds = error_bounds(self.weight, torch.zeros_like(bias_F), _GROUP)
        slack_F = (bias_F.abs() + bound.screen_F.abs()) * 2.0**-21
        self.lifted_F = bias_F - bound.screen_F + slack_F

    def entries(self, block: slice) -> Entries | None:
        """The block's entries; None where too many are possible."""
        product_RF = torch.mm(self.x.matrix[block], self.weight.matrix.t())
        n_rows, n_features = product_RF.shape
        room = max(n_features // _SHARE, 64)
        counts = torch.empty(n_rows, dtype=torch.int64)
        ids, values = counts.new_empty(n_rows, room, dtype=torch.int32), self.bias_F.new_empty(n_rows, room)
        parts = -(-n_rows // _TOKENS)
        bound = self.bound
        launch(
            _screen_rows,
            parts,
            n_rows,
            n_features,
            self.x_BD.shape[1],
            block.start,
            self.x_BD.shape[0],
            room,
            product_RF,
            self.lifted_F,
            self.bounds.near_G,
            self.bounds.far_G,
            self.x.norms,
            self.x.errors,
            *rows_of(self.x_BD),
            *rows_of(self.weight_FD),
            self.bias_F,
            bound.theta_F,
            float_bits(bound.shift),
            bound.norm_F if bound.norm_F is not None else 0,
            bound.key,
            counts,
            ids,
            values,
        )
        if int(counts.min()) < 0:
            return None
        starts = counts.cumsum(0)
        n = int(starts[-1])
        entries = Entries(counts, counts.new_empty(n), values.new_empty(n))
        launch(_join, parts, n_rows, room, n, counts, starts, ids, values, entries.ids, entries.values)
        return entries


@helper
def _kept(pre: np.float32, theta: np.float32, shift: np.float32, score: np.float32, key: np.int32) -> bool:
    return not (pre - theta <= shift) and candidate_key(pre, score) >= key


@kernel
def _count_plain(pointer: Any) -> None:
    a = block_of(pointer)
    n_rows, n_features = a[2], a[3]
    product, bias = float32_array(a[4], n_rows * n_features), float32_array(a[5], n_features)
    theta, shift = float32_array(a[6], n_features), np.float32(float64_of_bits(a[7]))
    has_norm = a[8] != 0
    norm, counts = float32_array(a[8] if has_norm else a[5], n_features), int64_array(a[10], n_rows)
    key = np.int32(a[9])
    part = next_part(pointer)
    while part < a[1]:
        for r in range(part * _TOKENS, min((part + 1) * _TOKENS, n_rows)):
            counts[r] = _count(product[r * n_features : (r + 1) * n_features], bias, theta, shift, norm, has_norm, key)
        part = next_part(pointer)


@helper
def _count(
    row: Floats, bias: Floats, theta: Floats, shift: np.float32, norm: Floats, has_norm: bool, key: np.int32
) -> int:
    count = 0
    if has_norm:
        for f in range(row.shape[0]):
            pre = row[f] + bias[f]
            count += _kept(pre, theta[f], shift, pre * norm[f], key)
    else:
        for f in range(row.shape[0]):
            pre = row[f] + bias[f]
            count += _kept(pre, theta[f], shift, pre, key)
    return count


@kernel
def _fill_plain(pointer: Any) -> None:
    a = block_of(pointer)
    n_rows, n_features, n = a[2], a[3], a[12]
    product, bias = float32_array(a[4], n_rows * n_features), float32_array(a[5], n_features)
    theta, shift = float32_array(a[6], n_features), np.float32(float64_of_bits(a[7]))
    has_norm = a[8] != 0
    norm, counts = float32_array(a[8] if has_norm else a[5], n_features), int64_array(a[10], n_rows)
    key = np.int32(a[9])
    ends, ids, values = int64_array(a[11], n_rows), int64_array(a[13], n), float32_array(a[14], n)
    part = next_part(pointer)
    while part < a[1]:
        for r in range(part * _TOKENS, min((part + 1) * _TOKENS, n_rows)):
            if counts[r] == 0:
                continue
            place = ends[r] - counts[r]
            row = product[r * n_features : (r + 1) * n_features]
            for i in range(0, n_features, _GROUP):
                j = min(i + _GROUP, n_features)
                if not _count(row[i:j], bias[i:j], theta[i:j], shift, norm[i:j], has_norm, key):
                    continue
                for f in range(i, j):
                    pre = row[f] + bias[f]
                    if _kept(pre, theta[f], shift, pre * norm[f] if has_norm else pre, key):
                        ids[place], values[place] = f, pre
                        place += 1
        part = next_part(pointer)


@kernel
def _screen_rows(pointer: Any) -> None:
    a = block_of(pointer)
    n_rows, n_features, d_model, first, n_tokens, room = a[2], a[3], a[4], a[5], a[6], a[7]
    n_groups = -(-n_features // _GROUP)
    product, lifted = uint16_array(a[8], n_rows * n_features), float32_array(a[9], n_features)
    near, far = float32_array(a[10], n_groups), float32_array(a[11], n_groups)
    x_norms, x_errors = float32_array(a[12], n_tokens), float32_array(a[13], n_tokens)
    x, x_stride, weight, weight_stride = float32_array(a[14], a[16]), a[15], float32_array(a[17], a[19]), a[18]
    bias, theta = float32_array(a[20], n_features), float32_array(a[21], n_features)
    shift, has_norm, key = np.float32(float64_of_bits(a[22])), a[23] != 0, np.int32(a[24])
    norm, counts = float32_array(a[23] if has_norm else a[20], n_features), int64_array(a[25], n_rows)
    ids, values = int32_array(a[26], n_rows * room), float32_array(a[27], n_rows * room)
    part = next_part(pointer)
    while part < a[1]:
        for r in range(part * _TOKENS, min((part + 1) * _TOKENS, n_rows)):
            b, n = first + r, 0
            row = product[r * n_features : (r + 1) * n_features]
            mine = x[b * x_stride : b * x_stride + d_model]
            for g in range(n_groups):
                i, j = g * _GROUP, min((g + 1) * _GROUP, n_features)
                error = x_norms[b] * near[g] + x_errors[b] * far[g] + np.float32(1e-30)
                if not _count_possible(row[i:j], lifted[i:j], -error):
                    continue
                for f in range(i, j):
                    if not _possible(row[f], lifted[f], -error):
                        continue
                    pre = dot(mine, weight[f * weight_stride : f * weight_stride + d_model]) + bias[f]
                    if _kept(pre, theta[f], shift, pre * norm[f] if has_norm else pre, key):
                        if n < room:
                            ids[r * room + n], values[r * room + n] = f, pre
                        n += 1
                if n > room:
                    break
            counts[r] = n if n <= room else -1
        part = next_part(pointer)


@helper
def _possible(bits: np.uint16, lifted: np.float32, below: np.float32) -> bool:
    """Whether the pre-activation may reach the screen's value; NaN may."""
    product = bfloat16_to_float32(bits)
    return not (product + _OUTPUT_ERROR * abs(product) + lifted < below)


@helper
def _count_possible(row: Any, lifted: Floats, below: np.float32) -> int:
    count = 0
    for f in range(row.shape[0]):
        count += _possible(row[f], lifted[f], below)
    return count


@kernel
def _join(pointer: Any) -> None:
    """Rows with room to spare -> one list."""
    a = block_of(pointer)
    n_rows, room, n = a[2], a[3], a[4]
    counts, ends = int64_array(a[5], n_rows), int64_array(a[6], n_rows)
    ids, values = int32_array(a[7], n_rows * room), float32_array(a[8], n_rows * room)
    all_ids, all_values = int64_array(a[9], n), float32_array(a[10], n)
    part = next_part(pointer)
    while part < a[1]:
        for r in range(part * _TOKENS, min((part + 1) * _TOKENS, n_rows)):
            start = ends[r] - counts[r]
            for i in range(counts[r]):
                all_ids[start + i] = ids[r * room + i]
                all_values[start + i] = values[r * room + i]
        part = next_part(pointer)
