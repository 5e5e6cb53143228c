"""The k best entries of each row by bf16 products with error bounds: few are possible, and those are computed exactly.

Legend: B tokens, R tokens of a block, D d_model, F features, G groups of features, K entries per token.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

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
from trainer.kernels.cpu.largest import BOUND_BITS, Floats, Keys, emit_best, kth_largest
from trainer.kernels.cpu.products import blocks, error_bounds, group_maxima, rounded
from trainer.kernels.cpu.support import rows_of
from trainer.kernels.cpu.threads import launch
from trainer.kernels.cpu.topk_plain import Table
from trainer.kernels.cpu.vectors import dot

# Tokens of a part.
_TOKENS = 8
# bf16 products are rounded to 2^-8 of their value.
_OUTPUT_ERROR = np.float32(2**-7.9)
_NAN = np.int32(0x7FFFFFFF)


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
            bound = kth_largest(lower, k, BOUND_BITS)
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
            if not score + _OUTPUT_ERROR * abs(score) + errors[g] < bound:
                if n < room:
                    ids[n] = f
                n += 1
    return n
