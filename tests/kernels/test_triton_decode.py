"""The Triton kernels of the decode side against dense float64 autograd and against the reference backend.

Without CUDA they run in Triton's interpreter, whose casts to bfloat16 truncate instead of rounding: where a kernel
itself rounds, the tolerance is that of truncation. tests/gpu runs the same functions on a device.
"""

import pytest
import torch
from torch import Tensor

from tests.kernels.sparse_cases import DEVICE, Sparse, assert_near, sparse, truth

pytest.importorskip("triton")

from trainer.kernels import fused_adam_rows as reference_adam
from trainer.kernels import sparse_backward as reference_backward
from trainer.kernels import sparse_decode as reference_decode
from trainer.kernels.build_csc import build_csc
from trainer.kernels.fused_adam_rows import AdamHyper
from trainer.kernels.gpu import feature_rows, launch
from trainer.kernels.gpu import fused_adam_rows as adam
from trainer.kernels.gpu import sparse_backward as backward
from trainer.kernels.gpu.sparse_decode import sparse_decode

F32, BF16 = torch.float32, torch.bfloat16
# float32 sums; a bfloat16 operand truncated inside a kernel; a result stored as bfloat16.
NEAR, ROUNDED, STORED = 2e-6, 8e-3, 8e-3
ODD = (41, 1271, 100, 7)
SMALL = (23, 67, 300, 6)


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature of more than 8 entries is long here, so that small shapes reach that path."""
    monkeypatch.setattr(feature_rows, "SEGMENT", 8)
    monkeypatch.setattr(feature_rows, "_MEAN_ENTRIES", 0)


def decoded(case: Sparse, compute_dtype: torch.dtype) -> Tensor:
    y_BC = case.y_BC.clone()
    sparse_decode(y_BC, case.offsets, case.feature_ids, case.values, case.rows_FC, compute_dtype)
    return y_BC


def gradients(
    case: Sparse, compute_dtype: torch.dtype, *, out_FC: Tensor | None, accumulate: bool = False, dots: bool = True
) -> Tensor | None:
    return backward.decoder_backward(
        case.grad_BC,
        case.rows_FC,
        case.offsets,
        case.feature_ids,
        case.tokens,
        case.index,
        case.values,
        compute_dtype,
        out_FC=out_FC,
        accumulate=accumulate,
        dots=dots,
    )


def rounded_in_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are gathered as they are."""
    monkeypatch.setattr(launch, "_READS_WORTH_A_COPY", 10**9)


