"""The compiled decode side and the fused Adam against float64 autograd, brute force and torch.optim.Adam."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.sparse_cases import Sparse, assert_near, sparse, truth
from trainer.kernels import build_csc as reference_index
from trainer.kernels.build_csc import FeatureIndex
from trainer.kernels.cpu import build_csc as cpu_index
from trainer.kernels.cpu import row_tasks
from trainer.kernels.cpu.build_csc import build_csc
from trainer.kernels.cpu.fused_adam_rows import fused_adam_rows
from trainer.kernels.cpu.sparse_backward import decoder_backward, feature_sums, row_gradients
from trainer.kernels.cpu.sparse_decode import sparse_decode
from trainer.kernels.dispatch import REFERENCE
from trainer.kernels.fused_adam_rows import AdamHyper

F32 = torch.float32
PROFILE = settings(max_examples=25, deadline=None)
# tokens, features, columns, entries per token at most: odd, wider than a chunk, a hot feature cut by columns.
SHAPES = [(41, 1271, 100, 7), (20, 1100, 1300, 3), (33, 5, 2500, 3), (3000, 60, 96, 3), (1, 4, 1, 1)]
# Against the largest value; sums of at most 2,500 products in float32.
TOLERANCE = 2e-6


def on_cpu(case: Sparse) -> Sparse:
    """sparse_cases puts tensors on a GPU where there is one."""
    moved = {f.name: getattr(case, f.name) for f in fields(case)}
    index = FeatureIndex(*(t.cpu() for t in moved.pop("index")))
    return Sparse(**{name: t.cpu() for name, t in moved.items()}, index=index)


def backward(case: Sparse, **options: object) -> Tensor | None:
    return decoder_backward(
        case.grad_BC,
        case.rows_FC,
        case.offsets,
        case.feature_ids,
        case.tokens,
        case.index,
        case.values,
        F32,
        **options,  # type: ignore[arg-type]
    )


@PROFILE
@given(st.integers(0, 300), st.integers(1, 50), st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 5]))
def test_index(n: int, f: int, seed: int, chunks: int) -> None:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, f, (n,), generator=g)
    tokens = torch.randint(0, 99, (n,), generator=g).sort().values
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(cpu_index, "_CHUNK", max(1, n // chunks))
        found = build_csc(ids, tokens, f)
    for a, b in zip(found, reference_index.build_csc(ids, tokens, f), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hot", [True, False])
def test_decode_and_its_gradients(shape: tuple[int, int, int, int], hot: bool) -> None:
    check_decode_and_gradients(on_cpu(sparse(*shape, hot=hot)))


@PROFILE
@given(
    st.integers(1, 70), st.integers(4, 40), st.integers(1, 1100), st.integers(1, 9), st.booleans(), st.integers(0, 999)
)
def test_decode_and_its_gradients_over_shapes(b: int, f: int, c: int, k: int, hot: bool, seed: int) -> None:
    """Empty tokens, features without entries, and one that all others activate."""
    check_decode_and_gradients(on_cpu(sparse(b, f, c, min(k, f - 2), seed=seed, hot=hot)))


def check_decode_and_gradients(case: Sparse) -> None:
    wanted = truth(case)
    y = case.y_BC.clone()
    sparse_decode(y, case.offsets, case.feature_ids, case.values, case.rows_FC, F32)
    assert_near(y, wanted.y_BC, TOLERANCE)
    before = torch.randn_like(case.rows_FC)
    for accumulate in (False, True):
        out = before.clone()
        dots = backward(case, out_FC=out, accumulate=accumulate, dots=True)
        assert dots is not None
        assert_near(dots, wanted.values_N, TOLERANCE)
        assert_near(out, wanted.rows_FC + before.double() * accumulate, TOLERANCE)
        alone = before.clone()
        assert backward(case, out_FC=alone, accumulate=accumulate, dots=False) is None
        assert_near(alone, wanted.rows_FC + before.double() * accumulate, TOLERANCE)
    dots = backward(case, out_FC=None, accumulate=False, dots=True)
    assert dots is not None
    assert_near(dots, wanted.values_N, TOLERANCE)
    assert_near(row_gradients(case.index, case.values, case.grad_BC, F32), wanted.rows_FC, TOLERANCE)
    sums = torch.zeros(case.n_features, dtype=torch.float64).index_add(0, case.feature_ids, case.values.double())
    assert_near(feature_sums(case.index, case.values), sums, TOLERANCE)


def test_no_entries() -> None:
    case = on_cpu(sparse(9, 6, 20, 2))
    none = torch.zeros(0, dtype=torch.int64)
    empty = replace(
        case,
        offsets=torch.zeros(10, dtype=torch.int64),
        feature_ids=none,
        tokens=none,
        values=torch.zeros(0),
        index=build_csc(none, none, 6),
    )
    y = case.y_BC.clone()
    sparse_decode(y, empty.offsets, none, empty.values, case.rows_FC, F32)
    assert torch.equal(y, case.y_BC)
    out = torch.ones(6, 20)
    dots = backward(empty, out_FC=out, accumulate=False, dots=True)
    assert dots is not None
    assert dots.numel() == 0
    assert out.count_nonzero() == 0
    assert feature_sums(empty.index, empty.values).tolist() == [0.0] * 6


def test_a_million_features() -> None:
    """F = 2^20 with two columns; entries at both ends."""
    f = 2**20
    ids = torch.tensor([0, 5, f - 1, f - 2, f - 1])
    tokens, offsets = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 3, 5])
    values, rows, grad = torch.arange(1.0, 6), torch.arange(2.0 * f).view(f, 2) % 11, torch.ones(2, 2)
    index = build_csc(ids, tokens, f)
    out = torch.empty(f, 2)
    dots = decoder_backward(
        grad, rows, offsets, ids, tokens, index, values, F32, out_FC=out, accumulate=False, dots=True
    )
    assert dots is not None
    assert torch.equal(dots, rows[ids].sum(dim=1))
    assert out[[0, 5, f - 2, f - 1], 0].tolist() == [1, 2, 4, 8]
    assert int(out.count_nonzero()) == 8


def test_offsets_beyond_two_to_the_31() -> None:
    """Tables whose last row begins behind what 32 bits can count, in values; untouched pages take no memory."""

    def far(rows: Tensor) -> Tensor:
        table = torch.empty(2**31 + rows.shape[1]).as_strided(rows.shape, (2**30, 1))
        return table.copy_(rows)

    case = on_cpu(sparse(3, 3, 8, 1))
    case.offsets, case.feature_ids = torch.tensor([0, 0, 0, 2]), torch.tensor([0, 2])
    case.tokens, case.values = torch.tensor([2, 2]), torch.tensor([1.5, -0.5])
    case.index = build_csc(case.feature_ids, case.tokens, 3)
    wanted = truth(case)
    distant = replace(case, rows_FC=far(case.rows_FC), y_BC=far(case.y_BC), grad_BC=far(case.grad_BC))
    sparse_decode(distant.y_BC, distant.offsets, distant.feature_ids, distant.values, distant.rows_FC, F32)
    assert_near(distant.y_BC, wanted.y_BC, TOLERANCE)
    out = far(torch.ones(3, 8))
    dots = backward(distant, out_FC=out, accumulate=False, dots=True)
    assert dots is not None
    assert_near(dots, wanted.values_N, TOLERANCE)
    assert_near(out, wanted.rows_FC, TOLERANCE)
    moments = far(torch.zeros(3, 8)), far(torch.zeros(3, 8))
    hyper = AdamHyper(1e-2, 0.9, 0.999, 1e-8, 0.1, 1e-3)
    fused_adam_rows(distant.rows_FC, *moments, case.index, case.values, distant.grad_BC, hyper, dots=False)
    assert_near(moments[0], 0.1 * wanted.rows_FC, TOLERANCE)


def test_nan_reaches_what_it_touches_and_nothing_else() -> None:
    case = on_cpu(sparse(41, 30, 50, 4))
    grad = case.grad_BC.clone()
    grad[6] = torch.nan
    out = torch.empty(30, 50)
    dots = backward(replace(case, grad_BC=grad), out_FC=out, accumulate=False, dots=True)
    assert dots is not None
    assert torch.equal(dots.isnan(), case.tokens == 6)
    assert torch.equal(out.isnan().any(dim=1).nonzero()[:, 0], case.feature_ids[case.tokens == 6].sort().values)


def adam_case(f: int, c: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    rows, moments = torch.randn(f, c, generator=g), torch.rand(2, f, c, generator=g)
    return rows, moments[0] - 0.5, moments[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_fused_adam_against_the_reference(shape: tuple[int, int, int, int]) -> None:
    case = on_cpu(sparse(*shape))
    hyper = AdamHyper(1e-2, 0.9, 0.999, 1e-8, 1 - 0.9**3, 1 - 0.999**3)
    ours, theirs = adam_case(shape[1], shape[2]), adam_case(shape[1], shape[2])
    for dots in (True, False):
        squares, found = fused_adam_rows(*ours, case.index, case.values, case.grad_BC, hyper, dots=dots)
        wanted_squares, wanted = REFERENCE.fused_adam_rows(
            *theirs, case.index, case.values, case.grad_BC, hyper, dots=dots
        )
        assert squares.dtype == torch.float64
        torch.testing.assert_close(squares, wanted_squares, rtol=1e-6, atol=0)
        assert (found is None) == (wanted is None) == (not dots)
        if found is not None and wanted is not None:
            assert_near(found, wanted.double(), TOLERANCE)
        for a, b in zip(ours, theirs, strict=True):
            assert_near(a, b.double(), TOLERANCE)


@example(idle=9, f=3, c=1100)
@settings(max_examples=4, deadline=None)
@given(st.integers(2, 12), st.integers(3, 20), st.integers(1, 70))
def test_fifty_steps_of_adam(idle: int, f: int, c: int) -> None:
    """Rows rest for `idle` steps and still decay and move, as in torch.optim.Adam."""
    g = torch.Generator().manual_seed(idle)
    rows = torch.randn(f, c, generator=g)
    theirs = torch.nn.Parameter(rows.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.99))
    ours = (rows, torch.zeros(f, c), torch.zeros(f, c))
    for step in range(1, 51):
        active = [i for i in range(f) if (step + i) % idle < 2]
        tokens_BC = torch.randn(4, c, generator=g)
        ids = torch.tensor(active * 4, dtype=torch.int64)
        tokens = torch.arange(4).repeat_interleave(len(active))
        weights = torch.randn(ids.numel(), generator=g)
        gradient = torch.zeros(f, c).index_add(0, ids, weights[:, None] * tokens_BC[tokens])
        hyper = AdamHyper(0.01, 0.9, 0.99, 1e-8, 1 - 0.9**step, 1 - 0.99**step)
        squares, _ = fused_adam_rows(*ours, build_csc(ids, tokens, f), weights, tokens_BC, hyper, dots=False)
        assert float(squares) == pytest.approx(float(gradient.double().square().sum()), rel=1e-5)
        theirs.grad = gradient
        optimizer.step()
    torch.testing.assert_close(rows, theirs.detach(), rtol=1e-5, atol=1e-5)


def test_other_dtypes_go_to_the_reference() -> None:
    case = on_cpu(sparse(9, 12, 40, 3))
    y, wanted = case.y_BC.clone(), case.y_BC.clone()
    sparse_decode(y, case.offsets, case.feature_ids, case.values, case.rows_FC, torch.bfloat16)
    REFERENCE.sparse_decode(wanted, case.offsets, case.feature_ids, case.values, case.rows_FC, torch.bfloat16)
    assert torch.equal(y, wanted)
    double = row_gradients(case.index, case.values.double(), case.grad_BC.double(), torch.float64)
    assert double.dtype == torch.float64


def test_parts_cover_everything_once() -> None:
    """Every (feature, column) in one part; every entry's dot in one part."""
    counts = torch.tensor([0, 5000, 3, 0, 1, 90000, 2, 0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    for columns in (3, 900):
        tasks = row_tasks.row_tasks(offsets, columns, idle_cost=1)
        covered, dotted = torch.zeros(8, columns, dtype=torch.int64), torch.zeros(int(offsets[-1]), dtype=torch.int64)
        for f0, f1, c0, c1, with_dots in tasks.rows[: tasks.n_rows].tolist():
            covered[f0:f1, c0:c1] += 1
            dotted[offsets[f0] : offsets[f1]] += with_dots
        for n0, n1 in tasks.dots[: tasks.n_dots].tolist():
            dotted[n0:n1] += 1
        assert bool((covered == 1).all())
        assert bool((dotted == 1).all())
        assert tasks.n_rows > 1 or columns == 3
