"""The compiled encoders against brute force, with and without the screening by bf16 products.

Pre-activations are small integers where selections are compared to the bit: every product is then exact in float32,
and ties are everywhere. Real-valued cases are compared with float64.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.kernels import batch_threshold as reference_threshold
from trainer.kernels import encode_jumprelu as reference_jumprelu
from trainer.kernels import encode_topk as reference_topk
from trainer.kernels.batch_threshold import Candidates
from trainer.kernels.cpu import above, products
from trainer.kernels.cpu import batch_threshold as cpu_threshold
from trainer.kernels.cpu import encode_topk as cpu_topk
from trainer.kernels.cpu.batch_threshold import batch_threshold, encode_candidates
from trainer.kernels.cpu.encode_jumprelu import encode_jumprelu
from trainer.kernels.cpu.encode_topk import encode_topk
from trainer.kernels.encode_topk import Selection

F32 = torch.float32
PROFILE = settings(max_examples=40, deadline=None)
NO_FLOOR = float("-inf")
# tokens, features, seed; the last groups of features and blocks of tokens are ragged.
sizes = st.tuples(st.integers(1, 12), st.integers(1, 300), st.integers(0, 2**32 - 1))


@pytest.fixture(params=["screened", "plain"], autouse=True)
def screening(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways, whatever this machine's units are: bf16 products are right, if slow, without them."""
    patch = pytest.MonkeyPatch()
    for module in (above, cpu_threshold, cpu_topk):
        patch.setattr(module, "has_bfloat16_units", lambda: request.param == "screened")
    yield
    patch.undo()


def integers(b: int, f: int, seed: int, d: int = 5, top: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x (strided rows), W_enc, b_enc of small integers."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-top, top + 1, shape, generator=g).float()

    return draw(b, 3, d)[:, 1], draw(f, d), draw(f)


def reals(b: int, f: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*shape, generator=g) for shape in ((b, 3, d), (f, d), (f,)))
    return x[:, 1], weight / d**0.5, bias * 0.1


def wanted_topk(pre_BF: Tensor, k: int, norm_F: Tensor | None) -> list[list[int]]:
    scores_BF = pre_BF if norm_F is None else pre_BF * norm_F
    rows = []
    for pre, score in zip(pre_BF.tolist(), scores_BF.tolist(), strict=True):
        order = sorted((f for f in range(len(pre)) if pre[f] > 0), key=lambda f: (-score[f], f))
        rows.append(sorted(order[:k]))
    return rows


def rows_of(found: Selection) -> list[list[int]]:
    return [part.tolist() for part in torch.split(found.feature_ids, found.offsets.diff().tolist())]


def assert_values(found: Selection, pre_BF: Tensor, tolerance: float) -> None:
    tokens = torch.arange(pre_BF.shape[0]).repeat_interleave(found.offsets.diff())
    torch.testing.assert_close(
        found.values.double(), pre_BF[tokens, found.feature_ids].double(), rtol=0, atol=tolerance
    )


@PROFILE
@given(sizes, st.integers(1, 40), st.booleans())
@example((3, 300, 1), 300, True)
def test_topk_of_ties(size: tuple[int, int, int], k: int, by_norm: bool) -> None:
    x, weight, bias = integers(*size)
    norm = (
        torch.randint(0, 3, (size[1],), generator=torch.Generator().manual_seed(size[2])).float() if by_norm else None
    )
    pre_BF = x @ weight.t() + bias
    found = encode_topk(x, weight, bias, k, norm, F32)
    assert rows_of(found) == wanted_topk(pre_BF, k, norm)
    assert_values(found, pre_BF, 0.0)


@pytest.mark.parametrize(
    ("b", "f", "d", "k"), [(41, 1271, 100, 7), (300, 700, 64, 5), (9, 4096, 33, 16), (5, 40, 1, 3)]
)
@pytest.mark.parametrize("by_norm", [False, True])
def test_topk_of_real_values(b: int, f: int, d: int, k: int, by_norm: bool) -> None:
    """float64 decides; an entry may differ where its score lies within 1e-5 of the k-th (contracts.md)."""
    x, weight, bias = reals(b, f, d)
    norm = torch.rand(f, generator=torch.Generator().manual_seed(1)) + 0.5 if by_norm else None
    pre_BF = x.double() @ weight.double().t() + bias.double()
    scores_BF = (pre_BF if norm is None else pre_BF * norm.double()).masked_fill(pre_BF <= 0, NO_FLOOR)
    found = encode_topk(x, weight, bias, k, norm, F32)
    assert_values(found, pre_BF, 2e-5)
    kth_B = scores_BF.topk(k).values[:, -1]
    for scores, kth, ids in zip(scores_BF, kth_B, rows_of(found), strict=True):
        assert ids == sorted(set(ids))
        assert len(ids) == min(k, int((scores > NO_FLOOR).sum()))
        surely = (scores > kth + 1e-5).nonzero()[:, 0].tolist()
        assert set(surely) <= set(ids)
        assert bool((scores[ids] >= kth - 1e-5).all())


