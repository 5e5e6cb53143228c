"""The k best entries of one token, from the marks of its groups, in four steps of one program.

    bound      the k-th largest mark of a group: at least k entries reach it
    groups     those that reach it, about 1.1 k
    parts      of PART features of these groups, read again: those that reach it, about 1.3 k
    entries    of these parts, read a third time: those that reach it, of which the k best remain

Each step writes a list for the next one. Compaction is the dear part (registers -> shared memory -> a scattered store,
some fifty instructions a value), so that it is done on as few values as possible: for parts on one of PART.

Legend: R tokens of a block, F features, C candidates of a token.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.gpu.compile import CompileCase
from trainer.kernels.gpu.entries import TILE, listed_columns, listed_tile
from trainer.kernels.gpu.groups import (
    LIST_BLOCK,
    NORM,
    PLAIN,
    Groups,
    Rule,
    aux_of,
    bound_of_kth,
    kernel_case,
    listed_groups,
    mark_of_bits,
    operands,
    ordered_bits,
    pre_of,
)
from trainer.kernels.gpu.launch import blocks, run
from trainer.kernels.gpu.products import Block

# Neighbours whose largest mark one thread finds in its registers: one load of 16 bytes in bf16.
PART = 8
# Candidates that a program holds in registers while it searches (at most 4 a thread); twice k, since about 1.1 k reach
# the bound.
MIN_BEST_BLOCK, MAX_BEST_BLOCK = 64, 1024
_BEST_OF_A_WARP = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Scratch:
    """Lists of the tokens of a block: candidates (R, C) as mark * 2**32 + feature, and parts (R, .) as their number."""

    candidates: Tensor
    parts: Tensor


def new_scratch(tokens: int, n_features: int, size: int, k: int, device: torch.device) -> Scratch:
    """Scratch for groups of `size` features."""
    return Scratch(
        candidates=torch.empty(tokens, _most_entries(n_features, size, k), dtype=torch.int64, device=device),
        parts=torch.empty(tokens, _most_parts(n_features, size, k), dtype=torch.int32, device=device),
    )


def scratch_row_bytes(n_features: int, size: int, k: int) -> int:
    """Bytes a token of `new_scratch`."""
    return 8 * _most_entries(n_features, size, k) + 4 * _most_parts(n_features, size, k)


def _most_entries(n_features: int, size: int, k: int) -> int:
    """C: of a token, at most. Above its bound lie k groups, and of what equals the bound k entries are enough."""
    return min(n_features, k * size + k)


def _most_parts(n_features: int, size: int, k: int) -> int:
    """The same of parts, none where a group is one."""
    return min(blocks(n_features, PART), k * (size // PART) + k) if size > PART else 1


def select(
    block: Block, rule: Rule, groups: Groups, k: int, scratch: Scratch, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Writes ids and values (R, k) and counts (R) of the tokens of a block whose groups are marked."""
    n_tokens, n_features = block.product_RF.shape
    size = min(max(triton.next_power_of_2(2 * k), MIN_BEST_BLOCK), MAX_BEST_BLOCK)
    run(
        _select_of_token,
        (n_tokens,),
        block.product_RF,
        *out,
        scratch.candidates,
        scratch.candidates.view(torch.int32),
        scratch.parts,
        groups.listed,
        groups.marks,
        *operands(block, rule),
        n_features,
        groups.listed.shape[1],
        block.product_RF.stride(0),
        scratch.candidates.shape[1],
        scratch.parts.shape[1],
        k,
        BIAS=block.bias_F is not None,
        RULE=rule.kind,
        GROUP=groups.size,
        PART=PART,
        LIST=LIST_BLOCK,
        TILE=TILE,
        BEST=size,
        num_warps=_best_warps(size),
    )


