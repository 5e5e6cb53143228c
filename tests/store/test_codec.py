"""Storage dtypes against what their definition says, computed in float64."""

import pytest
import torch

from activation_store.codec import Encoded, decode, encode, from_bits, has_scale, stored_bits
from activation_store.config import StoreDtype

EIGHT_BITS = [StoreDtype.int8, StoreDtype.float8_e4m3]
# Of float8_e4m3, all finite values by the format's definition: sign, 4 bits of exponent (bias 7), 3 of fraction.
E4M3 = sorted(
    {
        sign * (2.0 ** (exponent - 7) * (1 + m / 8) if exponent else 2.0**-6 * m / 8)
        for sign in (1, -1)
        for exponent in range(16)
        for m in range(8)
        if (exponent, m) != (15, 7)
    }
)


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[-1])


@pytest.mark.parametrize("dtype", list(StoreDtype))
def test_bits_and_encoded_rows_are_inverse(dtype: StoreDtype) -> None:
    encoded = encode(rows(7, 3, 11), dtype)
    assert (encoded.scale is not None) == has_scale(dtype)
    again = from_bits(stored_bits(encoded.values), dtype)
    assert torch.equal(again.view(torch.uint8), encoded.values.view(torch.uint8))
    decoded = decode(Encoded(again, encoded.scale))
    assert decoded.dtype is torch.float32
    assert torch.equal(decode(encoded[2:4, 1]), decoded[2:4, 1])
    # Encoding what was decoded changes nothing more than the rounding of a scale.
    torch.testing.assert_close(decode(encode(decoded, dtype)), decoded, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_each_token_and_layer_has_its_own_scale(dtype: StoreDtype) -> None:
    """Every value is the nearest one that the format has for this scale, in float64."""
    x = rows(5, 4, 33) * torch.tensor([1e-6, 1.0, 1e6, 3e-3])[:, None]
    encoded = encode(x, dtype)
    assert encoded.scale is not None
    assert encoded.scale.shape == (5, 4)
    grid = torch.arange(-127.0, 128.0) if dtype is StoreDtype.int8 else torch.tensor(E4M3)
    scale = encoded.scale.double()[..., None]
    torch.testing.assert_close(scale * grid.max(), x.double().abs().amax(-1, keepdim=True), rtol=1e-7, atol=0)
    best = ((x.double() / scale)[..., None] - grid.double()).abs().amin(-1) * scale
    error = (decode(encoded).double() - x.double()).abs()
    # float32 divides before and multiplies after: a tie may fall the other way, within its rounding.
    assert (error <= best * (1 + 1e-5) + x.double().abs() * 3e-7).all()


def test_float8_decodes_as_torch_does() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    finite = bits[(bits & 0x7F) != 0x7F]
    values = finite.view(torch.float8_e4m3fn)
    assert torch.equal(decode(Encoded(values)), values.float())
    assert sorted(set(decode(Encoded(values)).tolist())) == E4M3


@pytest.mark.parametrize("dtype", list(StoreDtype))
def test_what_is_not_finite_is_told(dtype: StoreDtype) -> None:
    x = rows(4, 2, 9)
    x[1, 0, 3], x[2, 1, 8], x[3, 0, 0] = float("nan"), float("inf"), 1e30
    wanted = torch.ones(4, 2, dtype=torch.bool)
    wanted[1, 0] = wanted[2, 1] = False
    wanted[3, 0] = dtype is not StoreDtype.float16
    assert torch.equal(encode(x, dtype).finite(), wanted)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_zeros_and_tiny_rows_are_zeros(dtype: StoreDtype) -> None:
    x = torch.tensor([[0.0, -0.0, 0.0], [1e-38, -1e-44, 1e-31], [1e-20, -2e-20, 0.0]])
    decoded = decode(encode(x, dtype))
    assert (decoded[:2] == 0).all()
    torch.testing.assert_close(decoded[2], x[2], rtol=0.05, atol=0)
