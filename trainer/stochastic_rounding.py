"""Stochastic rounding to 16 bit, with random bits that are a function of (seed, step, name, element) alone.

A value between two neighbours goes up with a probability equal to its distance from the lower one, so that its mean is
the value itself: an update far smaller than the spacing still counts. The bits come from a hash of the element's
number, not from a generator: a resumed run, another device and another chunking draw the same.
"""

from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor


class BitsKey(NamedTuple):
    """Two 32-bit words (as signed numbers) that choose one of 2^64 sequences."""

    first: int
    second: int


def bits_key(seed: int, step: int, name: str) -> BitsKey:
    """The key of one tensor's random bits at one step."""
    digest = blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return BitsKey(_signed(int.from_bytes(digest[:4], "little")), _signed(int.from_bytes(digest[4:], "little")))


def random_bits(key: BitsKey, start: int, count: int, device: torch.device) -> Tensor:
    """(count) int32 with 32 uniform random bits each, of the elements start, start + 1, ... (modulo 2^32).

    A multiply-xorshift hash (the constants are those of "lowbias32"); all arithmetic wraps modulo 2^32.
    """
    x = torch.arange(count, dtype=torch.int32, device=device).add_(_signed(start)).bitwise_xor_(key.first)
    # Shifts of int32 keep the sign; the masks make them those of unsigned numbers.
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).add_(key.second).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def low_half(bits: Tensor) -> Tensor:
    """The low 16 random bits, 0..65535 (int32)."""
    return bits & 0xFFFF


def high_half(bits: Tensor) -> Tensor:
    """The high 16 random bits, 0..65535 (int32)."""
    return (bits >> 16).bitwise_and_(0xFFFF)


def round_to_bfloat16(values: Tensor, random_16: Tensor) -> Tensor:
    """float32 -> bfloat16 with 16 random bits (int32, 0..65535) for each value; infinities and NaN stay.

    Added to the 16 bits of the mantissa that go, they carry into those that stay with the right probability.
    """
    bits = (values.view(torch.int32) + random_16).bitwise_right_shift_(16).to(torch.int16)
    # CUDA's NaN has all bits set: the carry would make it -0.
    return bits.view(torch.bfloat16).masked_fill_(values.isnan(), torch.nan)


def _signed(word: int) -> int:
    """The int32 with the bits of `word` modulo 2^32."""
    return (word + 2**31) % 2**32 - 2**31
