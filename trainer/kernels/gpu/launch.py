"""How the sparse kernels cut their work: chunks of columns, and which operand is rounded where."""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from trainer.kernels.strides import dense_columns

# A table is copied to 16 bits before the gathers when its rows are read more often than this on average: the copy
# moves 6 bytes a value, a gather from the copy 2 instead of 4.
_READS_WORTH_A_COPY = 3

# What training offers. float16 goes to the reference like float64: a range for its sums and gradients is nobody's here.
KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def has_kernel(*tensors: Tensor, compute_dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels take these dtypes; others go to the reference."""
    return all(dtype in KERNEL_DTYPES for dtype in (compute_dtype, *(tensor.dtype for tensor in tensors)))


def chunk_columns(table_RC: Tensor) -> int:
    """Columns that one program handles: 512 bytes of a row, or 256 where only these make the chunk fit the cache.

    All programs of a chunk run before those of the next one, so that a gathered chunk is read from memory once.
    """
    row_bytes, room = 512, cache_bytes(table_RC.device)
    if 256 * table_RC.shape[0] <= room < row_bytes * table_RC.shape[0]:
        row_bytes = 256
    return row_bytes // table_RC.element_size()


@cache
def cache_bytes(device: torch.device) -> int:
    """Half of the L2 cache, whose two halves may hold the same line twice; in the interpreter that of an H200."""
    if device.type != "cuda":
        return 25 * 2**20
    return int(torch.cuda.get_device_properties(device).L2_cache_size) // 2


def gathered_table(table_RC: Tensor, n_entries: int, compute_dtype: torch.dtype) -> tuple[Tensor, bool]:
    """The table to gather from, dense in a row, and whether the kernel still has to round its values to bfloat16."""
    table_RC = dense_columns(table_RC)
    if not rounds(table_RC, compute_dtype):
        return table_RC, False
    if n_entries > _READS_WORTH_A_COPY * table_RC.shape[0]:
        return table_RC.to(compute_dtype), False
    return table_RC, True


def rounds(tensor: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether products in `compute_dtype` (float32 or bfloat16) round this operand."""
    return compute_dtype == torch.bfloat16 and tensor.dtype != torch.bfloat16


def run(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, num_warps: int = 1, **constexprs: Any) -> None:
    """Launch on the device of `like`."""
    if 0 in grid:
        return
    with torch.cuda.device_of(like):
        kernel[grid](*args, num_warps=num_warps, **constexprs)


def blocks(n: int, size: int) -> int:
    """Number of blocks of `size` that cover n."""
    return int(triton.cdiv(n, size))
