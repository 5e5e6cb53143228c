"""Storage dtypes: rows of activations to what is stored of them, and back to float32 on any device.

16 and 32 bits are stored as they are. The 8-bit dtypes have one scale per token and layer, an array of its own
(`mlp_in_scale`, `mlp_out_scale`): x is about value * scale, and the largest |x| of a token and layer is the largest
value of the dtype (127 or 448).

Letters: D d_model; `...` any leading axes (rows; rows and layers).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_store.config import StoreDtype

# zarr knows no bfloat16 and no float8: their bits are stored, and `logical_dtype` in the array's attributes says what
# they mean.
NUMPY_DTYPES = {
    StoreDtype.float32: "<f4",
    StoreDtype.float16: "<f2",
    StoreDtype.bfloat16: "<u2",
    StoreDtype.int8: "|i1",
    StoreDtype.float8_e4m3: "|u1",
}
TORCH_DTYPES = {
    StoreDtype.float32: torch.float32,
    StoreDtype.float16: torch.float16,
    StoreDtype.bfloat16: torch.bfloat16,
    StoreDtype.int8: torch.int8,
    StoreDtype.float8_e4m3: torch.float8_e4m3fn,
}
# Largest stored value of the dtypes that have a scale.
_LARGEST = {StoreDtype.int8: 127.0, StoreDtype.float8_e4m3: 448.0}
# Rows below this are stored as zeros: their scale, or what is divided by it, would leave float32's normal numbers.
_TINY = 1e-30
_HALF_PER_FLOAT8 = 256.0


@dataclass(frozen=True, slots=True)
class Encoded:
    """What is stored of rows: `values` (..., D) in the store's dtype, and `scale` (...) float32 where it has one."""

    values: Tensor
    scale: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Any) -> "Encoded":
        """Some of the leading axes, as of a tensor."""
        return Encoded(self.values[rows], None if self.scale is None else self.scale[rows])

    def cpu(self) -> "Encoded":
        """Contiguous on the CPU."""
        scale = None if self.scale is None else self.scale.cpu().contiguous()
        return Encoded(self.values.cpu().contiguous(), scale)

    def finite(self) -> Tensor:
        """Which vectors are wholly finite as stored, (...) bool: not those out of range of a 16-bit dtype."""
        return torch.isfinite(self.values).all(-1) if self.scale is None else torch.isfinite(self.scale)


def has_scale(dtype: StoreDtype) -> bool:
    """Whether a dtype has a scale per token and layer."""
    return dtype in _LARGEST


def encode(x: Tensor, dtype: StoreDtype) -> Encoded:
    """`x` (..., D), of any floating dtype and on any device, as it is stored; on the same device.

    Values out of range of float16 become infinite; a vector with a non-finite value gets a non-finite scale:
    `Encoded.finite` tells. Rounds to nearest, ties to even.
    """
    if dtype not in _LARGEST:
        return Encoded(x.to(TORCH_DTYPES[dtype]))
    wide = x.float()
    largest = wide.abs().amax(-1)
    scale = torch.where(largest < _TINY, 0.0, largest / _LARGEST[dtype])
    ratio = wide / torch.where(scale == 0, 1.0, scale)[..., None]
    ratio.mul_((scale != 0)[..., None]).clamp_(-_LARGEST[dtype], _LARGEST[dtype])
    if dtype is StoreDtype.int8:
        # NaN has no integer; its scale tells.
        ratio.nan_to_num_(0.0).round_()
    return Encoded(ratio.to(TORCH_DTYPES[dtype]), scale)


def decode(encoded: Encoded, out: Tensor | None = None) -> Tensor:
    """The float32 rows (..., D), into `out` if given; the same numbers on every device."""
    if out is None:
        out = torch.empty(encoded.values.shape, dtype=torch.float32, device=encoded.values.device)
    values, scale = encoded.values, encoded.scale
    if values.dtype is torch.float8_e4m3fn and values.device.type == "cpu":
        out.copy_(_half_of_float8(values)).mul_(_HALF_PER_FLOAT8)
    else:
        out.copy_(values)
    if scale is not None:
        out.mul_(scale[..., None])
    return out


def _half_of_float8(values: Tensor) -> Tensor:
    """The float16 numbers that are 2^-8 of the given ones (e4m3, finite): 5 times faster than torch's conversion.

    Sign, exponent and fraction are moved to their places in a float16, whose exponent is biased by 8 more.
    """
    bits = values.view(torch.int8).to(torch.int16)
    # The sign was extended: it is in bit 15 and, to be cleared, in bit 14.
    return bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16)


def stored_bits(values: Tensor) -> np.ndarray[Any, Any]:
    """The numpy array that the bytes of stored values on the CPU are (bfloat16 as uint16, float8 as uint8)."""
    if values.dtype is torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16)
    if values.dtype is torch.float8_e4m3fn:
        return values.view(torch.uint8).numpy()
    return values.numpy()


def from_bits(bits: np.ndarray[Any, Any], dtype: StoreDtype) -> Tensor:
    """The tensor over the bytes of a stored array; inverse of `stored_bits`, without a copy."""
    if dtype is StoreDtype.bfloat16:
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    if dtype is StoreDtype.float8_e4m3:
        return torch.from_numpy(bits).view(torch.float8_e4m3fn)
    return torch.from_numpy(bits)
