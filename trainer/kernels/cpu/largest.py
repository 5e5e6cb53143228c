"""Exact k-th largest of int32 keys, and the emission of a row's best entries."""

import numpy as np

from trainer.kernels.cpu.compiling import helper

# Bits of a lower bound that are found: the rest would not exclude much more.
BOUND_BITS = 20
Keys = np.ndarray[tuple[int], np.dtype[np.int32]]
Ints = np.ndarray[tuple[int], np.dtype[np.int64]]
Floats = np.ndarray[tuple[int], np.dtype[np.float32]]


@helper
def count_at_least(keys: Keys, bound: np.int32) -> int:
    """How many keys reach the bound."""
    count = 0
    for i in range(keys.shape[0]):
        count += keys[i] >= bound
    return count


@helper
def kth_largest(keys: Keys, k: int, bits: int) -> np.int32:
    """The k-th largest of non-negative keys, its `bits` highest bits (31: exact, fewer: a lower bound); 0 if < k."""
    bound = np.int32(0)
    for bit in range(30, 30 - bits, -1):
        trial = np.int32(bound | (np.int32(1) << np.int32(bit)))
        if count_at_least(keys, trial) >= k:
            bound = trial
    return bound


@helper
def emit_best(keys: Keys, ids: Keys, values: Floats, k: int, out_ids: Ints, out_values: Floats) -> int:
    """The k entries with the largest keys above 0, in order; among equal ones the first. Returns their number."""
    bound, room = np.int32(1), k
    if keys.shape[0] > k:
        bound = max(kth_largest(keys, k, 31), np.int32(1))
        room = k - count_at_least(keys, np.int32(bound + 1)) if bound < 0x7FFFFFFF else k
    count = 0
    for i in range(keys.shape[0]):
        if keys[i] < bound or (keys[i] == bound and room == 0) or count == k:
            continue
        if keys[i] == bound:
            room -= 1
        out_ids[count] = ids[i]
        out_values[count] = values[i]
        count += 1
    return count