def test_chunks_fit_the_cache_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 bytes of a row; 256 where only these fit; 512 again where nothing fits."""
    monkeypatch.setattr(launch, "cache_bytes", lambda _: 25 * 2**20)
    columns = {rows: launch.chunk_columns(torch.empty(rows, 1, dtype=BF16)) for rows in (32768, 65536, 131072)}
    assert columns == {32768: 256, 65536: 128, 131072: 256}
    assert launch.chunk_columns(torch.empty(32768, 1)) == 128


@pytest.mark.parametrize("shape", [ODD, SMALL, (5, 4, 1, 2), (3, 9, 129, 3)])
def test_decode(shape: tuple[int, int, int, int]) -> None:
    case = sparse(*shape)
    assert_near(decoded(case, F32), truth(case).y_BC, NEAR)


def test_decode_changes_only_its_columns() -> None:
    case = sparse(*SMALL)
    whole = torch.full((23, 500), 7.0, device=DEVICE)
    view = whole[:, 100:400]
    view.copy_(case.y_BC)
    sparse_decode(view, case.offsets, case.feature_ids, case.values, case.rows_FC, F32)
    assert_near(view, truth(case).y_BC, NEAR)
    assert bool((whole[:, :100] == 7).all())
    assert bool((whole[:, 400:] == 7).all())


def test_decode_bf16_from_a_copy() -> None:
    """More reads than rows: the table is rounded by torch first, and sums are exact to float32."""
    case = sparse(41, 13, 300, 7)
    assert_near(decoded(case, BF16), truth(case, BF16).y_BC, NEAR)


def test_decode_bf16_rounded_in_the_kernel() -> None:
    case = sparse(*ODD)
    assert_near(decoded(case, BF16), truth(case, BF16).y_BC, ROUNDED)


def test_decode_bf16_parameters_and_output() -> None:
    case = sparse(*SMALL)
    case.rows_FC = case.rows_FC.to(BF16)
    assert_near(decoded(case, F32), truth(case).y_BC, NEAR)
    case.y_BC = case.y_BC.to(BF16)
    assert_near(decoded(case, BF16), truth(case, BF16).y_BC, STORED)


@pytest.mark.parametrize("shape", [ODD, SMALL, (9, 4, 1, 2)])
def test_backward(shape: tuple[int, int, int, int]) -> None:
    """Stored over what must not survive: rows that nobody activates become zero."""
    case, wanted = sparse(*shape), truth(sparse(*shape))
    out = torch.full_like(case.rows_FC, float("nan"))
    dots = gradients(case, F32, out_FC=out)
    assert dots is not None
    assert_near(dots, wanted.values_N, NEAR)
    assert_near(out, wanted.rows_FC, NEAR)
    assert bool((out[0] == 0).all())


def test_backward_accumulates() -> None:
    case = sparse(*SMALL)
    before = torch.randn_like(case.rows_FC)
    out = torch.cat([before, before], dim=1)[:, : before.shape[1]]
    assert gradients(case, F32, out_FC=out, accumulate=True, dots=False) is None
    assert_near(out, before.double() + truth(case).rows_FC, NEAR)
    assert torch.equal(out[0], before[0])


def test_backward_dots_alone() -> None:
    case = sparse(*SMALL)
    rows = case.rows_FC.clone()
    dots = gradients(case, F32, out_FC=None)
    assert dots is not None
    assert_near(dots, truth(case).values_N, NEAR)
    assert torch.equal(case.rows_FC, rows)
    assert gradients(case, F32, out_FC=None, dots=False) is None


@pytest.mark.parametrize("copied", [True, False])
def test_backward_bf16(copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied: the gradients are rounded by torch, and the sums for the rows are exact to float32."""
    case = sparse(*SMALL)
    wanted = truth(case, BF16)
    if not copied:
        rounded_in_kernel(monkeypatch)
    out = torch.empty_like(case.rows_FC)
    dots = gradients(case, BF16, out_FC=out)
    assert dots is not None
    assert_near(dots, wanted.values_N, ROUNDED)
    assert_near(out, wanted.rows_FC, NEAR if copied else ROUNDED)


def test_backward_bf16_parameters() -> None:
    case = sparse(*SMALL)
    case.rows_FC = case.rows_FC.to(BF16)
    wanted = truth(case, BF16)
    out = torch.empty_like(case.rows_FC)
    dots = gradients(case, BF16, out_FC=out)
    assert dots is not None
    assert_near(dots, wanted.values_N, NEAR)
    assert_near(out, wanted.rows_FC, STORED)


@pytest.mark.parametrize("entries", [8, 9, 16, 17, 23])
def test_long_features_of_every_length(entries: int) -> None:
    """Three features, `entries` tokens each: segments start on, before and behind the borders of blocks."""
    b, c = 29, 5
    tokens = torch.arange(entries).repeat_interleave(3)
    ids = torch.tensor([1, 2, 3]).repeat(entries)
    if entries % 2:
        # A short feature in front shifts all blocks.
        ids, tokens = torch.cat([torch.tensor([0]), ids]), torch.cat([torch.tensor([0]), tokens])
    index = build_csc(ids.to(DEVICE), tokens.to(DEVICE), 5)
    weights, x = torch.randn(ids.numel(), device=DEVICE), torch.randn(b, c, device=DEVICE)
    wanted = torch.zeros(5, c, dtype=torch.float64, device=DEVICE)
    wanted.index_add_(0, ids.to(DEVICE), weights.double()[:, None] * x.double()[tokens.to(DEVICE)])
    assert_near(backward.row_gradients(index, weights, x, F32), wanted, NEAR)


def test_row_gradients() -> None:
    """Into a new tensor, into a given one, and added."""
    case = sparse(*SMALL)
    wanted = truth(case).rows_FC
    found = backward.row_gradients(case.index, case.values, case.grad_BC, F32)
    assert_near(found, wanted, NEAR)
    out = torch.full_like(found, float("nan"))
    assert backward.row_gradients(case.index, case.values, case.grad_BC, F32, out_FC=out) is out
    assert torch.equal(out, found)
    backward.row_gradients(case.index, case.values, case.grad_BC, F32, out_FC=out, accumulate=True)
    assert_near(out, 2 * wanted, NEAR)


def test_feature_sums() -> None:
    case = sparse(200, 37, 1, 9)
    wanted = torch.zeros(37, dtype=torch.float64, device=DEVICE).index_add_(0, case.feature_ids, case.values.double())
    assert_near(backward.feature_sums(case.index, case.values), wanted, NEAR)


