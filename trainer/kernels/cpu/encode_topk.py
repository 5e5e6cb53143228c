"""encode_topk, compiled: blocks of pre-activations in cache; a row is read once, and again only where it can win.

The k-th largest of the maxima of groups of features bounds the k-th largest score from below, so only groups that
reach it are read again. With bf16 units the first pass runs on bf16 products with error bounds (products.py): what
remains possible, some two entries for each that wins, is computed in float32, so the selection is exact.

Legend: B tokens, R tokens of a block, D d_model, F features, K entries per token.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.kernels import encode_topk as reference
from trainer.kernels.cpu.compiling import (
    bfloat16_to_float32,
    block_of,
    candidate_key,
    float32_array,
    float32_bits,
    float32_of_bits,
    helper,
    int64_array,
    kernel,
    next_part,
    uint16_array,
)
from trainer.kernels.cpu.largest import Floats, Keys, emit_best, kth_largest
from trainer.kernels.cpu.products import (
    blocks,
    error_bounds,
    float32_product,
    group_maxima,
    has_bfloat16_units,
    rounded,
)
from trainer.kernels.cpu.support import covers, rows_of
from trainer.kernels.cpu.threads import launch
from trainer.kernels.cpu.vectors import dot
from trainer.kernels.encode_topk import Selection

# Tokens of a part.
_TOKENS = 8
# Bits of the bound that are found (the rest would not exclude much more).
_BITS = 20
# bf16 products are rounded to 2^-8 of their value.
_OUTPUT_ERROR = np.float32(2**-7.9)
_NAN = np.int32(0x7FFFFFFF)


def encode_topk(
    x_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, norm_F: Tensor | None, compute_dtype: torch.dtype
) -> Selection:
    """See the reference; other dtypes than float32 go to it."""
    if not covers(compute_dtype, x_BD, weight_FD, bias_F, norm_F) or 0 in (*x_BD.shape, weight_FD.shape[0], k):
        return reference.encode_topk(x_BD, weight_FD, bias_F, k, norm_F, compute_dtype)
    n_tokens, n_features = x_BD.shape[0], weight_FD.shape[0]
    k = min(k, n_features)
    table = Table(
        torch.empty(n_tokens, k, dtype=torch.int64),
        x_BD.new_empty(n_tokens, k),
        torch.full((n_tokens,), -1, dtype=torch.int64),
    )
    bias_F = bias_F.contiguous()
    norm_F = norm_F.contiguous() if norm_F is not None else None
    group = group_size(n_features, k)
    if has_bfloat16_units() and n_features >= k * group:
        screened_rows(x_BD, weight_FD, bias_F, norm_F, group, table)
    plain_rows(x_BD, weight_FD, bias_F, norm_F, group, table)
    return table.selection()


class Table:
    """(B, K) ids and values, filled from the left, and (B) the number of entries; -1: the row is not done yet."""

    def __init__(self, ids_BK: Tensor, values_BK: Tensor, counts_B: Tensor) -> None:
        self.ids, self.values, self.counts = ids_BK, values_BK, counts_B

    def selection(self) -> Selection:
        """The filled entries."""
        k = self.ids.shape[1]
        offsets = torch.zeros(self.counts.numel() + 1, dtype=torch.int64)
        torch.cumsum(self.counts, dim=0, out=offsets[1:])
        if int(offsets[-1]) == self.ids.numel():
            return Selection(offsets, self.ids.view(-1), self.values.view(-1))
        filled_BK = torch.arange(k) < self.counts[:, None]
        return Selection(offsets, self.ids[filled_BK], self.values[filled_BK])


def group_size(n_features: int, k: int) -> int:
    """Features in a group: few enough for four groups per selected entry, where that leaves at least 16."""
    return next((group for group in (64, 32) if n_features >= 4 * k * group), 16)


def plain_rows(
    x_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, norm_F: Tensor | None, group: int, table: Table
) -> None:
    """Fill the rows of the table that are not done, by float32 products."""
    rows_B = (table.counts < 0).nonzero()[:, 0]
    n_features, k = weight_FD.shape[0], table.ids.shape[1]
    for block in blocks(rows_B.numel(), n_features):
        rows_R = rows_B[block]
        whole = rows_B.numel() == x_BD.shape[0]
        product_RF = float32_product(x_BD[block] if whole else x_BD[rows_R], weight_FD)
        launch(
            _select_plain,
            -(-rows_R.numel() // _TOKENS),
            rows_R.numel(),
            n_features,
            k,
            group,
            x_BD.shape[0],
            rows_R,
            product_RF,
            bias_F,
            norm_F if norm_F is not None else 0,
            table.ids,
            table.values,
            table.counts,
        )


def screened_rows(
    x_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, norm_F: Tensor | None, group: int, table: Table
) -> None:
    """Fill the rows of the table by bf16 products; a row with too many possible winners stays not done."""
    weight, x = rounded(weight_FD), rounded(x_BD)
    bounds = error_bounds(weight, bias_F, group)
    norms_G = group_maxima(norm_F, group) if norm_F is not None else None
    n_features, k = weight_FD.shape[0], table.ids.shape[1]
    weight_DF = weight.matrix.t()
    for block in blocks(x_BD.shape[0], n_features):
        product_RF = torch.mm(x.matrix[block], weight_DF)
        launch(
            _select_screened,
            -(-product_RF.shape[0] // _TOKENS),
            product_RF.shape[0],
            n_features,
            k,
            group,
            x_BD.shape[1],
            block.start,
            x_BD.shape[0],
            product_RF,
            bias_F,
            norm_F if norm_F is not None else 0,
            norms_G if norms_G is not None else 0,
            bounds.near_G,
            bounds.far_G,
            bounds.base_G,
            x.norms,
            x.errors,
            *rows_of(x_BD),
            *rows_of(weight_FD),
            table.ids,
            table.values,
            table.counts,
        )


@kernel
def _select_plain(pointer: Any) -> None:
    a = block_of(pointer)
    n_rows, n_features, k, group, n_tokens = a[2], a[3], a[4], a[5], a[6]
    rows, product = int64_array(a[7], n_rows), float32_array(a[8], n_rows * n_features)
    bias, has_norm = float32_array(a[9], n_features), a[10] != 0
    norm = float32_array(a[10] if has_norm else a[9], n_features)
    ids, values = int64_array(a[11], n_tokens * k), float32_array(a[12], n_tokens * k)
    counts = int64_array(a[13], n_tokens)
    n_groups = -(-n_features // group)
    best = np.empty(n_groups, np.int32)
    found_keys, found_ids = np.empty(n_features, np.int32), np.empty(n_features, np.int32)
    found = np.empty(n_features, np.float32)
    part = next_part(pointer)
    while part < a[1]:
        for r in range(part * _TOKENS, min((part + 1) * _TOKENS, n_rows)):
            row = product[r * n_features : (r + 1) * n_features]
            for g in range(n_groups):
                i, j = g * group, min((g + 1) * group, n_features)
                best[g] = _largest_key(row[i:j], bias[i:j], norm[i:j], has_norm)
            bound = max(kth_largest(best, k, _BITS), np.int32(1))
            n = 0
            for g in range(n_groups):
                if best[g] >= bound:
                    n = _collect(
                        row, bias, norm, has_norm, g * group, min((g + 1) * group, n_features), bound,
                        found_keys, found_ids, found, n,
                    )  # fmt: skip
            b = rows[r]
            counts[b] = emit_best(
                found_keys[:n], found_ids[:n], found[:n], k, ids[b * k : (b + 1) * k], values[b * k : (b + 1) * k]
            )
        part = next_part(pointer)


@helper
def _largest_key(row: Floats, bias: Floats, norm: Floats, has_norm: bool) -> np.int32:
    best = np.int32(0)
    if has_norm:
        for i in range(row.shape[0]):
            pre = row[i] + bias[i]
            key = candidate_key(pre, pre * norm[i])
            best = key if key > best else best
    else:
        for i in range(row.shape[0]):
            pre = row[i] + bias[i]
            key = candidate_key(pre, pre)
            best = key if key > best else best
    return best


@helper
def _collect(
    row: Floats,
    bias: Floats,
    norm: Floats,
    has_norm: bool,
    first: int,
    last: int,
    bound: np.int32,
    keys: Keys,
    ids: Keys,
    values: Floats,
    n: int,
) -> int:
    """Append the entries of a group that reach the bound."""
    for f in range(first, last):
        pre = row[f] + bias[f]
        key = candidate_key(pre, pre * norm[f] if has_norm else pre)
        if key >= bound:
            keys[n], ids[n], values[n] = key, f, pre
            n += 1
    return n


@kernel
def _select_screened(pointer: Any) -> None:
    a = block_of(pointer)
    n_rows, n_features, k, group, d_model, first, n_tokens = a[2], a[3], a[4], a[5], a[6], a[7], a[8]
    n_groups = -(-n_features // group)
    product, bias = uint16_array(a[9], n_rows * n_features), float32_array(a[10], n_features)
    has_norm = a[11] != 0
    norm = float32_array(a[11] if has_norm else a[10], n_features)
    norms = float32_array(a[12] if has_norm else a[13], n_groups)
    near, far, base = float32_array(a[13], n_groups), float32_array(a[14], n_groups), float32_array(a[15], n_groups)
    x_norms, x_errors = float32_array(a[16], n_tokens), float32_array(a[17], n_tokens)
    x, x_stride, weight, weight_stride = float32_array(a[18], a[20]), a[19], float32_array(a[21], a[23]), a[22]
    ids, values = int64_array(a[24], n_tokens * k), float32_array(a[25], n_tokens * k)
    counts = int64_array(a[26], n_tokens)
    limit = max(n_features // 8, 2 * k)
    best, lower = np.empty(n_groups, np.int32), np.empty(n_groups, np.int32)
    errors = np.empty(n_groups, np.float32)
    found_keys, found_ids, found = np.empty(limit, np.int32), np.empty(limit, np.int32), np.empty(limit, np.float32)
    part = next_part(pointer)
    while part < a[1]:
        for r in range(part * _TOKENS, min((part + 1) * _TOKENS, n_rows)):
            b = first + r
            row = product[r * n_features : (r + 1) * n_features]
            for g in range(n_groups):
                i, j = g * group, min((g + 1) * group, n_features)
                best[g] = _largest_bits(row[i:j], bias[i:j], norm[i:j], has_norm)
                error = x_norms[b] * near[g] + x_errors[b] * far[g] + base[g]
                errors[g] = error * norms[g] if has_norm else error
                lower[g] = _lower_bits(best[g], errors[g])
            bound = kth_largest(lower, k, _BITS)
            if bound == 0:
                continue
            n = _possible(row, bias, norm, has_norm, group, best, errors, float32_of_bits(bound), found_ids)
            if n > limit:
                continue
            mine = x[b * x_stride : b * x_stride + d_model]
            for i in range(n):
                f = np.int64(found_ids[i])
                pre = dot(mine, weight[f * weight_stride : f * weight_stride + d_model]) + bias[f]
                found[i] = pre
                found_keys[i] = candidate_key(pre, pre * norm[f] if has_norm else pre)
            counts[b] = emit_best(
                found_keys[:n], found_ids[:n], found[:n], k, ids[b * k : (b + 1) * k], values[b * k : (b + 1) * k]
            )
        part = next_part(pointer)


@helper
def _largest_bits(row: Any, bias: Floats, norm: Floats, has_norm: bool) -> np.int32:
    """Bits of the largest approximate score of a group if that is positive, else 0 or less; NaN: the largest int32."""
    best = np.int32(0)
    if has_norm:
        for i in range(row.shape[0]):
            score = (bfloat16_to_float32(row[i]) + bias[i]) * norm[i]
            key = _NAN if score != score else float32_bits(score)  # noqa: PLR0124
            best = key if key > best else best
    else:
        for i in range(row.shape[0]):
            score = bfloat16_to_float32(row[i]) + bias[i]
            key = _NAN if score != score else float32_bits(score)  # noqa: PLR0124
            best = key if key > best else best
    return best


@helper
def _lower_bits(best: np.int32, error: np.float32) -> np.int32:
    """Bits of a score that some entry of the group surely reaches; 0 where there is none above zero."""
    if best == _NAN:
        return np.int32(0)
    score = float32_of_bits(best)
    score = score - _OUTPUT_ERROR * score - error
    # NaN fails the comparison.
    return float32_bits(score) if score > 0 else np.int32(0)


@helper
def _possible(
    row: Any,
    bias: Floats,
    norm: Floats,
    has_norm: bool,
    group: int,
    best: Keys,
    errors: Floats,
    bound: np.float32,
    ids: Keys,
) -> int:
    """Ids of the entries whose score may reach the bound, NaN among them; their number, which may exceed the room."""
    n, room = 0, ids.shape[0]
    for g in range(best.shape[0]):
        top = float32_of_bits(best[g])
        # `not <` keeps NaN.
        if top + _OUTPUT_ERROR * top + errors[g] < bound:
            continue
        for f in range(g * group, min((g + 1) * group, row.shape[0])):
            score = bfloat16_to_float32(row[f]) + bias[f]
            if has_norm:
                score *= norm[f]
            if not score + _OUTPUT_ERROR * score + errors[g] < bound:
                if n < room:
                    ids[n] = f
                n += 1
    return n
