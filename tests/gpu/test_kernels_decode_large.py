"""The Triton kernels of the decode side on a CUDA device against the reference, at a large shape."""

import pytest
import torch
from torch import Tensor

from tests.kernels.sparse_cases import DEVICE, assert_near

pytest.importorskip("triton")

from tests.kernels.test_triton_decode import adam_step
from trainer.kernels import fused_adam_rows as reference_adam
from trainer.kernels import sparse_backward as reference_backward
from trainer.kernels import sparse_decode as reference_decode
from trainer.kernels.build_csc import FeatureIndex, build_csc
from trainer.kernels.gpu.fused_adam_rows import fused_adam_rows
from trainer.kernels.gpu.sparse_backward import decoder_backward, feature_sums, row_gradients
from trainer.kernels.gpu.sparse_decode import sparse_decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

B, F, C, K = 4096, 8192, 3 * 768, 32
# Features from here on are active nowhere.
DEAD = 8000
F32, BF16 = torch.float32, torch.bfloat16


class Large:
    """Entries whose features follow a power law, feature 1 on every token, some on none."""

    def __init__(self, device: str = DEVICE) -> None:
        g = torch.Generator(device).manual_seed(0)
        popularity_F = 1 / torch.arange(1, F + 1, device=device, dtype=F32)
        popularity_F[DEAD:] = 0
        popularity_F[1] = 1e4
        ids_BK = torch.multinomial(popularity_F.expand(B, F), K, generator=g).sort(dim=1).values
        self.ids, self.tokens = ids_BK.flatten(), torch.arange(B, device=device).repeat_interleave(K)
        self.offsets = torch.arange(0, B * K + 1, K, device=device)
        self.index: FeatureIndex = build_csc(self.ids, self.tokens, F)
        self.values = torch.rand(B * K, generator=g, device=device)
        self.rows_FC = torch.randn(F, C, generator=g, device=device)
        self.grad_BC = torch.randn(B, 2 * C, generator=g, device=device)[:, C:]


@pytest.fixture(scope="module")
def large() -> Large:
    return Large()


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-5), (BF16, 1e-2)])
def test_large_decode(large: Large, dtype: torch.dtype, tolerance: float) -> None:
    outs = [torch.ones(B, 2 * C, device=DEVICE)[:, C:] for _ in range(3)]
    for out, op in zip(outs, (reference_decode.sparse_decode, sparse_decode, sparse_decode), strict=True):
        op(out, large.offsets, large.ids, large.values, large.rows_FC, dtype)
    assert_near(outs[1], outs[0].double(), tolerance)
    assert torch.equal(outs[1], outs[2])


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-5), (BF16, 1e-2)])
def test_large_backward(large: Large, dtype: torch.dtype, tolerance: float) -> None:
    outs = [torch.full_like(large.rows_FC, float("nan")) for _ in range(3)]
    dots: list[Tensor] = []
    for out, op in zip(outs, (reference_backward.decoder_backward, decoder_backward, decoder_backward), strict=True):
        found = op(
            large.grad_BC, large.rows_FC, large.offsets, large.ids, large.tokens, large.index, large.values, dtype,
            out_FC=out, accumulate=False, dots=True,
        )  # fmt: skip
        assert found is not None
        dots.append(found)
    assert_near(outs[1], outs[0].double(), tolerance)
    assert_near(dots[1], dots[0].double(), tolerance)
    assert torch.equal(outs[1], outs[2])
    assert torch.equal(dots[1], dots[2])
    assert bool((outs[1][DEAD:] == 0).all())
    alone = row_gradients(large.index, large.values, large.grad_BC, dtype)
    assert_near(alone, outs[0].double(), tolerance)


def test_backward_of_two_to_the_20_features() -> None:
    """A program a feature; entries at both ends, on one token and on many."""
    f, c, b = 2**20, 5, 400
    ids = torch.tensor([0, 1, f - 2, f - 1], device=DEVICE).repeat(b)
    tokens = torch.arange(b, device=DEVICE).repeat_interleave(4)
    offsets = torch.arange(0, 4 * b + 1, 4, device=DEVICE)
    g = torch.Generator(DEVICE).manual_seed(0)
    values, rows = torch.rand(4 * b, generator=g, device=DEVICE), torch.randn(f, c, generator=g, device=DEVICE)
    grad, out = torch.randn(b, c, generator=g, device=DEVICE), torch.full_like(rows, torch.nan)
    codes = (offsets, ids, tokens, build_csc(ids, tokens, f), values)
    dots = decoder_backward(grad, rows, *codes, F32, out_FC=out, accumulate=False, dots=True)
    wanted = torch.zeros(f, c, dtype=torch.float64, device=DEVICE)
    wanted.index_add_(0, ids, values.double()[:, None] * grad.double()[tokens])
    assert dots is not None
    assert_near(out, wanted, 2e-6)
    assert_near(dots, (grad.double()[tokens] * rows.double()[ids]).sum(dim=1), 2e-6)


def test_large_feature_sums(large: Large) -> None:
    wanted = torch.zeros(F, dtype=torch.float64, device=DEVICE).index_add_(0, large.ids, large.values.double())
    assert_near(feature_sums(large.index, large.values), wanted, 1e-5)


def test_large_fused_adam(large: Large) -> None:
    start = (large.rows_FC, torch.randn_like(large.rows_FC), torch.rand_like(large.rows_FC))
    results = []
    for op in (reference_adam.fused_adam_rows, fused_adam_rows, fused_adam_rows):
        tensors = tuple(tensor.clone() for tensor in start)
        squares, dots = op(*tensors, large.index, large.values, large.grad_BC, adam_step(7), dots=True)
        assert dots is not None
        results.append((*tensors, squares, dots))
    for wanted, found, again in zip(*results, strict=True):
        assert_near(found, wanted.double(), 1e-5)
        assert torch.equal(found, again)
