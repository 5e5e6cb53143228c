"""Encoders of which every sum is exact in any order and on any device, and selection by brute force in float64.

Small integers: products are exact in float32, and what bfloat16 rounds of them has one result. Ties are everywhere.
Needs torch only.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.kernels.sparse_cases import DEVICE
from trainer.kernels.batch_threshold import Candidates
from trainer.kernels.encode_topk import Selection

F32, BF16 = torch.float32, torch.bfloat16
NO_FLOOR = float("-inf")


@dataclass(slots=True, kw_only=True)
class Encoder:
    """One layer and its inputs; `pre_BF` float64: what a product in `compute` gives, to the bit."""

    x_BD: Tensor
    weight_FD: Tensor
    bias_F: Tensor
    compute: torch.dtype
    pre_BF: Tensor

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x_BD, self.weight_FD, self.bias_F


def encoder(
    b: int, f: int, d: int = 3, *, compute: torch.dtype = F32, parameters: torch.dtype = F32, seed: int = 0
) -> Encoder:
    """Of B tokens, F features, D columns; every seventh token is all zero, so only its biases count."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randint(-3, 4, (b, d), generator=g), torch.randint(-2, 3, (f, d), generator=g)
    x[3::7] = 0
    bias = torch.randint(-8, 5, (f,), generator=g) / 4
    product = x.double() @ weight.double().t()
    fused = compute == parameters
    pre = (product + bias.double()).to(parameters) if fused else product.to(compute).double() + bias.double()
    return Encoder(
        x_BD=x.to(DEVICE, parameters),
        weight_FD=weight.to(DEVICE, parameters),
        bias_F=bias.to(DEVICE, parameters),
        compute=compute,
        pre_BF=pre.double().to(DEVICE),
    )


def of_table(pre_BF: Tensor) -> Encoder:
    """Pre-activations that are exactly the given ones."""
    f = pre_BF.shape[1]
    return Encoder(
        x_BD=pre_BF.to(DEVICE, F32),
        weight_FD=torch.eye(f, device=DEVICE),
        bias_F=torch.zeros(f, device=DEVICE),
        compute=F32,
        pre_BF=pre_BF.to(DEVICE, torch.float64),
    )


def norms(f: int) -> Tensor:
    """0, 0.5, 1, 1.5, -0.0, ...: a score of 0 loses against every positive one, but its entry is a candidate."""
    norm_F = torch.arange(f) % 4 / 2
    norm_F[4::8] = -0.0
    return norm_F.to(DEVICE, F32)


def scores_of(pre_BF: Tensor, norm_F: Tensor | None) -> Tensor:
    """float64 scores, -1 where pre <= 0."""
    scores = pre_BF if norm_F is None else pre_BF * norm_F.double()
    return scores.masked_fill(pre_BF <= 0, -1.0)


def best_positions(scores: Tensor, n: int) -> list[int]:
    """Positions of the n best of a flat list, ascending; NaN first, ties by position."""
    order = [(not math.isnan(v), 0.0 if math.isnan(v) else -v, i) for i, v in enumerate(scores.tolist()) if not v < 0]
    return sorted(i for _, _, i in sorted(order)[:n])


def assert_topk(found: Selection, case: Encoder, k: int, norm_F: Tensor | None = None) -> None:
    """Ids, offsets and values, exactly."""
    rows = [best_positions(row, k) for row in scores_of(case.pre_BF, norm_F).cpu()]
    assert_selection(found, case, rows)


def assert_selection(found: Selection, case: Encoder, rows: list[list[int]]) -> None:
    """The features of every token, exactly, with their pre-activations in the dtype of the parameters."""
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    assert found.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    assert found.feature_ids.dtype == torch.int64
    ids = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    assert torch.equal(found.feature_ids.cpu(), ids)
    tokens = torch.arange(len(rows)).repeat_interleave(counts)
    assert found.values.dtype == case.bias_F.dtype
    wanted = case.pre_BF.cpu()[tokens, ids].to(case.bias_F.dtype)
    torch.testing.assert_close(found.values.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


def assert_candidates(
    found: Candidates, case: Encoder, n: int, norm_F: Tensor | None = None, floor: float = NO_FLOOR
) -> None:
    """Positions, values and scores, exactly."""
    scores = scores_of(case.pre_BF, norm_F).cpu().flatten()
    positions = best_positions(torch.where(scores < floor, -1.0, scores), n)
    assert found.positions.tolist() == positions
    pre = case.pre_BF.cpu().flatten()[positions].to(case.bias_F.dtype)
    torch.testing.assert_close(found.values.cpu(), pre, rtol=0, atol=0, equal_nan=True)
    dtype = found.values.dtype if norm_F is None else F32
    torch.testing.assert_close(found.scores.cpu(), scores[positions].to(dtype), rtol=0, atol=0, equal_nan=True)
