"""Pre-activations of one source layer, a block of tokens at a time: cuBLAS's product in one buffer that is used again.

The selection reads a block's product right after it was written, and no (B, F) tensor of all tokens exists.

Legend: B tokens, R tokens of a block, D d_model, F features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from trainer.kernels.gpu.launch import KERNEL_DTYPES, blocks

# Product and scratch of one block: this, or where that is more the given part of a GPU's memory (1.5 GiB of 140: 16,384
# tokens of F = 32,768 in bf16). Every block ends with SMs idle, and where the size of a result is not known before with
# a wait of the host; larger blocks take memory, on one device while nothing else of a step is there.
_BLOCK_BYTES = 384 * 2**20
_PART_OF_MEMORY = 96
# Tokens of a tile of the matrix product.
_TILE_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Tokens first : first + R of the microbatch; pre = product + bias (float32), or product where bias is None."""

    first: int
    product_RF: Tensor
    bias_F: Tensor | None

    @property
    def n_tokens(self) -> int:
        """R."""
        return self.product_RF.shape[0]


def has_encoder(weight_FD: Tensor, bias_F: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether the encoder's kernels take these dtypes; others go to the reference."""
    return all(dtype in KERNEL_DTYPES for dtype in (weight_FD.dtype, bias_F.dtype, compute_dtype))


@cache
def block_bytes(device: torch.device) -> int:
    """Bytes of one block on that device, the same whatever else lies there."""
    if device.type != "cuda":
        return _BLOCK_BYTES
    return max(_BLOCK_BYTES, torch.cuda.get_device_properties(device).total_memory // _PART_OF_MEMORY)


def block_tokens(n_tokens: int, row_bytes: int, device: torch.device) -> int:
    """R: equal blocks of at most `block_bytes`, whole tiles where there is more than one."""
    n_blocks = blocks(max(n_tokens, 1), max(block_bytes(device) // row_bytes, 1))
    even = blocks(max(n_tokens, 1), n_blocks)
    return even if n_blocks == 1 or even < _TILE_TOKENS else even // _TILE_TOKENS * _TILE_TOKENS


def token_blocks(
    x_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, compute_dtype: torch.dtype, tokens: int
) -> Iterator[Block]:
    """Blocks of `tokens` tokens in order; each is overwritten by the next.

    One dtype throughout: the product contains the bias, as torch.nn.functional.linear gives it.
    """
    fused = compute_dtype == weight_FD.dtype == bias_F.dtype
    x_BD, weight_DF = x_BD.to(compute_dtype), weight_FD.to(compute_dtype).t()
    buffer = x_BD.new_empty(min(tokens, x_BD.shape[0]), bias_F.numel())
    for first in range(0, x_BD.shape[0], tokens):
        x_RD = x_BD[first : first + tokens]
        product_RF = buffer[: x_RD.shape[0]]
        if fused:
            torch.addmm(bias_F, x_RD, weight_DF, out=product_RF)
        else:
            torch.mm(x_RD, weight_DF, out=product_RF)
        yield Block(first=first, product_RF=product_RF, bias_F=None if fused else bias_F.contiguous())
