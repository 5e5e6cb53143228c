"""build_csc on CUDA: torch's stable sort of the shortest keys, and the offsets by a binary search in the sorted keys.

No kernel of its own. The sort is cub's radix sort: two passes for up to 32,768 features (int16 keys), four for more. It
moves about 40 bytes an entry, where gathering the entry's rows moves thousands, and a counting sort that places entries
stably would need as many passes. torch.bincount makes the host wait; the search does not, and counts nothing twice.
"""

import torch
from torch import Tensor

from trainer.kernels.build_csc import FeatureIndex


def build_csc(feature_ids_N: Tensor, tokens_N: Tensor, n_features: int) -> FeatureIndex:
    """See the reference."""
    dtype = next(d for d in (torch.int16, torch.int32, torch.int64) if n_features - 1 <= torch.iinfo(d).max)
    keys_N, order_N = torch.sort(feature_ids_N.to(dtype), stable=True)
    offsets = torch.full((n_features + 1,), keys_N.numel(), dtype=torch.int64, device=keys_N.device)
    features = torch.arange(n_features, dtype=dtype, device=keys_N.device)
    torch.searchsorted(keys_N, features, out=offsets[:-1])
    return FeatureIndex(order_N, tokens_N[order_N], offsets)
