"""Marks of entries, and which groups of neighbouring features have any entry worth reading again.

Every entry has a mark, an int32 that is 0 where it cannot be selected:

    PLAIN, NORM   the score's bits + 1 (of a positive float they are in its order), NaN largest; score = pre, pre * norm
    ABOVE, BAND   1 where the entry is kept: pre > theta, or pre - theta > low

One pass over a product stores per group of GROUP features the largest mark (PLAIN, NORM) or the number of marks. The
k-th largest of a token's group marks bounds its k-th largest mark from below, so only the groups that reach the bound
are listed, and read again. `aux` is the norm (NORM, not negative) or theta (ABOVE, BAND); else it is not read.

Legend: R tokens of a block, F features, G groups of a token.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.gpu.compile import CompileCase
from trainer.kernels.gpu.launch import blocks, run
from trainer.kernels.gpu.products import Block

PLAIN, NORM, ABOVE, BAND = 0, 1, 2, 3
LARGEST_MARK = 2**31 - 1
_LARGEST = tl.constexpr(LARGEST_MARK)

# 64 neighbours of 16 bits are one line of 128 bytes: at k = 32 a token's second read is 6% of its first.
_GROUP, _SMALLEST_GROUP = 64, 8
# Twice as many groups as entries: then about 1.4 k entries reach the bound.
_GROUPS_PER_ENTRY = 2
# Tile of the pass over the product: bias and aux (8 bytes a column) are read once for 4 tokens; 32 values a thread.
_ROWS, _COLUMNS, _MARK_WARPS = 4, 1024, 4
# Group marks that one warp holds in registers (16 a thread) while it searches for the bound.
LIST_BLOCK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What marks an entry. aux_F: norm or theta; low: of BAND."""

    kind: int
    aux_F: Tensor | None = None
    low: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Marks (R, G) of the groups; `listed` (R, G): per token, ascending, the first `n_listed` groups to read again."""

    size: int
    marks: Tensor
    listed: Tensor
    n_listed: Tensor


def group_size(n_entries: int, n_selected: int) -> int:
    """Features of a group, so that n_entries make at least twice n_selected groups if any size does."""
    size = _GROUP
    while size > _SMALLEST_GROUP and n_entries < _GROUPS_PER_ENTRY * n_selected * size:
        size //= 2
    return size


def new_groups(tokens: int, n_features: int, size: int, device: torch.device) -> Groups:
    """Scratch for blocks of up to `tokens` tokens."""
    marks, listed = torch.empty(2, tokens, blocks(n_features, size), dtype=torch.int32, device=device)
    return Groups(size=size, marks=marks, listed=listed, n_listed=marks.new_empty(tokens))


def scratch_bytes(n_features: int, size: int) -> int:
    """Bytes a token of `new_groups`."""
    return 8 * blocks(n_features, size) + 4


def operands(block: Block, rule: Rule) -> tuple[Tensor, Tensor, Tensor, float]:
    """product, bias, aux, low, as the kernels take them: an operand that a kernel does not read is the product."""
    product = block.product_RF
    return (
        product,
        product if block.bias_F is None else block.bias_F,
        product if rule.aux_F is None else rule.aux_F,
        rule.low,
    )


def mark_groups(block: Block, rule: Rule, groups: Groups) -> Tensor:
    """(R, G): largest mark of each group, or its number of marks; a view of groups.marks."""
    n_tokens, n_features = block.product_RF.shape
    marks = groups.marks[:n_tokens]
    run(
        _mark_groups,
        (blocks(n_tokens, _ROWS), blocks(n_features, _COLUMNS)),
        marks,
        marks,
        *operands(block, rule),
        n_tokens,
        n_features,
        marks.shape[1],
        block.product_RF.stride(0),
        BIAS=block.bias_F is not None,
        RULE=rule.kind,
        GROUP=groups.size,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=_MARK_WARPS,
    )
    return marks


def list_groups(groups: Groups, bound: Tensor, n_tokens: int) -> None:
    """The lists of the groups that reach one bound (1 element)."""
    run(
        _list_groups,
        (n_tokens,),
        groups.marks,
        groups.listed,
        groups.n_listed,
        bound,
        groups.marks,
        groups.marks.shape[1],
        BLOCK=LIST_BLOCK,
    )


@triton.jit
def ordered_bits(pre, aux, RULE: tl.constexpr):
    """Of PLAIN and NORM: integers in the order of the scores; NaN the largest; beside pre <= 0 at most 0 (PLAIN) or
    negative (NORM). Of PLAIN two instructions a value: marks are made of the largest of a group alone.
    """
    score = pre
    if RULE == 1:
        # + 0.0: of a norm of -0.0 too the score is a positive zero.
        score = tl.where(pre <= 0, -1.0, pre * aux + 0.0)
    is_nan = score != score  # noqa: PLR0124
    return tl.where(is_nan, _LARGEST - 1, score.to(tl.int32, bitcast=True))


@triton.jit
def mark_of_bits(bits, RULE: tl.constexpr):
    """The mark of an entry (or of the best of some) from its ordered bits; of PLAIN 0.0 is no candidate."""
    return tl.where((bits > 0) if RULE == 0 else (bits >= 0), bits + 1, 0)


@triton.jit
def marks_of(pre, aux, low, RULE: tl.constexpr):
    """The marks of a tile; `aux` has its shape, or one that is broadcast to it."""
    if RULE == 2:
        marks = tl.where(pre <= aux, 0, 1)
    elif RULE == 3:
        marks = tl.where(pre - aux <= low, 0, 1)
    else:
        marks = mark_of_bits(ordered_bits(pre, aux, RULE), RULE)
    return marks


@triton.jit
def pre_of(product, bias, places, cols, inside, BIAS: tl.constexpr):
    """Pre-activations of a tile of one shape, -1 where not inside: no rule marks that beside an aux of inf."""
    pre = tl.load(product + places, mask=inside, other=-1.0).to(tl.float32)
    if BIAS:
        pre += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    return pre


@triton.jit
def aux_of(aux, cols, inside, RULE: tl.constexpr):
    """The rule's operand for columns; inf where not inside."""
    values = 0.0
    if RULE != 0:
        values = tl.load(aux + cols, mask=inside, other=float("inf")).to(tl.float32)
    return values