def test_no_entries() -> None:
    case = sparse(*SMALL)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    case.offsets, case.feature_ids, case.tokens = torch.zeros_like(case.offsets), nothing, nothing
    case.values, case.index = case.values[:0], build_csc(nothing, nothing, case.n_features)
    assert torch.equal(decoded(case, F32), case.y_BC)
    out = torch.full_like(case.rows_FC, float("nan"))
    dots = gradients(case, F32, out_FC=out)
    assert dots is not None
    assert dots.shape == (0,)
    assert bool((out == 0).all())
    gradients(case, F32, out_FC=out.fill_(3), accumulate=True)
    assert bool((out == 3).all())
    assert bool((backward.feature_sums(case.index, case.values) == 0).all())


def test_as_the_reference_and_twice_the_same() -> None:
    """fp32: near the reference; two runs are equal bit for bit."""
    case = sparse(*SMALL, seed=3)
    y = case.y_BC.clone()
    reference_decode.sparse_decode(y, case.offsets, case.feature_ids, case.values, case.rows_FC, F32)
    first = decoded(case, F32)
    assert_near(first, y.double(), NEAR)
    assert torch.equal(first, decoded(case, F32))
    outs = [torch.empty_like(case.rows_FC) for _ in range(3)]
    dots = [gradients(case, F32, out_FC=out) for out in outs[:2]]
    reference_backward.row_gradients(case.index, case.values, case.grad_BC, F32, out_FC=outs[2])
    assert dots[0] is not None
    assert dots[1] is not None
    assert torch.equal(dots[0], dots[1])
    assert torch.equal(outs[0], outs[1])
    assert_near(outs[0], outs[2].double(), NEAR)


def test_float64_is_done_by_the_reference() -> None:
    case = sparse(*SMALL)
    for name in ("values", "rows_FC", "y_BC", "grad_BC"):
        setattr(case, name, getattr(case, name).double())
    wanted = truth(case)
    assert_near(decoded(case, torch.float64), wanted.y_BC, 1e-14)
    out = torch.empty_like(case.rows_FC)
    dots = gradients(case, torch.float64, out_FC=out)
    assert dots is not None
    assert_near(dots, wanted.values_N, 1e-14)
    assert_near(out, wanted.rows_FC, 1e-14)
    assert_near(
        backward.feature_sums(case.index, case.values), reference_backward.feature_sums(case.index, case.values), 1e-14
    )


@pytest.mark.parametrize("stored", [False, True])
def test_float16_is_done_by_the_reference(stored: bool) -> None:
    """To the bit, as products' operands and as what is stored: no kernel rounds to it."""
    case, half = sparse(*SMALL), torch.float16
    if stored:
        case.rows_FC, case.grad_BC, case.y_BC = case.rows_FC.to(half), case.grad_BC.to(half), case.y_BC.to(half)
    y = case.y_BC.clone()
    reference_decode.sparse_decode(y, case.offsets, case.feature_ids, case.values, case.rows_FC, half)
    assert torch.equal(decoded(case, half), y)
    wanted = reference_backward.row_gradients(case.index, case.values, case.grad_BC, half)
    assert torch.equal(backward.row_gradients(case.index, case.values, case.grad_BC, half), wanted)
    dots = gradients(case, half, out_FC=None)
    codes = (case.offsets, case.feature_ids, case.tokens)
    assert dots is not None
    assert torch.equal(dots, reference_backward.value_gradients(case.grad_BC, case.rows_FC, *codes, half))


def test_decode_of_two_to_the_20_features() -> None:
    """The first and the last row of a table whose offsets pass 2^31 by the number of its rows."""
    f, stride = 2**20, 2**11 + 3
    table = torch.empty(f * stride, dtype=BF16, device=DEVICE).as_strided((f, 5), (stride, 1))
    rows = torch.randn(2, 5, device=DEVICE).to(BF16)
    table[0], table[-1] = rows[0], rows[1]
    y = torch.zeros(2, 5, device=DEVICE)
    ids, values = torch.tensor([0, f - 1], device=DEVICE), torch.tensor([1.0, 2.0], device=DEVICE)
    sparse_decode(y, torch.tensor([0, 0, 2], device=DEVICE), ids, values, table, BF16)
    assert_near(y[1], rows[0].double() + 2 * rows[1].double(), NEAR)
    assert bool((y[0] == 0).all())


