"""The second read: the entries of the listed groups that reach a bound, in order of features.

One program a token reads several listed groups at once. A first call with `write=False` counts what the tokens have.

Legend: R tokens of a block, N entries.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.gpu.compile import CompileCase
from trainer.kernels.gpu.groups import ABOVE, NORM, PLAIN, Groups, Rule, aux_of, kernel_case, marks_of, operands, pre_of
from trainer.kernels.gpu.launch import run
from trainer.kernels.gpu.products import Block

# Entries of a tile: 8 a thread of one warp, so that registers allow 21 to 32 programs an SM, here and in
# best_of_token.py, each with 4 lines on its way at once (with 512: 10 to 16 programs with 8 lines).
TILE = 256


class Entries(NamedTuple):
    """Entries in order: feature + token * row_step (N) int64, pre-activations and scores (N) float32."""

    places: Tensor
    values: Tensor
    scores: Tensor


def count_entries(block: Block, rule: Rule, groups: Groups, bound: Tensor) -> Tensor:
    """(R) int32: entries per token that reach the bound (1 element), after list_groups."""
    counts = torch.empty(block.n_tokens, dtype=torch.int32, device=block.product_RF.device)
    none = Entries(counts, counts, counts)
    _launch(block, rule, groups, bound, counts, none, row_step=0, write=False)
    return counts


def write_entries(
    block: Block, rule: Rule, groups: Groups, bound: Tensor, starts: Tensor, n: int, row_step: int
) -> Entries:
    """The n entries that reach the bound; a token's begin at starts (R) int64. Without NORM scores are values."""
    device = block.product_RF.device
    values = torch.empty(n, dtype=torch.float32, device=device)
    scores = torch.empty_like(values) if rule.kind == NORM else values
    entries = Entries(torch.empty(n, dtype=torch.int64, device=device), values, scores)
    if n:
        _launch(block, rule, groups, bound, starts, entries, row_step=row_step, write=True)
    return entries


def _launch(
    block: Block,
    rule: Rule,
    groups: Groups,
    bound: Tensor,
    starts: Tensor,
    out: Entries,
    *,
    row_step: int,
    write: bool,
) -> None:
    n_tokens, n_features = block.product_RF.shape
    run(
        _entries,
        (n_tokens,),
        starts,
        *out,
        starts,
        bound,
        groups.listed,
        groups.n_listed,
        *operands(block, rule),
        n_features,
        groups.listed.shape[1],
        block.product_RF.stride(0),
        block.first,
        row_step,
        BIAS=block.bias_F is not None,
        RULE=rule.kind,
        GROUP=groups.size,
        TILE=TILE,
        WRITE=write,
    )


@triton.jit
def listed_columns(listed, n_listed, start, n_columns, GROUP: tl.constexpr, TILE: tl.constexpr):
    """The listed groups (TILE // GROUP, 1) from number `start` on, their columns (., GROUP), and which exist."""
    slots = start + tl.arange(0, TILE // GROUP)
    groups = tl.load(listed + slots, mask=slots < n_listed, other=0)[:, None]
    cols = groups * GROUP + tl.arange(0, GROUP)[None, :]
    return groups, cols, (slots < n_listed)[:, None] & (cols < n_columns)


@triton.jit
def listed_tile(
    listed, n_listed, start, product, bias, aux, low, n_columns,
    BIAS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Columns, pre-activations, aux and marks of the listed groups from number `start` on, as far as TILE holds them.

    Loaded as (groups, GROUP), so that loads are wide, and flattened. Marks beyond the list or the columns are 0.
    """
    _, cols, inside = listed_columns(listed, n_listed, start, n_columns, GROUP, TILE)
    pre = pre_of(product, bias, cols, cols, inside, BIAS)
    weight = aux_of(aux, cols, inside, RULE)
    marks = marks_of(pre, weight, low, RULE)
    if RULE == 1:
        weight = tl.reshape(weight, [TILE])
    return tl.reshape(cols, [TILE]), tl.reshape(pre, [TILE]), weight, tl.reshape(marks, [TILE])


@triton.jit
def _entries(
    places, values, scores, starts, bounds, listed, n_listed, product, bias, aux, low,
    n_columns, n_groups, stride, first, row_step,
    BIAS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Program: one token. WRITE: its entries from starts on; else their number to starts."""
    row = tl.program_id(0).to(tl.int64)
    listed += row * n_groups
    product += row * stride
    n = tl.load(n_listed + row)
    bound = tl.load(bounds)
    found = tl.zeros([], tl.int64)
    if WRITE:
        found = tl.load(starts + row)
    for start in range(0, n, TILE // GROUP):
        cols, pre, weight, mark = listed_tile(
            listed, n, start, product, bias, aux, low, n_columns, BIAS, RULE, GROUP, TILE
        )
        kept = mark >= bound
        if WRITE:
            slots = found + tl.cumsum(kept.to(tl.int32), axis=0) - 1
            tl.store(places + slots, (first + row) * row_step + cols, mask=kept)
            tl.store(values + slots, pre, mask=kept)
            if RULE == 1:
                tl.store(scores + slots, pre * weight, mask=kept)
        found += tl.sum(kept.to(tl.int32), axis=0)
    if not WRITE:
        tl.store(starts + row, found.to(tl.int32))


def _case(name: str, *, product: str, bias: bool, rule: int, write: bool) -> CompileCase:
    types = {"places": "*i64" if write else "*i32", "starts": "*i64" if write else "*i32"}
    types |= dict.fromkeys(("values", "scores"), "*fp32" if write else "*i32")
    types |= {"bounds": "*i32", "listed": "*i32", "n_listed": "*i32", "n_groups": "i32:16"}
    types |= {"first": "i32", "row_step": "i32"}
    return kernel_case(
        name, _entries, types, bias=bias, product=product, rule=rule, warps=1, GROUP=64, TILE=TILE, WRITE=write
    )


COMPILE_CASES = [
    _case("entries of a token bf16, counted", product="*bf16", bias=True, rule=PLAIN, write=False),
    _case("entries of a token bf16", product="*bf16", bias=True, rule=PLAIN, write=True),
    _case("entries of a token bf16, norm", product="*bf16", bias=True, rule=NORM, write=True),
    _case("entries of a token bf16, theta", product="*bf16", bias=True, rule=ABOVE, write=True),
    _case("entries of a token fp32", product="*fp32", bias=False, rule=PLAIN, write=True),
]
