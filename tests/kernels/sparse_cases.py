"""Sparse operands of the decode side, and the truth: dense float64 autograd. Needs torch only."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.kernels.build_csc import FeatureIndex, build_csc

# Without CUDA, Triton's interpreter (tests/conftest.py).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(slots=True, kw_only=True)
class Sparse:
    """B tokens x F features with N entries in token-major order, tables of C columns, and a gradient of the output.

    y_BC and grad_BC are views with a row stride of more than C, as the target layers of a source are.
    """

    offsets: Tensor
    feature_ids: Tensor
    tokens: Tensor
    values: Tensor
    rows_FC: Tensor
    y_BC: Tensor
    grad_BC: Tensor
    index: FeatureIndex

    @property
    def n_features(self) -> int:
        return self.rows_FC.shape[0]


def sparse(b: int, f: int, c: int, k: int, *, seed: int = 0, hot: bool = True) -> Sparse:
    """Up to k features a token; every fourth token is empty; with `hot`, all other tokens activate the same feature.

    Features 0 and F - 1 are active nowhere (F > 3).
    """
    g = torch.Generator().manual_seed(seed)
    rows = []
    for token in range(b):
        drawn = (1 + torch.randperm(f - 2, generator=g)[: k - token % 3]).tolist() if token % 4 else []
        rows.append(sorted({*drawn, f // 2} if hot and drawn else {*drawn}))
    counts = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([feature for row in rows for feature in row], dtype=torch.int64)
    tokens = torch.arange(b).repeat_interleave(counts)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE)

    return Sparse(
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(DEVICE),
        feature_ids=ids.to(DEVICE),
        tokens=tokens.to(DEVICE),
        values=draw(ids.numel()),
        rows_FC=draw(f, c),
        y_BC=draw(b, c + 16)[:, 16:],
        grad_BC=draw(b, c + 16)[:, 16:],
        index=build_csc(ids.to(DEVICE), tokens.to(DEVICE), f),
    )


@dataclass(slots=True, kw_only=True)
class Truth:
    """float64: the decoded y, the gradient of every value, and the gradient of the rows."""

    y_BC: Tensor
    values_N: Tensor
    rows_FC: Tensor


def truth(case: Sparse, operand: torch.dtype = torch.float64) -> Truth:
    """Dense autograd, with the operands of products rounded to `operand` first."""
    values, rows, grad = (tensor.detach().to(operand).double() for tensor in (case.values, case.rows_FC, case.grad_BC))
    values.requires_grad_()
    rows.requires_grad_()
    codes_BF = torch.zeros(case.y_BC.shape[0], case.n_features, dtype=torch.float64, device=rows.device)
    codes_BF = codes_BF.index_put((case.tokens, case.feature_ids), values)
    y_BC = case.y_BC.double() + codes_BF @ rows
    values_N, rows_FC = torch.autograd.grad(y_BC, (values, rows), grad)
    return Truth(y_BC=y_BC.detach(), values_N=values_N, rows_FC=rows_FC)


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Largest difference against the largest value."""
    assert found.shape == wanted.shape
    assert bool(found.isfinite().all())
    if wanted.numel():
        worst = float((found.double() - wanted).abs().max())
        assert worst <= tolerance * max(float(wanted.abs().max()), 1e-30), (worst, float(wanted.abs().max()))