def test_identical_features_tie_to_the_bit() -> None:
    """A feature's value must not depend on its place: else copies of a row would not tie."""
    x, weight, bias = reals(17, 64, 100)
    weight, bias = weight[:1].expand(64 * 9, 100).contiguous(), bias[:1].expand(64 * 9).contiguous()
    found = encode_topk(x, weight, bias, 5, None, F32)
    for ids in rows_of(found):
        assert ids in ([], [0, 1, 2, 3, 4])


def test_nan_and_infinity_are_largest() -> None:
    x, weight, bias = integers(6, 500, 0)
    weight[317] = torch.nan
    bias[77] = torch.inf
    x[2] = torch.nan
    found = encode_topk(x, weight, bias, 4, None, F32)
    for token, ids in enumerate(rows_of(found)):
        assert ids == [0, 1, 2, 3] if token == 2 else {77, 317} < set(ids)
    assert bool(found.values[found.feature_ids == 317].isnan().all())
    jump = encode_jumprelu(x, weight, bias, 8.5, 0.0, F32)
    assert jump is not None
    assert all({77, 317} <= set(ids) for ids in rows_of(jump))
    assert rows_of(jump)[2] == list(range(500))
    best = encode_candidates(x, weight, bias, 900, NO_FLOOR, None, F32)
    assert int(best.values.isnan().sum()) == 505
    assert set(range(2 * 500, 3 * 500)) <= set(best.positions.tolist())


def test_huge_and_tiny_values() -> None:
    """bf16 rounds 3.4e38 to infinity, and the norms of such rows overflow: the screen lets them pass."""
    x, weight, bias = reals(8, 700, 16)
    x = x.clone()
    x[:, 0] = 0.5
    weight[5], weight[6] = 0.0, 1e-40
    weight[5, 0] = 3.4e38
    weight[100:200] *= 1e-30
    found, truth = encode_topk(x, weight, bias, 9, None, F32), reference_topk.encode_topk(x, weight, bias, 9, None, F32)
    assert rows_of(found) == rows_of(truth)


