"""encode_candidates and batch_threshold, compiled.

The n-th largest score is guessed from the first block of tokens; blocks then give their entries above the guess, and
where these are at least n the n best of them are exact. Where not, the guess is lowered and the layer runs again.

Legend: B tokens, D d_model, F features, N candidates.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.kernels import batch_threshold as reference
from trainer.kernels.batch_threshold import Candidates
from trainer.kernels.cpu.above import Bound, entries_above
from trainer.kernels.cpu.compiling import (
    block_of,
    bool_array,
    candidate_key,
    float32_array,
    helper,
    int32_array,
    int64_array,
    kernel,
    next_part,
    order_key,
)
from trainer.kernels.cpu.largest import Keys, count_at_least, kth_largest
from trainer.kernels.cpu.products import blocks, float32_product, has_bfloat16_units
from trainer.kernels.cpu.support import covers
from trainer.kernels.cpu.threads import launch

_NAN_KEY = 0x7FFFFFFF
# Features in a group whose maximum stands for it in the guess, and tokens of a part.
_GROUP = 16
_TOKENS = 8
# The guess aims at so many times the entries wanted, and after a miss at so many times more.
_AIM, _AIM_FACTOR = 1.3, 4.0
# A list this many times as long as wanted is cut down before it grows on.
_KEEP = 4


def encode_candidates(
    x_BD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor,
    n: int,
    floor: float,
    norm_F: Tensor | None,
    compute_dtype: torch.dtype,
) -> Candidates:
    """See the reference; other dtypes than float32 go to it."""
    if not covers(compute_dtype, x_BD, weight_FD, bias_F, norm_F) or 0 in (*x_BD.shape, weight_FD.shape[0], n):
        return reference.encode_candidates(x_BD, weight_FD, bias_F, n, floor, norm_F, compute_dtype)
    bias_F, norm_F = bias_F.contiguous(), norm_F.contiguous() if norm_F is not None else None
    lowest, aim = _key_of(floor), _AIM
    if lowest > 1:
        return _best(_reaching(x_BD, weight_FD, bias_F, n, lowest, norm_F), n)
    first_RF = _first_block(x_BD, weight_FD)
    while True:
        wanted = int(aim * n * first_RF.shape[0] / x_BD.shape[0]) + 1
        key = max(lowest, _guess(first_RF, bias_F, norm_F, wanted))
        found = _reaching(x_BD, weight_FD, bias_F, n, key, norm_F)
        if key == lowest or found.scores.numel() >= n:
            return _best(found, n)
        aim *= _AIM_FACTOR


def batch_threshold(layers: list[Candidates], n: int, n_features: int) -> list[Tensor]:
    """See the reference; other dtypes than float32 go to it."""
    if not covers(torch.float32, *(layer.scores for layer in layers)):
        return reference.batch_threshold(layers, n, n_features)
    sizes = [layer.scores.numel() for layer in layers]
    scores_N = torch.cat([layer.scores for layer in layers])
    if n >= scores_N.numel():
        return list(torch.split(torch.ones_like(scores_N, dtype=torch.bool), sizes))
    kept_N, tied_N, room = _above(scores_N, n)
    tied = tied_N.nonzero()[:, 0]
    if tied.numel() > room:
        ranks = torch.cat([layer.positions for layer in layers])[tied]
        layer_ids = torch.repeat_interleave(torch.arange(len(layers)), torch.tensor(sizes))[tied]
        ranks = (ranks // n_features * len(layers) + layer_ids) * n_features + ranks % n_features
        tied = tied[ranks.argsort()]
    kept_N[tied[:room]] = True
    return list(torch.split(kept_N, sizes))


def _best(found: Candidates, n: int) -> Candidates:
    """The n best of one layer's candidates, which are in order of positions."""
    if found.scores.numel() <= n:
        return found
    kept_N, tied_N, room = _above(found.scores, n)
    kept_N[tied_N.nonzero()[:room, 0]] = True
    return found.keep(kept_N)


def _above(scores_N: Tensor, n: int) -> tuple[Tensor, Tensor, int]:
    """Which scores exceed the n-th largest, which equal it, and how many of the latter there is room for."""
    size = scores_N.numel()
    keys_N = torch.empty(size, dtype=torch.int32)
    kept_N, tied_N = torch.empty(size, dtype=torch.bool), torch.empty(size, dtype=torch.bool)
    room = torch.zeros(1, dtype=torch.int64)
    launch(_find_boundary, 1, size, n, scores_N.contiguous(), keys_N, kept_N, tied_N, room)
    return kept_N, tied_N, int(room)


def _reaching(x_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, n: int, key: int, norm_F: Tensor | None) -> Candidates:
    """Entries whose key reaches the bound; only the n best of them where they are many."""
    n_features = weight_FD.shape[0]
    bound = _bound(key, bias_F, norm_F)
    found = Candidates(torch.zeros(0, dtype=torch.int64), bias_F.new_zeros(0), bias_F.new_zeros(0))
    pending: list[Candidates] = []
    first = 0
    for entries in entries_above(x_BD, weight_FD, bias_F, bound):
        n_rows = entries.counts.numel()
        tokens_N = torch.arange(first, first + n_rows).repeat_interleave(
            entries.counts, output_size=entries.ids.numel()
        )
        scores_N = entries.values if norm_F is None else entries.values * norm_F[entries.ids]
        pending.append(Candidates(entries.ids.add_(tokens_N, alpha=n_features), entries.values, scores_N))
        first += n_rows
        if sum(part.scores.numel() for part in pending) > _KEEP * n:
            pending = [_best(_joined([found, *pending]), n)]
            found = Candidates(*(t[:0] for t in found))
    return _joined([found, *pending])


