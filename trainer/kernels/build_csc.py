"""build_csc: the entries of a sparse matrix (tokens x features) in order of features.

One stable sort per source layer serves the gradients of the decoder rows for all targets and those of the encoder.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class FeatureIndex(NamedTuple):
    """Feature-major index of N entries.

    order_N: position in token-major order of each entry; tokens_N: its token; offsets: (F+1), the entries of feature f
    are offsets[f]:offsets[f+1]. Within a feature, tokens ascend (the sort is stable), so sums over them have one order.
    """

    order_N: Tensor
    tokens_N: Tensor
    offsets: Tensor

    def contiguous(self) -> "FeatureIndex":
        """Itself, or copies of what is strided."""
        return FeatureIndex(*(part.contiguous() for part in self))


def build_csc(feature_ids_N: Tensor, tokens_N: Tensor, n_features: int) -> FeatureIndex:
    """Feature-major index of token-major entries; all int64."""
    keys_N = feature_ids_N.int() if n_features <= 2**31 - 1 else feature_ids_N
    order_N = torch.sort(keys_N, stable=True).indices
    offsets = torch.zeros(n_features + 1, dtype=torch.int64, device=feature_ids_N.device)
    torch.cumsum(torch.bincount(feature_ids_N, minlength=n_features), dim=0, out=offsets[1:])
    return FeatureIndex(order_N, tokens_N[order_N], offsets)
