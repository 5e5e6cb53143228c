"""The n-th largest of many integers, by histograms of their bits; the histograms may be summed over devices.

A round takes the next 8 bits of the keys that agree with the bits found so far. Counts are integers, so that the order
of the atomic additions does not show. Nothing waits for the device.

Legend: N keys.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.gpu.compile import CompileCase
from trainer.kernels.gpu.groups import LARGEST_MARK
from trainer.kernels.gpu.launch import blocks, run

# 8 bits a round: Triton's histogram of a warp takes some instructions a key and bin that a thread keeps, 8 of 256 bins.
# (With 11 bits, of which 31 need 3 rounds in place of 4, 64 of 2,048: 2,200 instructions for 8 keys a thread.)
_BITS, _BINS = 8, 256
_WARPS = 8
# 16 keys a thread.
_BLOCK = 4096
# A program counts this many blocks in its own memory before it adds to the common counters.
_PROGRAMS = 1024
MARK_BITS = 31
# 23 bits remain of a mark: the exponent and 15 bits of the mantissa. With 7, all of a block passed where scores are
# close to one another.
_LEFT = 1

# Adds integer counts of all devices; the identity on one.
Reduce = Callable[[Tensor], Tensor]


def alone(counts: Tensor) -> Tensor:
    """The sum over one device."""
    return counts


def marks_from_scores(scores_N: Tensor) -> Tensor:
    """int32 marks >= 1 of scores that are not negative, in their order; NaN largest (see groups.py)."""
    bits_N = scores_N.float().contiguous().view(torch.int32).clamp_min(0) + 1
    return bits_N.masked_fill_(scores_N.isnan(), LARGEST_MARK)


def nth_largest(
    keys_N: Tensor, n: int | Tensor, bits: int, reduce: Reduce = alone, *, leave: int = 0
) -> tuple[Tensor, Tensor]:
    """The n-th largest of int32 or int64 keys, 0 <= key < 2**bits, and how many that equal it are among the n largest.

    Both 0-dim int64. n >= 1; over fewer keys: the result is 0. With `reduce`, of the keys of all devices.
    leave: so many rounds less, of keys without their last 8 * leave bits.
    """
    keys_N, rounds = keys_N.contiguous(), blocks(bits, _BITS)
    counts = torch.zeros(rounds, _BINS, dtype=torch.int64, device=keys_N.device)
    state = torch.zeros(2, dtype=torch.int64, device=keys_N.device)
    state[1] = n
    n_blocks = blocks(keys_N.numel(), _BLOCK)
    programs = min(n_blocks, _PROGRAMS)
    for i in range(rounds - leave):
        shift = _BITS * (rounds - 1 - i)
        run(
            _count,
            (programs,),
            keys_N,
            counts[i],
            keys_N,
            state,
            keys_N.numel(),
            shift,
            BINS=_BINS,
            BITS=_BITS,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
        run(_descend, (1,), keys_N, state, reduce(counts[i]), BINS=_BINS, num_warps=_WARPS)
    return state[0], state[1]


def bound_of_nth(marks_N: Tensor, n: int) -> Tensor:
    """A lower bound (0-dim int32) on the n-th largest mark, by 2**-15 of its score at most, in a round less."""
    leading, _ = nth_largest(marks_N, n, MARK_BITS, leave=_LEFT)
    return (leading << _BITS * _LEFT).int()


def largest(keys_N: Tensor, n: int, tie_keys_N: Tensor | None = None, reduce: Reduce = alone) -> Tensor:
    """(N) bool: the n largest marks; among equal ones the smallest tie key wins (default: the position, one device).

    With `reduce` every device holds its own keys, and tie keys differ between devices; all must call. With tie keys the
    host waits, to learn whether they matter.
    """
    if n == 0:
        return torch.zeros_like(keys_N, dtype=torch.bool)
    bound, missing = nth_largest(keys_N, n, MARK_BITS, reduce)
    equal_N = keys_N == bound
    if tie_keys_N is None:
        return (keys_N > bound) | (equal_N & (equal_N.cumsum(0) <= missing))
    if bool(reduce(equal_N.sum()) <= missing):
        return keys_N >= bound
    keys_of_ties_N = torch.where(equal_N, 2**62 - tie_keys_N, 0)
    last, _ = nth_largest(keys_of_ties_N, missing, 63, reduce)
    return (keys_N > bound) | (equal_N & (keys_of_ties_N >= last))


@triton.jit
def _count(counts, keys, state, n, shift, BINS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Program: every n_programs-th block. Adds the histogram of the keys' digits at `shift`."""
    known = tl.load(state)
    total = tl.zeros([BINS], tl.int32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        places = start + tl.arange(0, BLOCK)
        key = tl.load(keys + places, mask=places < n, other=0).to(tl.int64)
        live = (places < n) & ((key >> shift >> BITS) == known)
        total += tl.histogram(((key >> shift) & (BINS - 1)).to(tl.int32), BINS, mask=live)
    tl.atomic_add(counts + tl.arange(0, BINS), total.to(tl.int64), mask=total > 0, sem="relaxed")


@triton.jit
def _descend(state, counts, BINS: tl.constexpr):
    """One program: appends to state[0] the digit of the state[1]-th largest key, and takes those above it off."""
    wanted = tl.load(state + 1)
    places = tl.arange(0, BINS)
    # Digits descend.
    count = tl.load(counts + (BINS - 1 - places))
    reached = tl.cumsum(count, axis=0)
    digit = tl.minimum(tl.sum((reached < wanted).to(tl.int32), axis=0), BINS - 1)
    above = tl.sum(tl.where(places < digit, count, 0), axis=0)
    tl.store(state, tl.load(state) * BINS + BINS - 1 - digit)
    tl.store(state + 1, wanted - above)


COMPILE_CASES = [
    *(
        CompileCase(
            name=f"histogram of {keys} keys",
            kernel=_count,
            signature={"counts": "*i64", "keys": f"*{keys}", "state": "*i64", "n": "i32", "shift": "i32"},
            constexprs={"BINS": _BINS, "BITS": _BITS, "BLOCK": _BLOCK},
            num_warps=_WARPS,
        )
        for keys in ("i32", "i64")
    ),
    CompileCase(
        name="descent into a histogram",
        kernel=_descend,
        signature={"state": "*i64", "counts": "*i64"},
        constexprs={"BINS": _BINS},
        num_warps=_WARPS,
    ),
]
