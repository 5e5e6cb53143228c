"""sparse_backward in Triton, feature-major: see feature_rows for the cut, trainer.kernels.sparse_backward for the ops.

One pass over a feature's chunk keeps its decoder row in registers and gives, per active token, a dot (the gradient of
the value) and an axpy (the gradient of the row). The gathered chunk of `grad` stays in the L2 cache while all features
pass over it; rows and their gradients are streamed. Rows of features that nobody activates are stored as zeros.

Legend: B tokens, F features, C columns of a row, N entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels import sparse_backward as reference
from trainer.kernels.build_csc import FeatureIndex
from trainer.kernels.gpu.compile import CompileCase
from trainer.kernels.gpu.feature_rows import (
    ENTRIES,
    SEGMENT,
    RowPass,
    gather_sum,
    join_segments,
    long_feature_of,
    plan_pass,
    segment_of,
    sum_dots,
)
from trainer.kernels.gpu.launch import gathered_table, has_kernel, rounds, run
from trainer.kernels.strides import check_written, dense_columns

# What becomes of a row's sum.
_DROP, _STORE, _ADD = 0, 1, 2
# Entries of a feature that are loaded at once for a plain sum: one that is active on 16 k tokens takes 32 rounds.
_SUM_BLOCK = 512


def decoder_backward(
    grad_BC: Tensor,
    rows_FC: Tensor,
    offsets: Tensor,
    feature_ids_N: Tensor,
    tokens_N: Tensor,
    index: FeatureIndex,
    values_N: Tensor,
    compute_dtype: torch.dtype,
    *,
    out_FC: Tensor | None,
    accumulate: bool,
    dots: bool,
) -> Tensor | None:
    """Both gradients of a decoding in one pass, sums in float32. Other dtypes are done by the reference."""
    if not has_kernel(grad_BC, rows_FC, values_N, compute_dtype=compute_dtype):
        return reference.decoder_backward(
            grad_BC, rows_FC, offsets, feature_ids_N, tokens_N, index, values_N, compute_dtype,
            out_FC=out_FC, accumulate=accumulate, dots=dots,
        )  # fmt: skip
    check_written(out_FC=out_FC)
    index, rows_FC = index.contiguous(), dense_columns(rows_FC)
    table, round_table = gathered_table(grad_BC, values_N.numel(), compute_dtype)
    plan = plan_pass(index, table, sums=out_FC is not None, dots=dots)
    mode = _DROP if out_FC is None else _ADD if accumulate else _STORE
    if mode != _DROP or dots:
        out_FC = rows_FC if out_FC is None else out_FC
        weights_N = values_N[index.order_N].to(compute_dtype)
        _sum_rows(plan, index, out_FC, rows_FC, table, weights_N, mode, (round_table, rounds(rows_FC, compute_dtype)))
    return sum_dots(plan, index, torch.promote_types(grad_BC.dtype, values_N.dtype))


def row_gradients(
    index: FeatureIndex,
    weights_N: Tensor,
    tokens_BC: Tensor,
    compute_dtype: torch.dtype,
    *,
    out_FC: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """(F, C), in `out_FC` where given; sums in float32. Other dtypes are done by the reference."""
    if not has_kernel(weights_N, tokens_BC, compute_dtype=compute_dtype):
        return reference.row_gradients(index, weights_N, tokens_BC, compute_dtype, out_FC=out_FC, accumulate=accumulate)
    if out_FC is None:
        out_FC = tokens_BC.new_empty(index.offsets.numel() - 1, tokens_BC.shape[1])
    check_written(out_FC=out_FC)
    index = index.contiguous()
    table, round_table = gathered_table(tokens_BC, weights_N.numel(), compute_dtype)
    plan = plan_pass(index, table, sums=True, dots=False)
    sorted_N = weights_N[index.order_N].to(compute_dtype)
    _sum_rows(plan, index, out_FC, out_FC, table, sorted_N, _ADD if accumulate else _STORE, (round_table, False))
    return out_FC


def feature_sums(index: FeatureIndex, weights_N: Tensor) -> Tensor:
    """(F): sum of the weights of each feature, in float32. Other dtypes are done by the reference."""
    if not has_kernel(weights_N):
        return reference.feature_sums(index, weights_N)
    n_features = index.offsets.numel() - 1
    sums_F, index, weights_N = weights_N.new_empty(n_features), index.contiguous(), weights_N.contiguous()
    run(_feature_sums, (n_features,), sums_F, sums_F, index.offsets, index.order_N, weights_N, BLOCK=_SUM_BLOCK)
    return sums_F


def _sum_rows(
    plan: RowPass,
    index: FeatureIndex,
    out_FC: Tensor,
    rows_FC: Tensor,
    table: Tensor,
    weights_N: Tensor,
    mode: int,
    rounding: tuple[bool, bool],
) -> None:
    """Launch the pass. weights_N: feature-major; rounding: of the table's and of the rows' values to bfloat16."""
    dots = plan.dots is not None
    run(
        _rows,
        plan.grid(index.offsets.numel() - 1),
        out_FC,
        out_FC,
        plan.partials,
        plan.dots if plan.dots is not None else plan.partials,
        rows_FC,
        table,
        index.tokens_N,
        weights_N,
        index.offsets,
        plan.block_features_E,
        plan.n_blocks,
        weights_N.numel(),
        table.shape[1],
        out_FC.stride(0),
        rows_FC.stride(0),
        table.stride(0),
        MODE=mode,
        DOTS=dots,
        ROUND_TABLE=rounding[0],
        ROUND_ROWS=rounding[1],
        SEGMENT=plan.segment,
        CHUNK=plan.chunk,
        ENTRIES=ENTRIES,
    )
    if mode == _DROP:
        return
    run(
        _join_rows,
        plan.join_grid(),
        out_FC,
        out_FC,
        plan.partials,
        index.offsets,
        plan.block_features_E,
        plan.n_blocks,
        table.shape[1],
        out_FC.stride(0),
        MODE=mode,
        SEGMENT=plan.segment,
        CHUNK=plan.chunk,
        ENTRIES=ENTRIES,
    )


@triton.jit
def _write(place, total, inside, MODE: tl.constexpr):
    """Store the sum, or add it to what is there."""
    if MODE == 2:
        total += tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    tl.store(place, total, mask=inside, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["n_blocks", "n_entries"])
def _rows(
    out, partials, dots, rows, table, tokens, weights, offsets, block_features,
    n_blocks, n_entries, n_columns, out_stride, row_stride, table_stride,
    MODE: tl.constexpr, DOTS: tl.constexpr, ROUND_TABLE: tl.constexpr, ROUND_ROWS: tl.constexpr,
    SEGMENT: tl.constexpr, CHUNK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Program (segment or feature, chunk)."""
    feature, start, stop, nothing, is_long, slot = segment_of(
        tl.program_id(0), n_blocks, block_features, offsets, SEGMENT
    )
    if MODE != 1:
        nothing = nothing | (start == stop)
    if nothing:
        return
    chunk = tl.program_id(1).to(tl.int64)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = cols < n_columns
    row = tl.zeros([CHUNK], tl.float32)
    if DOTS:
        wanted = cols < tl.where(start < stop, n_columns, 0)
        values = tl.load(rows + feature * row_stride + cols, mask=wanted, other=0.0, eviction_policy="evict_first")
        if ROUND_ROWS:
            values = values.to(tl.bfloat16)
        row = values.to(tl.float32)
    total = gather_sum(
        table, table_stride, tokens, weights, start, stop, cols, inside, row, dots + chunk * n_entries,
        ROUND_TABLE, DOTS, CHUNK, ENTRIES,
    )  # fmt: skip
    if MODE != 0:
        if is_long:
            tl.store(partials + slot * n_columns + cols, total, mask=inside)
        else:
            _write(out + feature * out_stride + cols, total, inside, MODE)