def _joined(parts: list[Candidates]) -> Candidates:
    return Candidates(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _bound(key: int, bias_F: Tensor, norm_F: Tensor | None) -> Bound:
    """Entries with pre > 0 and a key that reaches `key`; the screen is the pre-activation of that score."""
    zeros_F = torch.zeros_like(bias_F)
    score = float(torch.tensor(min(key, 0x7F800001) - 1, dtype=torch.int32).view(torch.float32))
    screen_F = zeros_F
    if key > 1:
        screen_F = zeros_F + score if norm_F is None else (score / norm_F)
        # Finite, also where a norm is zero (no score reaches the bound) or the bound is infinite.
        screen_F = (screen_F * (1 - 2.0**-20)).clamp(max=1e30)
    return Bound(theta_F=zeros_F, shift=0.0, screen_F=screen_F, norm_F=norm_F, key=key)


def _key_of(score: float) -> int:
    """candidate_key of a score."""
    if score != score:  # noqa: PLR0124
        return _NAN_KEY
    return int(torch.tensor(score, dtype=torch.float32).view(torch.int32)) + 1 if score > 0 else 1


def _first_block(x_BD: Tensor, weight_FD: Tensor) -> Tensor:
    """Products of the first block of tokens, for the guess; in bf16 where that is fast."""
    block = next(blocks(x_BD.shape[0], weight_FD.shape[0]))
    if has_bfloat16_units():
        return (x_BD[block].bfloat16() @ weight_FD.bfloat16().t()).float()
    return float32_product(x_BD[block], weight_FD)


def _guess(product_RF: Tensor, bias_F: Tensor, norm_F: Tensor | None, wanted: int) -> int:
    """A key that about so many entries of the block reach: from the maxima of groups; 0 where there are too few."""
    n_rows, n_features = product_RF.shape
    n_groups = -(-n_features // _GROUP)
    if wanted > n_rows * n_groups // 2:
        return 0
    maxima, result = torch.empty(n_rows, n_groups, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    launch(
        _group_keys,
        -(-n_rows // _TOKENS),
        n_rows,
        n_features,
        product_RF,
        bias_F,
        norm_F if norm_F is not None else 0,
        maxima,
    )
    launch(_kth_key, 1, maxima.numel(), wanted, maxima, result)
    return int(result)


@kernel
def _group_keys(pointer: Any) -> None:
    a = block_of(pointer)
    n_rows, n_features = a[2], a[3]
    n_groups = -(-n_features // _GROUP)
    product, bias = float32_array(a[4], n_rows * n_features), float32_array(a[5], n_features)
    has_norm = a[6] != 0
    norm, maxima = float32_array(a[6] if has_norm else a[5], n_features), int32_array(a[7], n_rows * n_groups)
    part = next_part(pointer)
    while part < a[1]:
        for r in range(part * _TOKENS, min((part + 1) * _TOKENS, n_rows)):
            row = product[r * n_features : (r + 1) * n_features]
            for g in range(n_groups):
                best = np.int32(0)
                for f in range(g * _GROUP, min((g + 1) * _GROUP, n_features)):
                    pre = row[f] + bias[f]
                    key = candidate_key(pre, pre * norm[f] if has_norm else pre)
                    best = key if key > best else best
                maxima[r * n_groups + g] = best
        part = next_part(pointer)


@kernel
def _kth_key(pointer: Any) -> None:
    a = block_of(pointer)
    int64_array(a[5], 1)[0] = kth_largest(int32_array(a[4], a[2]), a[3], 31)
    next_part(pointer)


@kernel
def _find_boundary(pointer: Any) -> None:
    """Orders the scores by keys, finds the n-th largest, and marks what lies above and at it."""
    a = block_of(pointer)
    size, n = a[2], a[3]
    scores, keys = float32_array(a[4], size), int32_array(a[5], size)
    kept, tied, room = bool_array(a[6], size), bool_array(a[7], size), int64_array(a[8], 1)
    for i in range(size):
        # -0.0 becomes 0.0.
        keys[i] = order_key(scores[i] + np.float32(0))
    boundary = _nth_signed(keys, n)
    above = 0
    for i in range(size):
        kept[i] = keys[i] > boundary
        tied[i] = keys[i] == boundary
        above += keys[i] > boundary
    room[0] = n - above


@helper
def _nth_signed(keys: Keys, n: int) -> np.int32:
    """The n-th largest of any int32 keys."""
    bound = -(2**31)
    for bit in range(31, -1, -1):
        trial = bound + (1 << bit)
        if count_at_least(keys, np.int32(trial)) >= n:
            bound = trial
    return np.int32(bound)