def test_numbers_whose_squares_are_lost() -> None:
    """Weights of 1e-22, orthogonal to x but for a rank: their rounding errors decide, and have squares of zero."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, generator=g).bfloat16().double()
    weight = torch.randn(700, 64, generator=g).double()
    along = torch.linspace(1e-4, 1e-2, 700).double()[:, None] - weight @ x.t()
    weight = (weight + along * x / x.square().sum()) * 1e-22
    found = encode_topk(x.float(), weight.float(), torch.zeros(700), 5, None, F32)
    assert rows_of(found) == [[695, 696, 697, 698, 699]]


def test_rows_without_positive_entries() -> None:
    x, weight, bias = integers(70, 400, 3)
    bias[:] = -1000
    found = encode_topk(x, weight, bias, 4, None, F32)
    assert found.feature_ids.numel() == 0
    assert found.offsets.tolist() == [0] * 71
    best = encode_candidates(x, weight, bias, 50, NO_FLOOR, None, F32)
    assert best.positions.numel() == 0
    zeros = torch.zeros(70, 5)
    assert encode_topk(zeros, weight, torch.zeros(400), 4, None, F32).feature_ids.numel() == 0


@PROFILE
@given(sizes, st.sampled_from([0.0, 0.5, 3.0]), st.booleans())
def test_jumprelu(size: tuple[int, int, int], bandwidth: float, by_feature: bool) -> None:
    x, weight, bias = integers(*size)
    theta = torch.arange(size[1]) % 7 / 2 if by_feature else 2.0
    pre_BF = x @ weight.t() + bias
    found = encode_jumprelu(x, weight, bias, theta, bandwidth, F32)
    assert found is not None
    kept_BF = pre_BF - theta > -bandwidth / 2 if bandwidth else pre_BF > theta
    assert rows_of(found) == [row.nonzero()[:, 0].tolist() for row in kept_BF]
    assert_values(found, pre_BF, 0.0)


def test_jumprelu_stops_when_too_dense() -> None:
    x, weight, bias = reals(600, 500, 16)
    everything = encode_jumprelu(x, weight, bias, 1.0, 0.5, F32)
    assert everything is not None
    share = everything.feature_ids.numel() / (600 * 500)
    assert encode_jumprelu(x, weight, bias, 1.0, 0.5, F32, max_density=share * 1.001) is not None
    assert encode_jumprelu(x, weight, bias, 1.0, 0.5, F32, max_density=share * 0.999) is None


@PROFILE
@given(sizes, st.floats(0, 1.2), st.sampled_from([NO_FLOOR, 0.0, 4.0]), st.booleans())
@example((12, 300, 5), 0.02, NO_FLOOR, False)
def test_candidates_of_ties(size: tuple[int, int, int], share: float, floor: float, by_norm: bool) -> None:
    x, weight, bias = integers(*size)
    norm = (
        torch.randint(0, 3, (size[1],), generator=torch.Generator().manual_seed(size[2])).float() if by_norm else None
    )
    n = round(share * size[0] * size[1])
    pre = (x @ weight.t() + bias).view(-1).tolist()
    norms = [1.0] * size[1] if norm is None else norm.tolist()
    scores = [p * norms[i % size[1]] for i, p in enumerate(pre)]
    order = sorted((i for i in range(len(pre)) if pre[i] > 0 and scores[i] >= floor), key=lambda i: (-scores[i], i))
    found = encode_candidates(x, weight, bias, n, floor, norm, F32)
    assert found.positions.tolist() == sorted(order[:n])
    assert found.values.tolist() == [pre[i] for i in sorted(order[:n])]
    assert found.scores.tolist() == [scores[i] for i in sorted(order[:n])]


def test_candidates_where_the_first_block_misleads() -> None:
    """The guess from the first block is far too high, and far too low, for the other tokens."""
    for first, rest in ((9.0, 0.1), (0.1, 9.0)):
        x, weight, bias = reals(700, 600, 20)
        x = x.clone()
        x[:256] *= first
        x[256:] *= rest
        found = encode_candidates(x, weight, bias * 0, 5000, NO_FLOOR, None, F32)
        truth = reference_threshold.encode_candidates(x, weight, bias * 0, 5000, NO_FLOOR, None, F32)
        assert torch.equal(found.positions, truth.positions)


@PROFILE
@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 60), st.integers(0, 2**32 - 1), st.booleans())
def test_batch_threshold(n_layers: int, f: int, n: int, seed: int, signed: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    layers = []
    for _ in range(n_layers):
        positions = torch.randperm(4 * f, generator=g)[: 3 * f].sort().values
        scores = torch.randint(-3 if signed else 0, 4, (3 * f,), generator=g).float()
        layers.append(Candidates(positions, scores, scores))
    masks = batch_threshold(layers, n, f)
    everything = [
        (-float(score), int(p) // f, s, int(p) % f, s, i)
        for s, layer in enumerate(layers)
        for i, (p, score) in enumerate(zip(layer.positions, layer.scores, strict=True))
    ]
    wanted = {entry[4:] for entry in sorted(everything)[:n]}
    assert {(s, i) for s, mask in enumerate(masks) for i in mask.nonzero()[:, 0].tolist()} == wanted


def test_other_dtypes_go_to_the_reference() -> None:
    x, weight, bias = (t.double() for t in reals(5, 90, 7))
    assert torch.equal(
        encode_topk(x, weight, bias, 3, None, torch.float64).values,
        reference_topk.encode_topk(x, weight, bias, 3, None, torch.float64).values,
    )
    jump = encode_jumprelu(x, weight, bias, 1.0, 0.0, torch.float64)
    truth = reference_jumprelu.encode_jumprelu(x, weight, bias, 1.0, 0.0, torch.float64)
    assert jump is not None
    assert truth is not None
    assert torch.equal(jump.values, truth.values)
    assert encode_candidates(x, weight, bias, 9, NO_FLOOR, None, torch.float64).values.dtype == torch.float64


def test_a_million_features() -> None:
    """F = 2^20: offsets beyond 2^31 bytes, blocks of the fewest rows."""
    g = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randint(-3, 4, (3, 2), generator=g).float(),
        torch.randint(-9, 10, (2**20, 2), generator=g).float(),
    )
    found = encode_topk(x, weight, torch.zeros(2**20), 5, None, F32)
    truth = reference_topk.encode_topk(x, weight, torch.zeros(2**20), 5, None, F32)
    assert rows_of(found) == rows_of(truth)


def test_bf16_products_stay_within_their_bounds() -> None:
    """The bound that makes the screening exact, against float64, also where one row or column is far larger."""
    x, weight, bias = reals(64, 256, 200)
    weight[:, 3] *= 100
    x = x * torch.logspace(-3, 3, 64)[:, None]
    rounded_x, rounded_w = products.rounded(x), products.rounded(weight)
    bounds = products.error_bounds(rounded_w, bias, 1)
    product = (rounded_x.matrix.float() @ rounded_w.matrix.float().t()).double()
    error = (product - x.double() @ weight.double().t()).abs()
    bound = rounded_x.norms[:, None] * bounds.near_G + rounded_x.errors[:, None] * bounds.far_G
    assert bool((error <= bound).all())
    # And it is of use: the same by worst-case rounding of every operand would be 2^-7 |x| |w|.
    assert bool((bound < rounded_x.norms[:, None] * rounded_w.norms * 2**-7).all())


def test_the_bounds_hold_where_errors_add_up() -> None:
    """x along the rounding error of a feature, and a feature along that of x: nothing cancels, and half would fail."""
    _, weight, bias = reals(1, 64, 200)
    errors = weight - weight.bfloat16().float()
    ways = [(errors.bfloat16().float(), weight), (weight, errors.bfloat16().float())]
    for x, other in ways:
        rounded_x, rounded_w = products.rounded(x), products.rounded(other)
        bounds = products.error_bounds(rounded_w, bias, 1)
        product = (rounded_x.matrix.double() @ rounded_w.matrix.double().t()).diagonal()
        error = (product - (x.double() * other.double()).sum(dim=1)).abs()
        bound = rounded_x.norms * bounds.near_G + rounded_x.errors * bounds.far_G
        assert bool((error <= bound).all())
        assert bool((error > 0.5 * bound).all())
