"""fused_adam_rows in Triton: gradients of feature rows and Adam's update of every row, in one pass over the parameters.

See feature_rows for the cut. The program that has a chunk's whole sum updates the chunk: for a long feature that is
the second kernel, so every dot of the first one sees the row before its update.

Legend: F features, C columns of a row, N entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels import fused_adam_rows as reference
from trainer.kernels.build_csc import FeatureIndex
from trainer.kernels.fused_adam_rows import AdamHyper
from trainer.kernels.gpu.compile import CompileCase
from trainer.kernels.gpu.feature_rows import (
    ENTRIES,
    SEGMENT,
    gather_sum,
    join_segments,
    long_feature_of,
    plan_pass,
    segment_of,
    sum_dots,
)
from trainer.kernels.gpu.launch import has_kernel, rounds, run
from trainer.kernels.strides import check_written, dense_columns


def fused_adam_rows(
    rows_FC: Tensor,
    exp_avg_FC: Tensor,
    exp_avg_sq_FC: Tensor,
    index: FeatureIndex,
    weights_N: Tensor,
    tokens_BC: Tensor,
    hyper: AdamHyper,
    *,
    dots: bool,
) -> tuple[Tensor, Tensor | None]:
    """Update rows and moments in place; squares of the gradient and, with `dots`, the dots. float64: the reference.

    With 16-bit tokens the weights, and for the dots the rows, are rounded to their dtype; sums are float32.
    """
    if not has_kernel(rows_FC, exp_avg_FC, exp_avg_sq_FC, weights_N, tokens_BC):
        return reference.fused_adam_rows(
            rows_FC, exp_avg_FC, exp_avg_sq_FC, index, weights_N, tokens_BC, hyper, dots=dots
        )
    check_written(rows_FC=rows_FC, exp_avg_FC=exp_avg_FC, exp_avg_sq_FC=exp_avg_sq_FC)
    index, tokens_BC = index.contiguous(), dense_columns(tokens_BC)
    n_features, n_columns = rows_FC.shape
    plan = plan_pass(index, tokens_BC, sums=True, dots=dots)
    squares = torch.empty(plan.n_chunks, n_features, dtype=torch.float32, device=rows_FC.device)
    sorted_N = weights_N[index.order_N].to(tokens_BC.dtype)
    parameters = (rows_FC, exp_avg_FC, exp_avg_sq_FC, squares, plan.partials)
    strides = (rows_FC.stride(0), exp_avg_FC.stride(0), exp_avg_sq_FC.stride(0))
    sizes = (plan.n_blocks, n_features, n_columns, *strides)
    constexprs = {"SEGMENT": plan.segment, "CHUNK": plan.chunk, "ENTRIES": ENTRIES}
    run(
        _adam_rows,
        plan.grid(n_features),
        rows_FC,
        *parameters,
        plan.dots if plan.dots is not None else plan.partials,
        tokens_BC,
        index.tokens_N,
        sorted_N,
        index.offsets,
        plan.block_features_E,
        tokens_BC.stride(0),
        sorted_N.numel(),
        *sizes,
        *constants(hyper),
        DOTS=dots,
        ROUND_ROWS=rounds(rows_FC, tokens_BC.dtype),
        **constexprs,
    )
    run(
        _adam_join,
        plan.join_grid(),
        rows_FC,
        *parameters,
        index.offsets,
        plan.block_features_E,
        *sizes,
        *constants(hyper),
        **constexprs,
    )
    return squares.sum(dtype=torch.float64), sum_dots(plan, index, weights_N.dtype)


def constants(hyper: AdamHyper) -> tuple[float, ...]:
    """What the kernels take, each rounded to float32 once (1 - beta would lose digits there)."""
    step_size = hyper.lr / hyper.bias_correction1
    decays = (hyper.beta1, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2)
    return *decays, hyper.eps, step_size, hyper.bias_correction2**0.5


@triton.jit
def moved(
    parameter, first, second, gradient,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction2,
):  # fmt: skip
    """Parameter and moments after Adam's update."""
    first = beta1 * first + one_minus_beta1 * gradient
    second = beta2 * second + one_minus_beta2 * gradient * gradient
    parameter -= step_size * first / (tl.sqrt(second) / root_correction2 + eps)
    return parameter, first, second


