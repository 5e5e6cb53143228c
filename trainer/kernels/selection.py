"""Exact largest-k selection with a fixed tie rule, in plain torch.

torch.topk promises no order among equal entries. Every function here lets the smallest position win: the value at the
boundary comes from torch.topk, and only where it is tied are the positions filled in order.
"""

import torch
from torch import Tensor


def topk_rows(scores_BF: Tensor, k: int, *, floor: float) -> Tensor:
    """Positions (B, k), ascending, of the k largest entries of every row; among equal ones the smallest position wins.

    Ties at or below `floor` are left as torch.topk breaks them (the caller drops such entries). NaN counts as largest.
    """
    n_columns = scores_BF.shape[1]
    if k >= n_columns:
        return torch.arange(n_columns, device=scores_BF.device).expand(scores_BF.shape[0], n_columns)
    values_Bk, ids_Bk = torch.topk(scores_BF, k + 1, dim=1)
    boundary_B = values_Bk[:, k - 1]
    tied_B = (boundary_B == values_Bk[:, k]) & (boundary_B > floor)
    ids_Bk = ids_Bk[:, :k]
    if bool(tied_B.any()):
        rows = tied_B.nonzero()[:, 0]
        taken = _fill_ties(scores_BF[rows], boundary_B[rows, None], k)
        ids_Bk = ids_Bk.index_copy(0, rows, taken.nonzero()[:, 1].view(-1, k))
    return ids_Bk.sort(dim=1).values


def _fill_ties(scores_RF: Tensor, boundary_R1: Tensor, k: int) -> Tensor:
    """(R, F) bool: entries above the boundary (NaN among them), and the first equal to it up to k in all."""
    above_RF = ~(scores_RF <= boundary_R1)
    equal_RF = scores_RF == boundary_R1
    missing_R1 = k - above_RF.sum(dim=1, keepdim=True)
    return above_RF | (equal_RF & (equal_RF.cumsum(dim=1) <= missing_R1))


def largest(scores_N: Tensor, n: int, tie_keys_N: Tensor | None = None) -> Tensor:
    """(N) bool: the n largest of a flat list; among equal ones the smallest tie key wins (default: the position)."""
    if n >= scores_N.numel():
        return torch.ones_like(scores_N, dtype=torch.bool)
    if n == 0:
        return torch.zeros_like(scores_N, dtype=torch.bool)
    boundary = torch.topk(scores_N, n, sorted=True).values[-1]
    if bool(boundary.isnan()):
        return scores_N.isnan()
    kept_N = ~(scores_N <= boundary)
    equal = (scores_N == boundary).nonzero()[:, 0]
    missing = n - int(kept_N.sum())
    if equal.numel() > missing and tie_keys_N is not None:
        equal = equal[tie_keys_N[equal].argsort()]
    kept_N[equal[:missing]] = True
    return kept_N


def lower_bound(scores: Tensor, n: int) -> float:
    """A value that at least n entries reach, from one read: the n-th largest of the maxima of groups of entries.

    -inf where the entries are too few for groups. Entries below it cannot be among the n largest.
    """
    flat = scores.reshape(-1)
    group = 64
    while group > 1 and flat.numel() // group < 2 * n:
        group //= 2
    if group == 1 or n == 0:
        return float("-inf")
    maxima = flat[: flat.numel() // group * group].view(-1, group).amax(dim=1)
    return float(torch.topk(maxima, n, sorted=True).values[-1].nan_to_num(nan=float("-inf")))
