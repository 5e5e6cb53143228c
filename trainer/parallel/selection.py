"""Exact selection over ranks: every rank brings the best of its own, each entry is one candidate, nothing is sampled.

topk: the tokens of a group are dealt out to its ranks; each gets the candidates' scores of its tokens from all ranks,
and answers with how many of each rank's are among the k best. batchtopk: the n-th largest score of all by a radix
search over the bits of the scores, in a fixed number of rounds, each one sum of 2,048 counters over the ranks; ties by
a second search over (token, layer, feature).

Legend: B tokens, K candidates of a token on one rank, G ranks, L layers, N candidates.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.kernels.selection import topk_rows

_DIGIT_BITS = 11


def counts_of_best(scores_BGK: Tensor, layers_BGK: Tensor | None, k: int) -> Tensor:
    """(B, G) int64: how many of each rank's candidates are among the k best of the token.

    scores: -inf where there is none; columns of a rank in order of (layer, feature), ranks in order of features.
    layers: the layer of every column; None: one layer. Ties: the smallest (layer, feature). NaN counts as largest.
    """
    n_columns = scores_BGK.shape[2]
    scores_BC = scores_BGK.flatten(1)
    best_Bk = topk_rows(scores_BC, k, floor=float("-inf"))
    if layers_BGK is not None and k < scores_BC.shape[1]:
        top_Bk = scores_BC.topk(k + 1, dim=1).values
        tied_B = (top_Bk[:, -1] == top_Bk[:, -2]) & (top_Bk[:, -1] > float("-inf"))
        rows = tied_B.nonzero()[:, 0]
        order_RC = layers_BGK.flatten(1)[rows].argsort(dim=1, stable=True)
        best_Rk = topk_rows(scores_BC[rows].gather(1, order_RC), k, floor=float("-inf"))
        best_Bk = best_Bk.index_copy(0, rows, order_RC.gather(1, best_Rk))
    taken_Bk = (scores_BC.gather(1, best_Bk) != float("-inf")).long()
    counts_BG = taken_Bk.new_zeros(scores_BGK.shape[:2])
    return counts_BG.scatter_add_(1, best_Bk // n_columns, taken_Bk)


def mark_best(scores_BK: Tensor, counts_B: Tensor) -> Tensor:
    """(B, K) bool: in each row so many of the largest; among equal ones the first."""
    order_BK = scores_BK.argsort(dim=1, descending=True, stable=True)
    places_K = torch.arange(scores_BK.shape[1], device=scores_BK.device)
    return torch.zeros_like(scores_BK, dtype=torch.bool).scatter(1, order_BK, places_K < counts_B[:, None])


class Boundary(NamedTuple):
    """The n-th largest key; how many equal to it belong to the n; how many there are. All 0-dim."""

    key: Tensor
    wanted: Tensor
    equal: Tensor


def nth_largest(
    keys_N: Tensor, n: int | Tensor, bits: int, add: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Boundary:
    """The n-th largest of the keys (int64, 0 <= key < 2**bits) of all ranks, which have at least n.

    add: sums a tensor of counters of that dtype over the ranks. The rounds are as many as the bits need, whatever the
    keys, and no round waits for the host.
    """
    wanted = torch.as_tensor(n, device=keys_N.device, dtype=torch.int64)
    prefix = torch.zeros((), dtype=torch.int64, device=keys_N.device)
    equal = prefix
    while bits > 0:
        width = min(_DIGIT_BITS, bits)
        bits -= width
        head_N = keys_N >> bits
        digits_N = torch.where((head_N >> width) == prefix, head_N & (2**width - 1), 2**width)
        counters = torch.zeros(2**width + 1, dtype=dtype, device=keys_N.device)
        counters.scatter_add_(0, digits_N, torch.ones_like(digits_N, dtype=dtype))
        counts = add(counters[:-1].contiguous()).long()
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = (at_least >= wanted).sum() - 1
        equal = counts[digit]
        wanted = wanted - (at_least[digit] - equal)
        prefix = (prefix << width) | digit
    return Boundary(prefix, wanted, equal)


def score_keys(scores_N: Tensor) -> tuple[Tensor, int]:
    """Scores >= 0 (or NaN, the largest) as int64 keys in the same order, and the number of their bits."""
    if scores_N.dtype == torch.float64:
        keys_N, bits = scores_N.view(torch.int64), 63
    else:
        keys_N, bits = scores_N.float().view(torch.int32).long(), 31
    return torch.where(scores_N.isnan(), 2**bits - 1, keys_N), bits


def mark_largest(
    scores_N: Tensor, ties_N: Tensor, n: int, tie_bits: int, add: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Tensor:
    """(N) bool: those of this rank's candidates that are among the n largest of all ranks, which have more than n.

    ties: int64 below 2**tie_bits, different for all entries of all ranks; among equal scores the smallest win. If the
    n-th largest is NaN all NaN are kept, as `trainer.kernels.selection.largest` does.
    """
    keys_N, bits = score_keys(scores_N)
    found = nth_largest(keys_N, n, bits, add, dtype)
    kept_N: Tensor = keys_N >= found.key
    if bool((found.equal == found.wanted) | (found.key == 2**bits - 1)):
        return kept_N
    # The smallest tie keys are the largest of their complements.
    equal_N = keys_N == found.key
    complements_N = 2**tie_bits - 1 - ties_N
    last = nth_largest(complements_N[equal_N], found.wanted, tie_bits, add, dtype).key
    chosen_N: Tensor = (keys_N > found.key) | (equal_N & (complements_N >= last))
    return chosen_N
