"""The k best entries of each row of float32 products.

Legend: B tokens, R tokens of a block, D d_model, F features, K entries per token.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.kernels.cpu.compiling import (
    block_of,
    candidate_key,
    float32_array,
    helper,
    int64_array,
    kernel,
    next_part,
)
from trainer.kernels.cpu.largest import BOUND_BITS, Floats, Keys, emit_best, kth_largest
from trainer.kernels.cpu.products import blocks, float32_product
from trainer.kernels.cpu.threads import launch
from trainer.kernels.encode_topk import Selection

# Tokens of a part.
_TOKENS = 8


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
            bound = max(kth_largest(best, k, BOUND_BITS), np.int32(1))
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
