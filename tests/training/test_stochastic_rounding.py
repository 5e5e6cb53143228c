"""Random bits against the same hash in numpy; rounding to bfloat16 against its definition and its mean."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from trainer.stochastic_rounding import bits_key, high_half, low_half, random_bits, round_to_bfloat16

CPU = torch.device("cpu")
Words = npt.NDArray[np.uint32]


def _hash(first: int, second: int, elements: Words) -> Words:
    """The definition, in unsigned arithmetic."""
    x = elements ^ np.uint32(first % 2**32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = ((x ^ (x >> np.uint32(15))) + np.uint32(second % 2**32)) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


@pytest.mark.parametrize("start", [0, 12_345, 2**31 - 7, 2**32 - 5, 2**40 + 3])
def test_the_bits_are_the_hash_of_the_elements_number(start: int) -> None:
    key = bits_key(7, 3, "layers.0.W_enc")
    elements = ((start + np.arange(1_001)) % 2**32).astype(np.uint32)
    found = random_bits(key, start, 1_001, CPU).numpy().view(np.uint32)
    np.testing.assert_array_equal(found, _hash(*key, elements))


def test_a_block_of_elements_has_the_bits_that_it_has_in_the_whole() -> None:
    key = bits_key(0, 1, "x")
    whole = random_bits(key, 0, 1_000, CPU)
    assert torch.equal(random_bits(key, 300, 77, CPU), whole[300:377])
    assert not torch.equal(random_bits(bits_key(0, 2, "x"), 0, 1_000, CPU), whole)
    assert not torch.equal(random_bits(bits_key(1, 1, "x"), 0, 1_000, CPU), whole)
    assert not torch.equal(random_bits(bits_key(0, 1, "y"), 0, 1_000, CPU), whole)


def test_the_bits_are_even_and_independent() -> None:
    n = 2**18
    streams = [random_bits(bits_key(0, step, "x"), 0, n, CPU) for step in (1, 2)]
    halves = [half(bits).double() for bits in streams for half in (low_half, high_half)]
    for half in halves:
        assert 0 <= float(half.min()) < float(half.max()) <= 65_535
        counts = torch.bincount((half / 256).long(), minlength=256).double()
        # Chi squared with 255 degrees of freedom: 255 +- 23; eight standard deviations.
        assert float(((counts - n / 256).square() / (n / 256)).sum()) < 255 + 8 * 23
    both = torch.corrcoef(torch.stack([*halves, halves[0].roll(1)]))
    # 1 / sqrt(n) = 0.002; six standard deviations.
    assert float((both - torch.eye(5)).abs().max()) < 0.012


def _neighbours(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 numbers towards zero and away from it, by their bits."""
    toward = (values.view(torch.int32) >> 16) << 16
    return toward.view(torch.float32), (toward + 0x10000).view(torch.float32)


def test_rounding_takes_a_neighbour_and_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=generator) * torch.logspace(-30, 30, 64)
    values[:3] = torch.tensor([1.0, 1.0 + 2**-16, -1.0 - 2**-8])
    toward, away = _neighbours(values)
    n = 20_000
    total = torch.zeros(64, dtype=torch.float64)
    for step in range(n // 1_000):
        bits = random_bits(bits_key(0, step, "x"), 0, 64_000, CPU).view(1_000, 64)
        rounded = round_to_bfloat16(values.expand(1_000, 64).contiguous(), low_half(bits)).float()
        assert bool(((rounded == toward) | (rounded == away)).all())
        total += rounded.double().sum(dim=0)
    share = ((total / n - toward) / (away.double() - toward)).numpy()
    wanted = ((values.double() - toward) / (away.double() - toward)).numpy()
    # Six standard deviations of a share of 20,000 draws.
    np.testing.assert_allclose(share, wanted, rtol=0, atol=6 * 0.5 / n**0.5)
    assert share[0] == 0.0


def test_what_bfloat16_has_stays() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-126, float("inf"), float("-inf"), float("nan")])
    rounded = round_to_bfloat16(exact, torch.full((8,), 65_535, dtype=torch.int32)).float()
    assert torch.equal(rounded[:7], exact[:7])
    assert bool(rounded[7].isnan())


def test_nan_stays_whatever_its_bits() -> None:
    """CUDA's has all bits set, a carry of which would leave -0."""
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, -0x400000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert bool(round_to_bfloat16(nans, torch.full((5,), 65_535, dtype=torch.int32)).isnan().all())
    assert bool(round_to_bfloat16(nans, torch.zeros(5, dtype=torch.int32)).isnan().all())