@triton.jit
def bound_of_kth(marks, n, k, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """The largest b that at least k of n marks reach, or a smaller one that exactly k reach; 0 where n < k.

    marks: STEP apart. A bisection between the smallest and the largest, in registers where n <= BLOCK.
    """
    places = tl.arange(0, BLOCK)
    tile = tl.load(marks + places * STEP, mask=places < n, other=-1)
    most, least = tile, tl.where(places < n, tile, _LARGEST)
    for start in range(BLOCK, n, BLOCK):
        more = tl.load(marks + (start + places) * STEP, mask=start + places < n, other=-1)
        most = tl.maximum(most, more)
        least = tl.minimum(least, tl.where(more < 0, _LARGEST, more))
    low, high = tl.min(least, axis=0), tl.max(most, axis=0)
    if n < k:
        low, high = 0, 0
    while low < high:
        trial = low + (high - low) // 2 + 1
        counts = (tile >= trial).to(tl.int32)
        for start in range(BLOCK, n, BLOCK):
            more = tl.load(marks + (start + places) * STEP, mask=start + places < n, other=-1)
            counts += (more >= trial).to(tl.int32)
        reached = tl.sum(counts, axis=0)
        high = tl.where(reached < k, trial - 1, tl.where(reached == k, trial, high))
        low = tl.where(reached < k, low, trial)
    return low


@triton.jit
def _mark_groups(
    marks, product, bias, aux, low, n_rows, n_columns, n_groups, stride,
    BIAS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (ROWS tokens, COLUMNS features). Tokens run fastest: bias and aux stay in the cache."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < n_rows)[:, None] & (cols < n_columns)[None, :]
    pre = tl.load(product + rows[:, None] * stride + cols[None, :], mask=inside, other=-1.0).to(tl.float32)
    if BIAS:
        pre += tl.load(bias + cols, mask=cols < n_columns, other=0.0).to(tl.float32)[None, :]
    weight = aux_of(aux, cols, cols < n_columns, RULE)
    if RULE != 0:
        weight = weight[None, :]
    groups = tl.program_id(1) * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    places = marks + rows[:, None] * n_groups + groups[None, :]
    stored = (rows < n_rows)[:, None] & (groups < n_groups)[None, :]
    if RULE < 2:
        bits = tl.reshape(ordered_bits(pre, weight, RULE), [ROWS, COLUMNS // GROUP, GROUP])
        tl.store(places, mark_of_bits(tl.max(bits, axis=2), RULE), mask=stored)
    else:
        entries = tl.reshape(marks_of(pre, weight, low, RULE), [ROWS, COLUMNS // GROUP, GROUP])
        tl.store(places, tl.sum(entries, axis=2), mask=stored)


@triton.jit
def listed_groups(listed, marks, n_groups, bound, BLOCK: tl.constexpr):
    """Writes the groups of one token that reach the bound to `listed`, ascending; their number."""
    found = 0
    for start in range(0, n_groups, BLOCK):
        groups = start + tl.arange(0, BLOCK)
        kept = tl.load(marks + groups, mask=groups < n_groups, other=0) >= bound
        ranks = tl.cumsum(kept.to(tl.int32), axis=0)
        tl.store(listed + found + ranks - 1, groups, mask=kept)
        found += tl.sum(kept.to(tl.int32), axis=0)
    return found


@triton.jit
def _list_groups(listed, n_listed, bound, marks, n_groups, BLOCK: tl.constexpr):
    """Program: one token."""
    row = tl.program_id(0).to(tl.int64)
    marks += row * n_groups
    tl.store(n_listed + row, listed_groups(listed + row * n_groups, marks, n_groups, tl.load(bound), BLOCK))


def kernel_case(
    name: str, kernel: Any, signature: dict[str, str], *, bias: bool, product: str, rule: int, warps: int,
    **constexprs: int | bool,
) -> CompileCase:  # fmt: skip
    """A case of a kernel that reads products: the operands that all of them take, and further ones."""
    types = {"product": product, "bias": "*fp32" if bias else product, "low": "fp32"}
    types |= {"aux": product if rule == PLAIN else "*fp32", "n_columns": "i32:16", "stride": "i32:16"}
    constants = {"BIAS": bias, "RULE": rule, **constexprs}
    taken = {argument: types.get(argument, "") for argument in kernel.arg_names} | signature
    taken = {argument: type_ for argument, type_ in taken.items() if type_}
    return CompileCase(name=name, kernel=kernel, signature=taken, constexprs=constants, num_warps=warps)


def _mark_case(name: str, *, product: str, bias: bool, rule: int) -> CompileCase:
    return kernel_case(
        name,
        _mark_groups,
        {"marks": "*i32", "n_rows": "i32", "n_groups": "i32:16"},
        bias=bias,
        product=product,
        rule=rule,
        warps=_MARK_WARPS,
        GROUP=_GROUP,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
    )


COMPILE_CASES = [
    _mark_case("group marks bf16 and bias", product="*bf16", bias=True, rule=PLAIN),
    _mark_case("group marks bf16", product="*bf16", bias=False, rule=PLAIN),
    _mark_case("group marks bf16, bias, norm", product="*bf16", bias=True, rule=NORM),
    _mark_case("group marks bf16, bias, theta", product="*bf16", bias=True, rule=ABOVE),
    _mark_case("group marks bf16, bias, band", product="*bf16", bias=True, rule=BAND),
    _mark_case("group marks fp32", product="*fp32", bias=False, rule=PLAIN),
    CompileCase(
        name="groups of a token",
        kernel=_list_groups,
        signature={"listed": "*i32", "n_listed": "*i32", "bound": "*i32", "marks": "*i32", "n_groups": "i32:16"},
        constexprs={"BLOCK": LIST_BLOCK},
        num_warps=1,
    ),
]
