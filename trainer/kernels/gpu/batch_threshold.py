"""batch_threshold on CUDA: candidates block by block under a rising floor, and the exact cut by histograms.

    floor      the n-th largest of what was found so far, or of the first blocks' group marks (a lower bound of it)
    per block  group marks (the whole product, once), then the groups that reach the floor: counted, written in order

Found entries are cut to the n best whenever there are more than 2 n. The host waits once a block, for the size of what
was found; one block holds all tokens where memory allows.

Legend: B tokens, D d_model, F features, N candidates.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from trainer.kernels import batch_threshold as reference
from trainer.kernels.batch_threshold import Candidates
from trainer.kernels.gpu.entries import Entries, count_entries, write_entries
from trainer.kernels.gpu.groups import (
    LARGEST_MARK,
    NORM,
    PLAIN,
    Groups,
    Rule,
    group_size,
    list_groups,
    mark_groups,
    new_groups,
    scratch_bytes,
)
from trainer.kernels.gpu.launch import has_kernel
from trainer.kernels.gpu.nth_largest import Reduce, alone, bound_of_nth, largest, marks_from_scores
from trainer.kernels.gpu.products import Block, block_tokens, has_encoder, token_blocks


def encode_candidates(
    x_BD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor,
    n: int,
    floor: float,
    norm_F: Tensor | None,
    compute_dtype: torch.dtype,
) -> Candidates:
    """The n best entries of the layer, compared in float32 (as are their scores, where there is a norm >= 0).

    float64: the reference.
    """
    if not has_encoder(weight_FD, bias_F, compute_dtype):
        return reference.encode_candidates(x_BD, weight_FD, bias_F, n, floor, norm_F, compute_dtype)
    n_tokens, n_features = x_BD.shape[0], bias_F.numel()
    rule = Rule(kind=PLAIN) if norm_F is None else Rule(kind=NORM, aux_F=norm_F.contiguous())
    size = _group_size(n_tokens, n_features, n, compute_dtype, x_BD.device)
    tokens = block_tokens(n_tokens, _row_bytes(n_features, size, compute_dtype), x_BD.device)
    groups = new_groups(tokens, n_features, size, x_BD.device)
    best = _Best(n, floor, x_BD.device)
    for block in token_blocks(x_BD, weight_FD, bias_F, compute_dtype, tokens):
        marks = mark_groups(block, rule, groups)
        best.add(_reaching(block, rule, groups, best.bound(marks)))
    found = best.cut()
    values = found.values.to(bias_F.dtype)
    return Candidates(found.places, values, values if norm_F is None else found.scores)


def batch_threshold(layers: list[Candidates], n: int, n_features: int, reduce: Reduce = alone) -> list[Tensor]:
    """See the reference. With `reduce`, the n largest over all devices; their positions must then be global ones."""
    scores = torch.cat([layer.scores for layer in layers])
    if not has_kernel(scores):
        return reference.batch_threshold(layers, n, n_features)
    keys = torch.cat(
        [
            (layer.positions // n_features * len(layers) + s) * n_features + layer.positions % n_features
            for s, layer in enumerate(layers)
        ]
    )
    kept = largest(marks_from_scores(scores), n, keys, reduce)
    return list(torch.split(kept, [layer.scores.numel() for layer in layers]))


class _Best:
    """What the blocks gave so far, and the least mark that later entries need."""

    def __init__(self, n: int, floor: float, device: torch.device) -> None:
        self.n = n
        self.floor = torch.full((1,), _floor_mark(floor), dtype=torch.int32, device=device)
        self.found = Entries(
            torch.empty(0, dtype=torch.int64, device=device),
            torch.empty(0, device=device),
            torch.empty(0, device=device),
        )

    def bound(self, marks_RG: Tensor) -> Tensor:
        """(1) int32: the floor for a block. Ties with it stay in: they are cut by position."""
        if self.n and self.found.places.numel() >= self.n:
            self.floor = torch.maximum(self.floor, bound_of_nth(marks_from_scores(self.found.scores), self.n))
        elif self.n and marks_RG.numel() >= self.n:
            self.floor = torch.maximum(self.floor, bound_of_nth(marks_RG.reshape(-1), self.n))
        return self.floor

    def add(self, entries: Entries) -> None:
        """Entries of the next block, in order."""
        parts = zip(self.found, entries, strict=True)
        self.found = Entries(*(torch.cat(pair) if pair[0].numel() else pair[1] for pair in parts))
        if self.found.places.numel() > 2 * self.n:
            self.cut()

    def cut(self) -> Entries:
        """Keep the n best."""
        if self.found.places.numel() > self.n:
            kept = largest(marks_from_scores(self.found.scores), self.n).nonzero_static(size=self.n)[:, 0]
            self.found = Entries(*(part[kept] for part in self.found))
        return self.found


def _reaching(block: Block, rule: Rule, groups: Groups, bound: Tensor) -> Entries:
    """The entries of a block that reach the bound."""
    list_groups(groups, bound, block.n_tokens)
    ends = count_entries(block, rule, groups, bound).cumsum(0, dtype=torch.int64)
    starts = functional.pad(ends[:-1], (1, 0))
    return write_entries(block, rule, groups, bound, starts, int(ends[-1]), row_step=block.product_RF.shape[1])


def _row_bytes(n_features: int, size: int, compute_dtype: torch.dtype) -> int:
    return n_features * compute_dtype.itemsize + scratch_bytes(n_features, size)


def _group_size(n_tokens: int, n_features: int, n: int, compute_dtype: torch.dtype, device: torch.device) -> int:
    """Such that one block has groups enough for a bound on the n-th largest of all."""
    tokens = block_tokens(n_tokens, _row_bytes(n_features, 1, compute_dtype), device)
    return group_size(tokens * n_features, n)


def _floor_mark(floor: float) -> int:
    """The least mark of scores >= floor; NaN is no floor."""
    if math.isnan(floor) or floor <= 0:
        return 1
    single = torch.tensor(floor, dtype=torch.float64).float()
    if float(single) < floor:
        single = torch.nextafter(single, torch.tensor(torch.inf))
    return min(int(single.view(torch.int32)) + 1, LARGEST_MARK)
