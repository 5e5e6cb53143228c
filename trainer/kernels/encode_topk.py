"""encode_topk: pre-activations of one source layer and, per token, the k best of them.

    pre = x W_enc^T + b_enc;   score = pre, or pre * norm;   candidates: pre > 0

Legend: B tokens, D d_model, F features, N selected entries.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from trainer.kernels.selection import topk_rows


class Selection(NamedTuple):
    """Selected entries in order of (token, feature): offsets (B+1) and ids (N) int64, pre-activations (N)."""

    offsets: Tensor
    feature_ids: Tensor
    values: Tensor


def pre_activations(x_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """(B, F) in the dtype of the bias; the product is taken in `compute_dtype`."""
    if compute_dtype == weight_FD.dtype == bias_F.dtype:
        return functional.linear(x_BD, weight_FD, bias_F)
    product_BF = functional.linear(x_BD.to(compute_dtype), weight_FD.to(compute_dtype))
    return product_BF.to(bias_F.dtype).add_(bias_F)


def masked_scores(pre_BF: Tensor, norm_F: Tensor | None) -> tuple[Tensor, float]:
    """Scores (B, F), and the floor above which an entry is a candidate (pre > 0)."""
    if norm_F is None:
        return pre_BF, 0.0
    # A decoder norm of zero must not turn pre <= 0 into a candidate.
    return (pre_BF * norm_F).masked_fill_(pre_BF <= 0, float("-inf")), float("-inf")


def compact(ids_BK: Tensor, values_BK: Tensor, kept_BK: Tensor) -> Selection:
    """Drop the entries of a (B, K) table that are not kept."""
    counts_B = kept_BK.sum(dim=1)
    offsets = functional.pad(counts_B.cumsum(0), (1, 0))
    if bool(kept_BK.all()):
        return Selection(offsets, ids_BK.reshape(-1), values_BK.reshape(-1))
    return Selection(offsets, ids_BK[kept_BK], values_BK[kept_BK])


def encode_topk(
    x_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, norm_F: Tensor | None, compute_dtype: torch.dtype
) -> Selection:
    """The k entries of every token with the largest score; fewer where fewer are positive. Ties: smallest feature."""
    pre_BF = pre_activations(x_BD, weight_FD, bias_F, compute_dtype)
    scores_BF, floor = masked_scores(pre_BF, norm_F)
    ids_BK = topk_rows(scores_BF, k, floor=floor)
    values_BK = pre_BF.gather(1, ids_BK)
    # `not <=` keeps NaN, so that a broken encoder shows in the loss.
    return compact(ids_BK, values_BK, ~(values_BK <= 0))
