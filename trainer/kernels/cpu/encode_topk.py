"""encode_topk, compiled: blocks of pre-activations in cache; a row is read once, and again only where it can win.

The k-th largest of the maxima of groups of features bounds the k-th largest score from below, so only groups that
reach it are read again. With bf16 units the first pass runs on bf16 products with error bounds (products.py): what
remains possible, some two entries for each that wins, is computed in float32, so the selection is exact.

Legend: B tokens, D d_model, F features.
"""

import torch
from torch import Tensor

from trainer.kernels import encode_topk as reference
from trainer.kernels.cpu.products import has_bfloat16_units
from trainer.kernels.cpu.support import covers
from trainer.kernels.cpu.topk_plain import Table, plain_rows
from trainer.kernels.cpu.topk_screened import screened_rows
from trainer.kernels.encode_topk import Selection


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


def group_size(n_features: int, k: int) -> int:
    """Features in a group: few enough for four groups per selected entry, where that leaves at least 16."""
    return next((group for group in (64, 32) if n_features >= 4 * k * group), 16)
