"""What the feature-major kernels share: weighted sums of gathered rows, one program per (feature, chunk of columns).

    sum[f] = sum_n w_n table[token_n];   dot_n = table[token_n] . row[f]

A feature with more than SEGMENT entries is long. Its entries are cut into segments, each summed by its own program into
a row of `partials`; a second kernel adds these in order. So no feature holds up the others, nothing is atomic, and two
runs are equal bit for bit.

Where the segments are follows from the offsets alone, without a list and without waiting for the device: entries are
cut into blocks of SEGMENT positions, and a block holds the start of at most one further (not first) segment, which
belongs to the feature of the block's first position. Likewise a block holds the start of at most one long feature.
Hence row `block` of the partials is for the further segment, row `n_blocks + block` for a long feature's first one.

Legend: B tokens, F features, C columns, N entries, E blocks.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.build_csc import FeatureIndex
from trainer.kernels.gpu.compile import CompileCase
from trainer.kernels.gpu.launch import blocks, chunk_columns, run

# Entries that one program sums: about 40 microseconds of latency at 8 rows in flight.
SEGMENT = 256
# A segment is at least this many times longer than the mean feature: many entries of all features are no imbalance, and
# the partials stay below half the size of the sums.
_MEAN_ENTRIES = 4
# Rows in flight per program.
ENTRIES = 8
# Entries whose dots one program adds up over the chunks.
_DOTS_BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPass:
    """One pass over features and chunks: its cut, and the scratch of both kernels.

    block_features_E: the feature of every block's first position; partials: (2 E, C) float32 sums of segments;
    dots: (chunks, N) float32, feature-major, or None.
    """

    n_blocks: int
    segment: int
    chunk: int
    n_chunks: int
    block_features_E: Tensor
    partials: Tensor
    dots: Tensor | None

    def grid(self, n_features: int) -> tuple[int, int]:
        """Programs of the first kernel."""
        return self.n_blocks + n_features, self.n_chunks

    def join_grid(self) -> tuple[int, int]:
        """Programs of the second kernel."""
        return self.n_blocks, self.n_chunks


def plan_pass(index: FeatureIndex, table_BC: Tensor, *, sums: bool, dots: bool) -> RowPass:
    """Cut the work; `sums` and `dots` say which scratch is wanted. Nothing waits for the device."""
    n_entries, n_features, n_columns = index.order_N.numel(), index.offsets.numel() - 1, table_BC.shape[1]
    segment = max(SEGMENT, triton.next_power_of_2(_MEAN_ENTRIES * n_entries // max(n_features, 1)))
    n_blocks = blocks(n_entries, segment) if n_entries > segment else 0
    chunk = chunk_columns(table_BC)
    n_chunks = blocks(n_columns, chunk)
    device = table_BC.device
    starts_E = torch.arange(0, n_blocks * segment, segment, device=device)
    return RowPass(
        n_blocks=n_blocks,
        segment=segment,
        chunk=chunk,
        n_chunks=n_chunks,
        block_features_E=torch.searchsorted(index.offsets, starts_E, right=True) - 1,
        partials=torch.empty(2 * n_blocks if sums else 0, n_columns, dtype=torch.float32, device=device),
        dots=torch.empty(n_chunks, n_entries, dtype=torch.float32, device=device) if dots else None,
    )


def sum_dots(plan: RowPass, index: FeatureIndex, dtype: torch.dtype) -> Tensor | None:
    """(N) the dots over all columns, token-major; None where the pass took none."""
    if plan.dots is None:
        return None
    n_entries = index.order_N.numel()
    out_N = torch.empty(n_entries, dtype=dtype, device=plan.dots.device)
    grid = (blocks(n_entries, _DOTS_BLOCK),)
    run(_sum_dots, grid, out_N, out_N, plan.dots, index.order_N, n_entries, plan.n_chunks, BLOCK=_DOTS_BLOCK)
    return out_N


@triton.jit
def segment_of(program, n_blocks, block_features, offsets, SEGMENT: tl.constexpr):
    """Feature and entries of a program of the first kernel: the further segments first, for they take longest.

    Returns feature, start, stop, whether it has nothing to do, whether the feature is long, the row of its partial sum.
    """
    program = program.to(tl.int64)
    further = program < n_blocks
    feature = tl.where(further, tl.load(block_features + program, mask=further, other=0), program - n_blocks)
    begin = tl.load(offsets + feature)
    end = tl.load(offsets + feature + 1)
    skipped = tl.where(further, (program * SEGMENT - begin + SEGMENT - 1) // SEGMENT, 0)
    start = begin + skipped * SEGMENT
    nothing = further & ((skipped == 0) | (start >= end))
    slot = tl.where(further, program, n_blocks + begin // SEGMENT)
    return feature, start, tl.minimum(start + SEGMENT, end), nothing, end - begin > SEGMENT, slot


@triton.jit
def gather_sum(
    table, table_stride, tokens, weights, start, stop, cols, inside, row, dots,
    ROUND: tl.constexpr, DOTS: tl.constexpr, CHUNK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """The weighted sum of the entries start:stop of a chunk; with DOTS also stores each entry's dot with `row`."""
    total = tl.zeros([CHUNK], tl.float32)
    for n in range(start, stop, ENTRIES):
        entries = n + tl.arange(0, ENTRIES)
        live = entries < stop
        token = tl.load(tokens + entries, mask=live, other=0)
        weight = tl.load(weights + entries, mask=live, other=0.0).to(tl.float32)
        places = token[:, None] * table_stride + cols[None, :]
        values = tl.load(table + places, mask=live[:, None] & inside[None, :], other=0.0)
        if ROUND:
            values = values.to(tl.bfloat16)
        values = values.to(tl.float32)
        total += tl.sum(weight[:, None] * values, axis=0)
        if DOTS:
            tl.store(dots + entries, tl.sum(values * row[None, :], axis=1), mask=live)
    return total


