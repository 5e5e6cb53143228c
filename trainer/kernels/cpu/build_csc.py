"""build_csc, compiled: a counting sort. Chunks of entries are counted, then placed, each by one thread.

A stable sort has one result, so the number of chunks does not show in it.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.kernels.build_csc import FeatureIndex
from trainer.kernels.cpu.compiling import block_of, int64_array, kernel, next_part
from trainer.kernels.cpu.threads import launch

# Entries of a chunk at least: below this a second thread's histogram costs more than it saves.
_CHUNK = 2**15
_MAX_CHUNKS = 16


def build_csc(feature_ids_N: Tensor, tokens_N: Tensor, n_features: int) -> FeatureIndex:
    """See the reference."""
    ids_N, tokens_N = feature_ids_N.contiguous(), tokens_N.contiguous()
    n = ids_N.numel()
    chunks = max(1, min(n // max(_CHUNK, n_features), _MAX_CHUNKS))
    starts = ids_N.new_zeros(chunks, n_features)
    offsets = ids_N.new_empty(n_features + 1)
    order_N, sorted_N = torch.empty_like(ids_N), torch.empty_like(ids_N)
    shared = (n, n_features, chunks, ids_N, starts)
    launch(_count, chunks, *shared)
    launch(_scan, 1, *shared, offsets)
    launch(_place, chunks, *shared, tokens_N, order_N, sorted_N)
    return FeatureIndex(order_N, sorted_N, offsets)


@kernel
def _count(pointer: Any) -> None:
    a = block_of(pointer)
    n, n_features, chunks = a[2], a[3], a[4]
    ids, starts = int64_array(a[5], n), int64_array(a[6], chunks * n_features)
    part = next_part(pointer)
    while part < a[1]:
        mine = starts[part * n_features : (part + 1) * n_features]
        for i in range(n * part // chunks, n * (part + 1) // chunks):
            mine[ids[i]] += 1
        part = next_part(pointer)


@kernel
def _scan(pointer: Any) -> None:
    """Counts become the places of each chunk's first entry of a feature."""
    a = block_of(pointer)
    n_features, chunks = a[3], a[4]
    starts, offsets = int64_array(a[6], chunks * n_features), int64_array(a[7], n_features + 1)
    total = 0
    for f in range(n_features):
        offsets[f] = total
        for chunk in range(chunks):
            count = starts[chunk * n_features + f]
            starts[chunk * n_features + f] = total
            total += count
    offsets[n_features] = total


@kernel
def _place(pointer: Any) -> None:
    a = block_of(pointer)
    n, n_features, chunks = a[2], a[3], a[4]
    ids, starts = int64_array(a[5], n), int64_array(a[6], chunks * n_features)
    tokens, order, sorted_tokens = int64_array(a[7], n), int64_array(a[8], n), int64_array(a[9], n)
    part = next_part(pointer)
    while part < a[1]:
        mine = starts[part * n_features : (part + 1) * n_features]
        for i in range(n * part // chunks, n * (part + 1) // chunks):
            place = mine[ids[i]]
            mine[ids[i]] = place + 1
            order[place] = i
            sorted_tokens[place] = tokens[i]
        part = next_part(pointer)