@triton.jit
def _update(
    parameters, exp_avgs, exp_avg_sqs, squares, gradient, inside,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction2,
):  # fmt: skip
    """Adam's update at these places, each of which is read and written by one program alone; squares: where to store
    the gradient's sum of squares."""
    first = tl.load(exp_avgs, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    second = tl.load(exp_avg_sqs, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    parameter = tl.load(parameters, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    parameter, first, second = moved(
        parameter, first, second, gradient,
        beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction2,
    )  # fmt: skip
    tl.store(exp_avgs, first, mask=inside, eviction_policy="evict_first")
    tl.store(exp_avg_sqs, second, mask=inside, eviction_policy="evict_first")
    tl.store(parameters, parameter, mask=inside, eviction_policy="evict_first")
    tl.store(squares, tl.sum(gradient * gradient, axis=0))


@triton.jit(do_not_specialize=["n_blocks", "n_entries"])
def _adam_rows(
    rows, exp_avgs, exp_avg_sqs, squares, partials, dots, table, tokens, weights, offsets, block_features,
    table_stride, n_entries, n_blocks, n_features, n_columns, row_stride, exp_avg_stride, exp_avg_sq_stride,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction2,
    DOTS: tl.constexpr, ROUND_ROWS: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Program (segment or feature, chunk)."""
    feature, start, stop, nothing, is_long, slot = segment_of(
        tl.program_id(0), n_blocks, block_features, offsets, SEGMENT
    )
    if nothing:
        return
    chunk = tl.program_id(1).to(tl.int64)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = cols < n_columns
    row = tl.zeros([CHUNK], tl.float32)
    if DOTS:
        wanted = cols < tl.where(start < stop, n_columns, 0)
        values = tl.load(rows + feature * row_stride + cols, mask=wanted, other=0.0)
        if ROUND_ROWS:
            values = values.to(tl.bfloat16)
        row = values.to(tl.float32)
    gradient = gather_sum(
        table, table_stride, tokens, weights, start, stop, cols, inside, row, dots + chunk * n_entries,
        False, DOTS, CHUNK, ENTRIES,
    )  # fmt: skip
    if is_long:
        tl.store(partials + slot * n_columns + cols, gradient, mask=inside)
    else:
        _update(
            rows + feature * row_stride + cols,
            exp_avgs + feature * exp_avg_stride + cols,
            exp_avg_sqs + feature * exp_avg_sq_stride + cols,
            squares + chunk * n_features + feature,
            gradient, inside,
            beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_blocks"])
def _adam_join(
    rows, exp_avgs, exp_avg_sqs, squares, partials, offsets, block_features,
    n_blocks, n_features, n_columns, row_stride, exp_avg_stride, exp_avg_sq_stride,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction2,
    SEGMENT: tl.constexpr, CHUNK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Program (block, chunk): the long feature whose second segment starts in the block."""
    feature, begin, end = long_feature_of(tl.program_id(0).to(tl.int64), block_features, offsets, SEGMENT)
    if begin == end:
        return
    chunk = tl.program_id(1).to(tl.int64)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = cols < n_columns
    gradient = join_segments(partials, n_blocks, n_columns, begin, end, cols, inside, SEGMENT, CHUNK, ENTRIES)
    _update(
        rows + feature * row_stride + cols,
        exp_avgs + feature * exp_avg_stride + cols,
        exp_avg_sqs + feature * exp_avg_sq_stride + cols,
        squares + chunk * n_features + feature,
        gradient, inside,
        beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction2,
    )  # fmt: skip


_CONSTANTS = dict.fromkeys(
    ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "step_size", "root_correction2"), "fp32"
)
_STATES = dict.fromkeys(("exp_avgs", "exp_avg_sqs", "squares"), "*fp32")
_SIZES = {"n_blocks": "i32", "n_features": "i32", "n_columns": "i32:16"} | dict.fromkeys(
    ("row_stride", "exp_avg_stride", "exp_avg_sq_stride"), "i32:16"
)


def _rows_case(name: str, table: str, *, dots: bool) -> CompileCase:
    types = {"rows": "*fp32", "partials": "*fp32", "dots": "*fp32", "table": table, "tokens": "*i64"} | _STATES
    types |= {"weights": table, "offsets": "*i64", "block_features": "*i64", "table_stride": "i32:16"}
    types |= {"n_entries": "i32"} | _SIZES | _CONSTANTS
    chunk = 128 if table == "*fp32" else 256
    constants = {"DOTS": dots, "ROUND_ROWS": table != "*fp32", "SEGMENT": SEGMENT, "CHUNK": chunk, "ENTRIES": ENTRIES}
    return CompileCase(name=name, kernel=_adam_rows, signature=types, constexprs=constants, num_warps=1)


COMPILE_CASES = [
    _rows_case("fused Adam fp32, dots", "*fp32", dots=True),
    _rows_case("fused Adam bf16, dots", "*bf16", dots=True),
    _rows_case("fused Adam bf16", "*bf16", dots=False),
    CompileCase(
        name="fused Adam, join",
        kernel=_adam_join,
        signature={"rows": "*fp32", "partials": "*fp32", "offsets": "*i64", "block_features": "*i64"}
        | (_STATES | _SIZES | _CONSTANTS),
        constexprs={"SEGMENT": SEGMENT, "CHUNK": 256, "ENTRIES": ENTRIES},
        num_warps=1,
    ),
]
