"""Operands as they may lie in memory: transposed, every second value of another tensor, or one row for all tokens.

What an op reads may lie as it likes; what it writes must have its columns side by side and its rows apart. Every
backend that runs here (Triton's without CUDA in its interpreter) against dense float64 autograd.
"""

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from tests.kernels.sparse_cases import DEVICE, Sparse, assert_near, sparse, truth
from trainer.kernels.build_csc import FeatureIndex, build_csc
from trainer.kernels.dispatch import Kernels, kernels
from trainer.kernels.fused_adam_rows import AdamHyper

F32 = torch.float32
NEAR = 2e-6
# Enough columns for the sparse product of the reference; few for the interpreter.
SHAPES = {"reference": (9, 20, 1100, 3), "cpu": (9, 20, 12, 3), "triton": (9, 20, 12, 3)}
HYPER = AdamHyper(3e-3, 0.9, 0.999, 1e-8, 0.1, 0.001)


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> Kernels:
    try:
        return kernels(request.param, DEVICE)
    except ValueError as error:
        pytest.skip(str(error))


def transposed(table: Tensor) -> Tensor:
    """Columns far apart, rows side by side."""
    return table.t().contiguous().t() if table.ndim == 2 else spaced(table)


def spaced(tensor: Tensor) -> Tensor:
    """Every second value of a larger tensor."""
    return torch.stack([tensor, torch.full_like(tensor, 7)], dim=-1)[..., 0]


def laid_out(case: Sparse, layout: Callable[[Tensor], Tensor], *, index_too: bool) -> Sparse:
    """The same values in another layout; y as it is."""
    names = [f.name for f in fields(case) if f.name not in {"index", "y_BC"}]
    index = FeatureIndex(*map(layout, case.index)) if index_too else case.index
    return replace(case, **{name: layout(getattr(case, name)) for name in names}, index=index)


def codes(case: Sparse) -> tuple[Tensor, Tensor, Tensor]:
    return case.offsets, case.feature_ids, case.values


def backward(backend: Kernels, case: Sparse, *, out_FC: Tensor | None, dots: bool = True) -> Tensor | None:
    return backend.decoder_backward(
        case.grad_BC, case.rows_FC, case.offsets, case.feature_ids, case.tokens, case.index, case.values, F32,
        out_FC=out_FC, accumulate=False, dots=dots,
    )  # fmt: skip


def check_all_ops(backend: Kernels, case: Sparse, dense: Sparse) -> None:
    """Every op that reads rows, on `case`; `dense` holds its values."""
    wanted = truth(dense)
    y_BC = dense.y_BC.clone()
    backend.sparse_decode(y_BC, *codes(case), case.rows_FC, F32)
    assert_near(y_BC, wanted.y_BC, NEAR)
    for out in (torch.empty_like(dense.rows_FC), None):
        dots = backward(backend, case, out_FC=out)
        assert dots is not None
        assert_near(dots, wanted.values_N, NEAR)
        if out is not None:
            assert_near(out, wanted.rows_FC, NEAR)
    assert_near(backend.row_gradients(case.index, case.values, case.grad_BC, F32), wanted.rows_FC, NEAR)
    sums = torch.zeros(dense.n_features, dtype=torch.float64, device=DEVICE)
    sums.index_add_(0, dense.feature_ids, dense.values.double())
    assert_near(backend.feature_sums(case.index, case.values), sums, NEAR)
    rows, first, second = dense.rows_FC.clone(), *torch.zeros(2, *dense.rows_FC.shape, device=DEVICE)
    _, dots = backend.fused_adam_rows(
        rows, first, second, case.index, case.values, case.grad_BC, HYPER._replace(lr=0), dots=True
    )
    assert dots is not None
    assert_near(dots, wanted.values_N, NEAR)
    assert_near(first, 0.1 * wanted.rows_FC, 2 * NEAR)


@pytest.mark.parametrize("layout", [transposed, spaced])
@pytest.mark.parametrize("index_too", [False, True])
def test_what_is_read_may_lie_as_it_likes(
    backend: Kernels, layout: Callable[[Tensor], Tensor], index_too: bool
) -> None:
    case = sparse(*SHAPES[backend.name])
    check_all_ops(backend, laid_out(case, layout, index_too=index_too), case)


@pytest.mark.parametrize("name", ["offsets", "feature_ids", "tokens", "values", "rows_FC", "grad_BC", "index"])
def test_each_operand_alone(backend: Kernels, name: str) -> None:
    """The others are dense: an op that hands anything unusual to another backend would hide the rest."""
    case = sparse(*SHAPES[backend.name])
    operand = getattr(case, name)
    moved = FeatureIndex(*map(spaced, operand)) if name == "index" else spaced(operand)
    check_all_ops(backend, replace(case, **{name: moved}), case)


def test_one_gradient_for_all(backend: Kernels) -> None:
    """What autograd hands to a decoding whose output is summed up: all strides are zero."""
    case = sparse(*SHAPES[backend.name])
    one = torch.ones(1, device=DEVICE)
    dense = replace(case, grad_BC=one.repeat(case.grad_BC.shape), values=one.repeat(case.values.shape))
    case = replace(case, grad_BC=one.expand(case.grad_BC.shape), values=one.expand(case.values.shape))
    check_all_ops(backend, case, dense)
    row_BC = torch.randn(1, case.grad_BC.shape[1], device=DEVICE).expand(case.grad_BC.shape)
    check_all_ops(backend, replace(case, grad_BC=row_BC), replace(dense, grad_BC=row_BC.contiguous()))


@pytest.mark.parametrize("layout", [transposed, spaced, lambda table: table[:1].expand(table.shape)])
def test_what_is_written_lies_by_rows(backend: Kernels, layout: Callable[[Tensor], Tensor]) -> None:
    """Refused in one line, with what was given, and nothing is written."""
    case = sparse(*SHAPES[backend.name])
    y, table, good = layout(case.y_BC), layout(case.rows_FC), case.rows_FC.clone()
    before = y.clone(), table.clone()
    adam = (case.index, case.values, case.grad_BC, HYPER)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("y_BC", lambda: backend.sparse_decode(y, *codes(case), case.rows_FC, F32)),
        ("out_FC", lambda: backward(backend, case, out_FC=table)),
        ("out_FC", lambda: backward(backend, case, out_FC=table, dots=False)),
        ("out_FC", lambda: backend.row_gradients(case.index, case.values, case.grad_BC, F32, out_FC=table)),
        ("rows_FC", lambda: backend.fused_adam_rows(table, good, good, *adam, dots=False)),
        ("exp_avg_FC", lambda: backend.fused_adam_rows(good, table, good, *adam, dots=False)),
        ("exp_avg_sq_FC", lambda: backend.fused_adam_rows(good, good, table, *adam, dots=False)),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=rf"^{name} of shape \(.*\) has strides \(.*pass a contiguous tensor"):
            call()
    assert torch.equal(y, before[0])
    assert torch.equal(table, before[1])


def test_one_row_and_no_row_may_have_any_stride(backend: Kernels) -> None:
    """A table of one row is written as it lies, whatever torch says its row stride is."""
    index = build_csc(torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.arange(2, device=DEVICE), 1)
    out, x = torch.zeros(4, device=DEVICE).as_strided((1, 4), (0, 1)), torch.randn(2, 4, device=DEVICE)
    backend.row_gradients(index, torch.ones(2, device=DEVICE), x, F32, out_FC=out)
    assert_near(out, x.double().sum(dim=0, keepdim=True), NEAR)
