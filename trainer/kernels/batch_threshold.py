"""batch_threshold: candidates for the n largest entries of a whole microbatch, and their exact threshold.

Legend: B tokens, D d_model, F features, N candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.kernels.encode_topk import masked_scores, pre_activations
from trainer.kernels.selection import largest, lower_bound


class Candidates(NamedTuple):
    """Entries of one layer in order of position = token * F + feature (int64), with pre-activations and scores (N)."""

    positions: Tensor
    values: Tensor
    scores: Tensor

    def keep(self, kept_N: Tensor) -> "Candidates":
        """The entries where `kept_N` is true."""
        return Candidates(self.positions[kept_N], self.values[kept_N], self.scores[kept_N])


def encode_candidates(
    x_BD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor,
    n: int,
    floor: float,
    norm_F: Tensor | None,
    compute_dtype: torch.dtype,
) -> Candidates:
    """The n entries of the layer with the largest score among those with pre > 0 and score >= floor.

    Fewer where fewer qualify. Ties: the smallest (token, feature).
    """
    pre_BF = pre_activations(x_BD, weight_FD, bias_F, compute_dtype)
    scores_BF, base = masked_scores(pre_BF, norm_F)
    floor = max(floor, lower_bound(scores_BF, n))
    # `not <` and `not <=` keep NaN, so that a broken encoder shows in the loss.
    kept_BF = (scores_BF < floor if floor > base else scores_BF <= base).logical_not_()
    positions = kept_BF.view(-1).nonzero()[:, 0]
    found = Candidates(positions, pre_BF.view(-1)[positions], scores_BF.view(-1)[positions])
    return found.keep(largest(found.scores, n)) if positions.numel() > n else found


def batch_threshold(layers: list[Candidates], n: int, n_features: int) -> list[Tensor]:
    """Masks over each layer's candidates: the n with the largest score over all layers.

    Ties: the smallest (token, layer, feature). `layers` are the first layers in order; a running selection may be cut
    to n after every layer without changing the result, because the order is total.
    """
    sizes = [layer.scores.numel() for layer in layers]
    scores = torch.cat([layer.scores for layer in layers])
    keys = torch.cat(
        [
            (layer.positions // n_features * len(layers) + s) * n_features + layer.positions % n_features
            for s, layer in enumerate(layers)
        ]
    )
    return list(torch.split(largest(scores, n, keys), sizes))