def _best_warps(size: int) -> int:
    return max(size // _BEST_OF_A_WARP, 1)


@triton.jit
def _select_of_token(
    out_ids, out_values, counts, entries, words, parts, listed, group_marks, product, bias, aux, low,
    n_columns, n_groups, stride, width, n_parts, k,
    BIAS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    LIST: tl.constexpr, TILE: tl.constexpr, BEST: tl.constexpr,
):  # fmt: skip
    """Program: one token. What a step writes for the next one stays in the caches: no other program reads it.

    entries: candidates as mark * 2**32 + feature, for one store of each; words: the same memory as halves.
    """
    row = tl.program_id(0).to(tl.int64)
    group_marks += row * n_groups
    listed += row * n_groups
    product += row * stride
    entries += row * width
    words += row * width * 2
    parts += row * n_parts
    bound = tl.maximum(bound_of_kth(group_marks, n_groups, k, 1, LIST), 1)
    n_listed = listed_groups(listed, group_marks, n_groups, bound, LIST)
    tl.debug_barrier()
    if GROUP > PART:
        n_listed = _listed_parts(
            parts, listed, n_listed, bound, product, bias, aux, n_columns, k, BIAS, RULE, GROUP, PART, TILE
        )
        tl.debug_barrier()
        found = _candidates(
            entries, parts, n_listed, bound, product, bias, aux, low, n_columns, k, BIAS, RULE, PART, TILE
        )
    else:
        found = _candidates(
            entries, listed, n_listed, bound, product, bias, aux, low, n_columns, k, BIAS, RULE, GROUP, TILE
        )
    tl.debug_barrier()
    _best(out_ids + row * k, out_values + row * k, words, found, product, bias, k, BIAS, BEST)
    tl.store(counts + row, tl.minimum(found, k))


@triton.jit
def _kept(mark, bound, ties, k):
    """Which marks exceed the bound, or equal it as one of the first k that do; `ties` came before, and how many now."""
    tie = (mark == bound).to(tl.int32)
    now = ties + tl.sum(tie, axis=0)
    kept = mark >= bound
    if now > k:
        kept = (mark > bound) | ((tie > 0) & (ties + tl.cumsum(tie, axis=0) <= k))
    return kept, now


@triton.jit
def _listed_parts(
    parts, listed, n_listed, bound, product, bias, aux, n_columns, k,
    BIAS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Writes the parts of the listed groups whose best exceeds the bound, and the first k whose best equals it (the
    first k entries that equal it lie in these), ascending; their number.
    """
    found = 0
    ties = 0
    for start in range(0, n_listed, TILE // GROUP):
        groups, cols, inside = listed_columns(listed, n_listed, start, n_columns, GROUP, TILE)
        part = tl.reshape(groups * (GROUP // PART) + tl.arange(0, GROUP // PART)[None, :], [TILE // PART])
        pre = pre_of(product, bias, cols, cols, inside, BIAS)
        bits = tl.reshape(ordered_bits(pre, aux_of(aux, cols, inside, RULE), RULE), [TILE // PART, PART])
        kept, ties = _kept(mark_of_bits(tl.max(bits, axis=1), RULE), bound, ties, k)
        slots = found + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(parts + slots, part, mask=kept)
        found += tl.sum(kept.to(tl.int32), axis=0)
    return found


@triton.jit
def _candidates(
    entries, listed, n_listed, bound, product, bias, aux, low, n_columns, k,
    BIAS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Writes a token's entries above its bound, and the first k equal to it, in order of features; their number."""
    found = 0
    ties = 0
    for start in range(0, n_listed, TILE // GROUP):
        cols, _, _, mark = listed_tile(
            listed, n_listed, start, product, bias, aux, low, n_columns, BIAS, RULE, GROUP, TILE
        )
        kept, ties = _kept(mark, bound, ties, k)
        slots = found + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(entries + slots, (mark.to(tl.int64) << 32) | cols, mask=kept)
        found += tl.sum(kept.to(tl.int32), axis=0)
    return found


@triton.jit
def _best(out_ids, out_values, words, n, product, bias, k, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the candidates above the bound of the k-th, and the first that equal it, up to k in all."""
    bound = bound_of_kth(words + 1, n, k, 2, BLOCK)
    above = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        places = start + tl.arange(0, BLOCK)
        above += (tl.load(words + 2 * places + 1, mask=places < n, other=0) > bound).to(tl.int32)
    missing = k - tl.sum(above, axis=0)
    done = 0
    for start in range(0, n, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < n
        mark = tl.load(words + 2 * places + 1, mask=inside, other=0)
        tie = (inside & (mark == bound)).to(tl.int32)
        ranks = tl.cumsum(tie, axis=0)
        kept = (inside & (mark > bound)) | ((tie > 0) & (ranks <= missing))
        col = tl.load(words + 2 * places, mask=kept, other=0)
        slots = done + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(out_ids + slots, col.to(tl.int64), mask=kept)
        tl.store(out_values + slots, pre_of(product, bias, col, col, kept, BIAS), mask=kept)
        missing -= tl.sum(tie, axis=0)
        done += tl.sum(kept.to(tl.int32), axis=0)


def _select_case(name: str, *, product: str, bias: bool, rule: int, best: int, group: int = 64) -> CompileCase:
    types = {
        "out_ids": "*i64",
        "out_values": "*fp32",
        "counts": "*i32",
        "entries": "*i64",
        "words": "*i32",
        "parts": "*i32",
    }
    types |= {"listed": "*i32", "group_marks": "*i32", "n_groups": "i32:16", "width": "i32:16"}
    types |= {"n_parts": "i32:16", "k": "i32"}
    return kernel_case(
        name,
        _select_of_token,
        types,
        bias=bias,
        product=product,
        rule=rule,
        warps=_best_warps(best),
        GROUP=group,
        PART=PART,
        LIST=LIST_BLOCK,
        TILE=TILE,
        BEST=best,
    )


COMPILE_CASES = [
    _select_case("best of a token, bf16 and bias", product="*bf16", bias=True, rule=PLAIN, best=64),
    _select_case("best of a token, bf16", product="*bf16", bias=False, rule=PLAIN, best=64),
    _select_case("best of a token, bf16, bias, norm", product="*bf16", bias=True, rule=NORM, best=64),
    _select_case("best of a token, fp32", product="*fp32", bias=False, rule=PLAIN, best=64),
    _select_case("best of a token, bf16 and bias, k = 512", product="*bf16", bias=True, rule=PLAIN, best=1024),
    _select_case(
        "best of a token, bf16 and bias, groups of 8", product="*bf16", bias=True, rule=PLAIN, best=64, group=8
    ),
]