@triton.jit
def long_feature_of(block, block_features, offsets, SEGMENT: tl.constexpr):
    """The long feature whose second segment starts in `block`: feature, begin, end; begin == end: there is none."""
    feature = tl.load(block_features + block)
    begin = tl.load(offsets + feature)
    end = tl.load(offsets + feature + 1)
    is_second = (block * SEGMENT - begin + SEGMENT - 1) // SEGMENT == 1
    return feature, begin, tl.where(is_second & (end - begin > SEGMENT), end, begin)


@triton.jit
def join_segments(
    partials, n_blocks, n_columns, begin, end, cols, inside,
    SEGMENT: tl.constexpr, CHUNK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """The sum of a long feature's partial rows: first the further segments in order, then the first one."""
    total = tl.zeros([CHUNK], tl.float32)
    for start in range(begin + SEGMENT, end, SEGMENT * ENTRIES):
        starts = start + tl.arange(0, ENTRIES) * SEGMENT
        places = (starts // SEGMENT)[:, None] * n_columns + cols[None, :]
        total += tl.sum(tl.load(partials + places, mask=(starts < end)[:, None] & inside[None, :], other=0.0), axis=0)
    first = partials + (n_blocks + begin // SEGMENT) * n_columns + cols
    return total + tl.load(first, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["n_entries"])
def _sum_dots(out, dots, order, n_entries, n_chunks, BLOCK: tl.constexpr):
    """Program: BLOCK entries, added chunk by chunk, stored at their token-major positions."""
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = entries < n_entries
    total = tl.zeros([BLOCK], tl.float32)
    place = dots + entries
    for _ in range(n_chunks):
        total += tl.load(place, mask=live, other=0.0)
        place += n_entries
    tl.store(out + tl.load(order + entries, mask=live, other=0), total, mask=live)


COMPILE_CASES = [
    CompileCase(
        name="sum of dots",
        kernel=_sum_dots,
        signature={"out": "*fp32", "dots": "*fp32", "order": "*i64", "n_entries": "i32", "n_chunks": "i32"},
        constexprs={"BLOCK": _DOTS_BLOCK},
        num_warps=1,
    )
]