@triton.jit(do_not_specialize=["n_blocks"])
def _join_rows(
    out, partials, offsets, block_features, n_blocks, n_columns, out_stride,
    MODE: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Program (block, chunk): the row of the long feature whose second segment starts in the block."""
    feature, begin, end = long_feature_of(tl.program_id(0).to(tl.int64), block_features, offsets, SEGMENT)
    if begin == end:
        return
    cols = tl.program_id(1).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    inside = cols < n_columns
    total = join_segments(partials, n_blocks, n_columns, begin, end, cols, inside, SEGMENT, CHUNK, ENTRIES)
    _write(out + feature * out_stride + cols, total, inside, MODE)


@triton.jit
def _feature_sums(out, offsets, order, weights, BLOCK: tl.constexpr):
    """Program: one feature."""
    feature = tl.program_id(0).to(tl.int64)
    end = tl.load(offsets + feature + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(tl.load(offsets + feature), end, BLOCK):
        entries = n + tl.arange(0, BLOCK)
        live = entries < end
        places = tl.load(order + entries, mask=live, other=0)
        total += tl.load(weights + places, mask=live, other=0.0).to(tl.float32)
    tl.store(out + feature, tl.sum(total, axis=0))


def _rows_case(name: str, out: str, rows: str, table: str, **constexprs: int | bool) -> CompileCase:
    types = {"out": out, "partials": "*fp32", "dots": "*fp32", "rows": rows, "table": table, "tokens": "*i64"}
    types |= {"weights": table, "offsets": "*i64", "block_features": "*i64", "n_blocks": "i32", "n_entries": "i32"}
    types |= dict.fromkeys(("n_columns", "out_stride", "row_stride", "table_stride"), "i32:16")
    chunk = 128 if table == "*fp32" else 256
    constants = {"ROUND_TABLE": False, "ROUND_ROWS": rows != table, "SEGMENT": SEGMENT, "CHUNK": chunk}
    constants |= {"ENTRIES": ENTRIES, **constexprs}
    return CompileCase(name=name, kernel=_rows, signature=types, constexprs=constants, num_warps=1)


def _join_case(name: str, out: str, mode: int) -> CompileCase:
    types = {"out": out, "partials": "*fp32", "offsets": "*i64", "block_features": "*i64", "n_blocks": "i32"}
    types |= {"n_columns": "i32:16", "out_stride": "i32:16"}
    constants = {"MODE": mode, "SEGMENT": SEGMENT, "CHUNK": 256, "ENTRIES": ENTRIES}
    return CompileCase(name=name, kernel=_join_rows, signature=types, constexprs=constants, num_warps=1)


COMPILE_CASES = [
    _rows_case("backward fp32", "*fp32", "*fp32", "*fp32", MODE=_STORE, DOTS=True),
    _rows_case("backward bf16, fp32 rows", "*fp32", "*fp32", "*bf16", MODE=_STORE, DOTS=True),
    _rows_case("backward bf16, added", "*fp32", "*fp32", "*bf16", MODE=_ADD, DOTS=True),
    _rows_case("backward bf16, bf16 rows", "*bf16", "*bf16", "*bf16", MODE=_STORE, DOTS=True),
    _rows_case("backward bf16, dots only", "*fp32", "*fp32", "*bf16", MODE=_DROP, DOTS=True),
    _rows_case("half a chunk: backward bf16", "*fp32", "*fp32", "*bf16", MODE=_STORE, DOTS=True, CHUNK=128),
    _rows_case("encoder rows bf16", "*fp32", "*fp32", "*bf16", MODE=_STORE, DOTS=False),
    _join_case("join of segments", "*fp32", _STORE),
    CompileCase(
        name="feature sums",
        kernel=_feature_sums,
        signature={"out": "*fp32", "offsets": "*i64", "order": "*i64", "weights": "*fp32"},
        constexprs={"BLOCK": _SUM_BLOCK},
        num_warps=1,
    ),
]