def test_offsets_beyond_two_to_the_31() -> None:
    """Rows 2^30 values apart: the last begins behind what 32 bits can count. Untouched pages take no memory."""
    far = torch.empty(2**31 + 8, dtype=BF16, device=DEVICE).as_strided((3, 8), (2**30, 1))
    values = torch.randn(3, 8, device=DEVICE).to(BF16)
    far.copy_(values)
    case = sparse(3, 3, 8, 1)
    case.offsets = torch.tensor([0, 0, 0, 2], device=DEVICE)
    case.feature_ids, case.tokens = torch.tensor([0, 2], device=DEVICE), torch.tensor([2, 2], device=DEVICE)
    case.values = torch.ones(2, device=DEVICE)
    case.index = build_csc(case.feature_ids, case.tokens, 3)
    case.rows_FC = far
    wanted = case.y_BC.double()
    wanted[2] += values[0].double() + values[2].double()
    assert_near(decoded(case, BF16), wanted, NEAR)
    backward.row_gradients(case.index, case.values, case.grad_BC.to(BF16), BF16, out_FC=far)
    assert torch.equal(far[0], case.grad_BC[2].to(BF16))
    assert torch.equal(far[2], case.grad_BC[2].to(BF16))
    assert bool((far[1] == 0).all())


def adam_step(step: int) -> AdamHyper:
    return AdamHyper(3e-3, 0.9, 0.999, 1e-8, 1 - 0.9**step, 1 - 0.999**step)


def test_fused_adam_is_torch_adam_over_50_steps() -> None:
    """Most rows idle for several steps, one is long at every step, one never has an entry."""
    b, f, c = 13, 11, 7
    rows = torch.randn(f, c, device=DEVICE)
    moments = torch.zeros_like(rows), torch.zeros_like(rows)
    parameter = rows.double().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=3e-3, betas=(0.9, 0.999), eps=1e-8)
    for step in range(1, 51):
        case = sparse(b, f, c, 1 if step % 5 else 4, seed=step)
        before = parameter.detach().clone()
        case.rows_FC = before
        wanted = truth(case)
        squares, dots = adam.fused_adam_rows(
            rows, *moments, case.index, case.values, case.grad_BC, adam_step(step), dots=True
        )
        assert dots is not None
        assert_near(dots, wanted.values_N, 1e-5)
        assert float(squares) == pytest.approx(float(wanted.rows_FC.square().sum()), rel=1e-5)
        assert squares.dtype == torch.float64
        parameter.grad = wanted.rows_FC
        optimizer.step()
    assert_near(rows, parameter.detach(), 1e-5)
    state = optimizer.state[parameter]
    assert_near(moments[0], state["exp_avg"], 1e-5)
    assert_near(moments[1], state["exp_avg_sq"], 1e-5)


def test_fused_adam_as_the_reference() -> None:
    """One step on several chunks from given moments, without dots; twice the same."""
    case = sparse(*SMALL)
    start = (case.rows_FC, torch.randn_like(case.rows_FC), torch.rand_like(case.rows_FC))
    results = []
    for op in (reference_adam.fused_adam_rows, adam.fused_adam_rows, adam.fused_adam_rows):
        tensors = tuple(tensor.clone() for tensor in start)
        squares, dots = op(*tensors, case.index, case.values, case.grad_BC, adam_step(7), dots=False)
        assert dots is None
        results.append((*tensors, squares))
    for wanted, found, again in zip(*results, strict=True):
        assert_near(found, wanted.double(), 5e-6)
        assert torch.equal(found, again)


def test_fused_adam_bf16_has_the_gradient_of_the_backward_pass() -> None:
    """Rows in float32, tokens in bfloat16: operands are rounded as there. Learning rate 0 leaves the rows."""
    case = sparse(11, 17, 260, 4)
    wanted = truth(case, BF16)
    first, second, before = torch.zeros_like(case.rows_FC), torch.zeros_like(case.rows_FC), case.rows_FC.clone()
    squares, dots = adam.fused_adam_rows(
        case.rows_FC,
        first,
        second,
        case.index,
        case.values,
        case.grad_BC.to(BF16),
        adam_step(1)._replace(lr=0),
        dots=True,
    )
    assert dots is not None
    assert_near(dots, wanted.values_N, ROUNDED)
    assert_near(first, 0.1 * wanted.rows_FC, NEAR)
    assert float(squares) == pytest.approx(float(wanted.rows_FC.square().sum()), rel=1e-5)
    assert torch.equal(case.rows_FC, before)
