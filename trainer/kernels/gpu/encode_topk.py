"""encode_topk in Triton: a block's product by cuBLAS, then two passes of which the second reads little.

    group marks            the whole product, once            (groups.py)
    best of a token        its marks: 1/32 of its bytes; then about 1.1 k groups, and of these what reaches the bound of
                           the k-th mark, in order of features; of such candidates the k best (ties: the first)

The host waits once a call, to learn whether all tokens have k entries. `begin_topk` queues all that comes before, so
that the next layer's work can be queued before that wait too.

Legend: B tokens, R tokens of a block, D d_model, F features, C candidates of a token, N selected entries.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from trainer.kernels import encode_topk as reference
from trainer.kernels.encode_topk import Selection
from trainer.kernels.gpu.compile import CompileCase
from trainer.kernels.gpu.entries import TILE, listed_tile
from trainer.kernels.gpu.groups import (
    LIST_BLOCK,
    NORM,
    PLAIN,
    Groups,
    Rule,
    bound_of_kth,
    group_size,
    kernel_case,
    listed_groups,
    mark_groups,
    new_groups,
    operands,
    pre_of,
    scratch_bytes,
)
from trainer.kernels.gpu.later import Later
from trainer.kernels.gpu.launch import run
from trainer.kernels.gpu.products import Block, block_tokens, has_encoder, token_blocks

# Candidates that a program holds in registers while it searches (at most 8 a thread); twice k, since about 1.1 k reach
# the bound.
_MIN_BEST_BLOCK, _MAX_BEST_BLOCK = 64, 1024
_BEST_OF_A_WARP = 256


def encode_topk(
    x_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, norm_F: Tensor | None, compute_dtype: torch.dtype
) -> Selection:
    """The k best entries of every token, compared in float32. norm_F is not negative. float64: the reference."""
    return begin_topk(x_BD, weight_FD, bias_F, k, norm_F, compute_dtype)()


def begin_topk(
    x_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, norm_F: Tensor | None, compute_dtype: torch.dtype
) -> Callable[[], Selection]:
    """Queues the work of encode_topk; what it returns waits for that, and gives the result."""
    if not has_encoder(weight_FD, bias_F, compute_dtype):
        found = reference.encode_topk(x_BD, weight_FD, bias_F, k, norm_F, compute_dtype)
        return lambda: found
    n_tokens, n_features = x_BD.shape[0], bias_F.numel()
    k = min(k, n_features)
    rule = Rule(kind=PLAIN) if norm_F is None else Rule(kind=NORM, aux_F=norm_F.contiguous())
    size = group_size(n_features, k)
    width = _room(n_features, k, size)
    row_bytes = n_features * compute_dtype.itemsize + scratch_bytes(n_features, size) + 8 * width
    tokens = block_tokens(n_tokens, row_bytes, x_BD.device)
    groups = new_groups(tokens, n_features, size, x_BD.device)
    scratch_RC = torch.empty(2, tokens, width, dtype=torch.int32, device=x_BD.device)
    ids_BK = torch.empty(n_tokens, k, dtype=torch.int64, device=x_BD.device)
    values_BK = torch.empty(n_tokens, k, dtype=torch.float32, device=x_BD.device)
    counts_B = torch.empty(n_tokens, dtype=torch.int32, device=x_BD.device)
    for block in token_blocks(x_BD, weight_FD, bias_F, compute_dtype, tokens):
        mark_groups(block, rule, groups)
        span = slice(block.first, block.first + block.n_tokens)
        _select(block, rule, groups, k, scratch_RC, (ids_BK[span], values_BK[span], counts_B[span]))
    offsets = functional.pad(counts_B.cumsum(0, dtype=torch.int64), (1, 0))
    return partial(_packed, ids_BK, values_BK.to(bias_F.dtype), counts_B, offsets, Later(offsets[-1]))


def _room(n_features: int, k: int, size: int) -> int:
    """C: of a token, at most. Above its bound lie k groups, and of what equals the bound k entries are enough."""
    return min(n_features, k * size + k)


def _select(
    block: Block, rule: Rule, groups: Groups, k: int, scratch_RC: Tensor, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    """ids, values and counts of the tokens of a block whose groups are marked."""
    n_tokens, n_features = block.product_RF.shape
    size = min(max(triton.next_power_of_2(2 * k), _MIN_BEST_BLOCK), _MAX_BEST_BLOCK)
    run(
        _select_of_token,
        (n_tokens,),
        block.product_RF,
        *out,
        *scratch_RC,
        groups.listed,
        groups.marks,
        *operands(block, rule),
        n_features,
        groups.listed.shape[1],
        block.product_RF.stride(0),
        scratch_RC.shape[2],
        k,
        BIAS=block.bias_F is not None,
        RULE=rule.kind,
        GROUP=groups.size,
        LIST=LIST_BLOCK,
        TILE=TILE,
        BEST=size,
        num_warps=_best_warps(size),
    )


def _best_warps(size: int) -> int:
    return max(size // _BEST_OF_A_WARP, 1)


def _packed(ids_BK: Tensor, values_BK: Tensor, counts_B: Tensor, offsets: Tensor, total: Later) -> Selection:
    """The first counts_B entries of every row, `total` in all."""
    ids, values, n = ids_BK.view(-1), values_BK.view(-1), int(total)
    if n == ids.numel():
        return Selection(offsets, ids, values)
    filled_BK = torch.arange(ids_BK.shape[1], device=ids.device) < counts_B[:, None]
    places = filled_BK.view(-1).nonzero_static(size=n)[:, 0]
    return Selection(offsets, ids[places], values[places])


@triton.jit
def _select_of_token(
    out_ids, out_values, counts, marks, ids, listed, group_marks, product, bias, aux, low,
    n_columns, n_groups, stride, width, k,
    BIAS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr,
    LIST: tl.constexpr, TILE: tl.constexpr, BEST: tl.constexpr,
):  # fmt: skip
    """Program: one token. What a phase writes for the next one stays in the caches: no other program reads it."""
    row = tl.program_id(0).to(tl.int64)
    group_marks += row * n_groups
    listed += row * n_groups
    product += row * stride
    marks += row * width
    ids += row * width
    bound = tl.maximum(bound_of_kth(group_marks, n_groups, k, LIST), 1)
    n_listed = listed_groups(listed, group_marks, n_groups, bound, LIST)
    tl.debug_barrier()
    found = _candidates(
        marks, ids, listed, n_listed, bound, product, bias, aux, low, n_columns, k, BIAS, RULE, GROUP, TILE
    )
    tl.debug_barrier()
    _best(out_ids + row * k, out_values + row * k, marks, ids, found, product, bias, k, BIAS, BEST)
    tl.store(counts + row, tl.minimum(found, k))


@triton.jit
def _candidates(
    marks, ids, listed, n_listed, bound, product, bias, aux, low, n_columns, k,
    BIAS: tl.constexpr, RULE: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Writes a token's entries above its bound, and the first k equal to it, in order of features; their number."""
    found = 0
    ties = 0
    for start in range(0, n_listed, TILE // GROUP):
        cols, _, _, mark = listed_tile(
            listed, n_listed, start, product, bias, aux, low, n_columns, BIAS, RULE, GROUP, TILE
        )
        tie = (mark == bound).to(tl.int32)
        early = (tie > 0) & (ties + tl.cumsum(tie, axis=0) <= k)
        kept = (mark > bound) | early
        slots = found + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(marks + slots, mark, mask=kept)
        tl.store(ids + slots, cols, mask=kept)
        found += tl.sum(kept.to(tl.int32), axis=0)
        ties += tl.sum(tie, axis=0)
    return found


@triton.jit
def _best(out_ids, out_values, marks, ids, n, product, bias, k, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the candidates above the bound of the k-th, and the first that equal it, up to k in all."""
    bound = bound_of_kth(marks, n, k, BLOCK)
    above = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        places = start + tl.arange(0, BLOCK)
        above += (tl.load(marks + places, mask=places < n, other=0) > bound).to(tl.int32)
    missing = k - tl.sum(above, axis=0)
    done = 0
    for start in range(0, n, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < n
        mark = tl.load(marks + places, mask=inside, other=0)
        tie = (inside & (mark == bound)).to(tl.int32)
        ranks = tl.cumsum(tie, axis=0)
        kept = (inside & (mark > bound)) | ((tie > 0) & (ranks <= missing))
        col = tl.load(ids + places, mask=kept, other=0)
        slots = done + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(out_ids + slots, col.to(tl.int64), mask=kept)
        tl.store(out_values + slots, pre_of(product, bias, col, col, kept, BIAS), mask=kept)
        missing -= tl.sum(tie, axis=0)
        done += tl.sum(kept.to(tl.int32), axis=0)


def _select_case(name: str, *, product: str, bias: bool, rule: int, best: int) -> CompileCase:
    types = {"out_ids": "*i64", "out_values": "*fp32", "counts": "*i32", "marks": "*i32", "ids": "*i32"}
    types |= {"listed": "*i32", "group_marks": "*i32", "n_groups": "i32:16", "width": "i32:16", "k": "i32"}
    return kernel_case(
        name,
        _select_of_token,
        types,
        bias=bias,
        product=product,
        rule=rule,
        warps=_best_warps(best),
        GROUP=64,
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
]
