"""sparse_decode in Triton: a program per (token, chunk of columns), sums in registers, no atomics.

All tokens of a chunk come before the next chunk: the chunk of the table then stays in the L2 cache, and memory
delivers every row about once instead of once per active entry. Legend: see trainer.kernels.sparse_decode.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels import sparse_decode as reference
from trainer.kernels.gpu.compile import CompileCase
from trainer.kernels.gpu.launch import blocks, chunk_columns, gathered_table, has_kernel, run
from trainer.kernels.strides import check_written

# Rows in flight per program: 8 chunks of 512 bytes in 64 registers, so 32 programs share an SM.
_ENTRIES = 8


def sparse_decode(
    y_BC: Tensor, offsets: Tensor, feature_ids_N: Tensor, values_N: Tensor, rows_FC: Tensor, compute_dtype: torch.dtype
) -> None:
    """Add the active rows to `y_BC`, summing in float32. Other dtypes are done by the reference."""
    if not has_kernel(y_BC, values_N, rows_FC, compute_dtype=compute_dtype):
        reference.sparse_decode(y_BC, offsets, feature_ids_N, values_N, rows_FC, compute_dtype)
        return
    check_written(y_BC=y_BC)
    n_tokens, n_columns = y_BC.shape
    if feature_ids_N.numel() == 0:
        return
    table, round_table = gathered_table(rows_FC, feature_ids_N.numel(), compute_dtype)
    chunk = chunk_columns(table)
    run(
        _decode,
        (n_tokens, blocks(n_columns, chunk)),
        y_BC,
        y_BC,
        offsets.contiguous(),
        feature_ids_N.contiguous(),
        values_N.to(compute_dtype).contiguous(),
        table,
        n_columns,
        y_BC.stride(0),
        table.stride(0),
        ROUND=round_table,
        CHUNK=chunk,
        ENTRIES=_ENTRIES,
    )


@triton.jit
def _decode(
    y,
    offsets,
    feature_ids,
    values,
    table,
    n_columns,
    y_stride,
    table_stride,
    ROUND: tl.constexpr,
    CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Program (token, chunk): y[token, chunk] += sum over the token's entries, in their order."""
    token = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + token)
    end = tl.load(offsets + token + 1)
    if begin == end:
        return
    cols = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = cols < n_columns
    total = tl.zeros([CHUNK], tl.float32)
    for n in range(begin, end, ENTRIES):
        entries = n + tl.arange(0, ENTRIES)
        live = entries < end
        ids = tl.load(feature_ids + entries, mask=live, other=0)
        weights = tl.load(values + entries, mask=live, other=0.0).to(tl.float32)
        places = ids[:, None] * table_stride + cols[None, :]
        rows = tl.load(table + places, mask=live[:, None] & inside[None, :], other=0.0)
        if ROUND:
            rows = rows.to(tl.bfloat16)
        total += tl.sum(weights[:, None] * rows.to(tl.float32), axis=0)
    # y is streamed; the cache is for the table.
    places = y + token * y_stride + cols
    before = tl.load(places, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    tl.store(places, before + total, mask=inside, eviction_policy="evict_first")


def _case(name: str, values: str, table: str, *, rounded: bool, chunk: int) -> CompileCase:
    types = {"y": "*fp32", "offsets": "*i64", "feature_ids": "*i64", "values": values, "table": table}
    sizes = dict.fromkeys(("n_columns", "y_stride", "table_stride"), "i32:16")
    constexprs = {"ROUND": rounded, "CHUNK": chunk, "ENTRIES": _ENTRIES}
    return CompileCase(name=name, kernel=_decode, signature=types | sizes, constexprs=constexprs, num_warps=1)


COMPILE_CASES = [
    _case("decode fp32", "*fp32", "*fp32", rounded=False, chunk=128),
    _case("decode bf16", "*bf16", "*bf16", rounded=False, chunk=256),
    _case("decode bf16 from fp32", "*bf16", "*fp32", rounded=True, chunk=128),
    _case("half a chunk: decode bf16", "*bf16", "*bf16", rounded=False, chunk=128),
]
