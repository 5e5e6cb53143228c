"""The reference kernels against brute force, over shapes with empty rows, ties, hot and dead features."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.kernels import batch_threshold, fused_adam_rows, row_sums, sparse_backward
from trainer.kernels.batch_threshold import Candidates
from trainer.kernels.build_csc import build_csc
from trainer.kernels.dispatch import REFERENCE
from trainer.kernels.encode_jumprelu import encode_jumprelu
from trainer.kernels.encode_topk import Selection, encode_topk
from trainer.kernels.selection import largest, lower_bound, topk_rows

PROFILE = settings(max_examples=60, deadline=None)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**32 - 1))


def table(b: int, f: int, seed: int, distinct: int | None = None) -> Tensor:
    """(B, F) scores; `distinct`: few values only, so that ties are everywhere."""
    g = torch.Generator().manual_seed(seed)
    if distinct is None:
        return torch.randn(b, f, generator=g)
    return torch.randint(-distinct, distinct + 1, (b, f), generator=g).float()


def best_of_row(row: list[float], k: int) -> list[int]:
    """Positions of the k largest positive entries, ascending; ties: the smallest position."""
    order = sorted((i for i, v in enumerate(row) if v > 0), key=lambda i: (-row[i], i))
    return sorted(order[:k])


def identity_encoder(scores_BF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, W_enc, b_enc whose pre-activations are exactly the scores."""
    n_features = scores_BF.shape[1]
    return scores_BF, torch.eye(n_features), torch.zeros(n_features)


def rows_of(selection: Selection) -> list[list[int]]:
    """Feature ids of every token."""
    return [part.tolist() for part in torch.split(selection.feature_ids, selection.offsets.diff().tolist())]


@PROFILE
@given(sizes, st.integers(1, 45), st.sampled_from([None, 1, 2]))
def test_encode_topk(size: tuple[int, int, int], k: int, distinct: int | None) -> None:
    scores = table(*size, distinct)
    found = encode_topk(*identity_encoder(scores), k, None, torch.float32)
    assert rows_of(found) == [best_of_row(row, k) for row in scores.tolist()]
    tokens = torch.arange(size[0]).repeat_interleave(found.offsets.diff())
    assert torch.equal(found.values, scores[tokens, found.feature_ids])


@PROFILE
@given(sizes, st.integers(1, 45))
def test_encode_topk_by_norm(size: tuple[int, int, int], k: int) -> None:
    """Norms of 0 and 1 and 2: a candidate of score 0 may win only after every positive score, and pre > 0 stays."""
    pre = table(*size, 2)
    norm = torch.randint(0, 3, (size[1],), generator=torch.Generator().manual_seed(size[2])).float()
    found = encode_topk(*identity_encoder(pre), k, norm, torch.float32)
    for row, ids in zip(pre, rows_of(found), strict=True):
        score = (row * norm).tolist()
        order = sorted((i for i in range(size[1]) if row[i] > 0), key=lambda i: (-score[i], i))
        wanted = order[:k]
        # Ties at score 0 are features without a decoder: which of them is named makes no difference.
        assert [i for i in ids if score[i] > 0] == sorted(i for i in wanted if score[i] > 0)
        assert len(ids) == len(wanted)
        assert all(row[i] > 0 for i in ids)


@PROFILE
@given(sizes, st.floats(-1.5, 1.5), st.sampled_from([0.0, 0.5, 3.0]))
def test_encode_jumprelu(size: tuple[int, int, int], theta: float, bandwidth: float) -> None:
    scores = table(*size)
    found = encode_jumprelu(*identity_encoder(scores), theta, bandwidth, torch.float32)
    assert found is not None
    kept = (scores > theta) | ((scores - theta).abs() < bandwidth / 2)
    assert rows_of(found) == [row.nonzero()[:, 0].tolist() for row in kept]
    assert torch.equal(found.values, scores[kept])
    share = float(kept.float().mean())
    if 0 < share < 1:
        below, above = share * 0.99, min(share * 1.01, 1.0)
        assert encode_jumprelu(*identity_encoder(scores), theta, bandwidth, torch.float32, below) is None
        assert encode_jumprelu(*identity_encoder(scores), theta, bandwidth, torch.float32, above) is not None


@PROFILE
@given(sizes, st.integers(1, 400), st.sampled_from([None, 1, 2]), st.sampled_from([float("-inf"), 0.0, 0.7]))
def test_encode_candidates(size: tuple[int, int, int], n: int, distinct: int | None, floor: float) -> None:
    scores = table(*size, distinct)
    found = batch_threshold.encode_candidates(*identity_encoder(scores), n, floor, None, torch.float32)
    flat = [v if v >= floor else 0.0 for v in scores.flatten().tolist()]
    assert found.positions.tolist() == best_of_row(flat, n)
    assert torch.equal(found.values, scores.flatten()[found.positions])


@PROFILE
@example((5, 9, 0), 3, 7, 1)
@given(sizes, st.integers(1, 3), st.integers(1, 300), st.sampled_from([None, 1]))
def test_batch_threshold_over_layers(size: tuple[int, int, int], n_layers: int, n: int, distinct: int | None) -> None:
    b, f, seed = size
    tables = [table(b, f, seed + s, distinct) for s in range(n_layers)]
    layers = [Candidates((t > 0).flatten().nonzero()[:, 0], t[t > 0], t[t > 0]) for t in tables]
    entries = [
        (-float(tables[s][token, feature]), token, s, feature)
        for s in range(n_layers)
        for token in range(b)
        for feature in range(f)
        if tables[s][token, feature] > 0
    ]
    wanted = {(token, s, feature) for _, token, s, feature in sorted(entries)[:n]}
    masks = batch_threshold.batch_threshold(layers, n, f)
    found = {
        (position // f, s, position % f)
        for s, (layer, mask) in enumerate(zip(layers, masks, strict=True))
        for position in layer.keep(mask).positions.tolist()
    }
    assert found == wanted


@PROFILE
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32 - 1))
def test_lower_bound_is_reached_by_n(size: int, n: int, seed: int) -> None:
    scores = table(1, size, seed, 3).flatten()
    bound = lower_bound(scores, n)
    assert bound == float("-inf") or int((scores >= bound).sum()) >= n


def test_nan_is_selected_not_dropped() -> None:
    scores = torch.tensor([[1.0, float("nan"), 2.0, -1.0]])
    for ids in (
        topk_rows(scores, 2, floor=0.0)[0],
        encode_topk(*identity_encoder(torch.full((1, 4), torch.nan)), 2, None, torch.float32).feature_ids,
        largest(scores[0], 1).nonzero()[:, 0],
    ):
        assert ids.numel() > 0
    assert 1 in topk_rows(scores, 2, floor=0.0)[0].tolist()
    broken = torch.full((2, 3), torch.nan)
    jump = encode_jumprelu(*identity_encoder(broken), 0.1, 0.5, torch.float32)
    assert jump is not None
    assert jump.feature_ids.numel() == 6
    assert (
        batch_threshold.encode_candidates(*identity_encoder(broken), 4, 0.0, None, torch.float32).values.isnan().all()
    )


def random_codes(b: int, f: int, seed: int, density: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense (B, F) with an empty token, a dead feature and one that everybody activates; offsets, ids, tokens."""
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(b, f, generator=g, dtype=torch.float64)
    dense = dense * (torch.rand(b, f, generator=g) < density)
    dense[:, 0] = 1.5
    dense[b // 2] = 0.0
    if f > 1:
        dense[:, f - 1] = 0.0
    tokens, ids = dense.nonzero(as_tuple=True)
    offsets = torch.zeros(b + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(tokens, minlength=b).cumsum(0)
    return dense, offsets, ids, tokens


@PROFILE
@given(
    sizes,
    st.sampled_from([0.0, 0.2, 1.0]),
    st.sampled_from([1, 7, 1100]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_decode_and_backward(size: tuple[int, int, int], density: float, width: int, dtype: torch.dtype) -> None:
    """Narrow rows take the bag, wide ones the sparse product; outputs are strided views."""
    b, f, seed = size
    dense, offsets, ids, tokens = random_codes(b, f, seed, density)
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(f, width, generator=g, dtype=torch.float64)
    grad = torch.randn(b, width, generator=g, dtype=torch.float64)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    values = dense[tokens, ids].to(dtype)

    y = torch.ones(b, width + 3, dtype=dtype)
    REFERENCE.sparse_decode(y[:, 3:], offsets, ids, values, rows.to(dtype), dtype)
    torch.testing.assert_close(y[:, 3:].double(), 1 + dense @ rows, **tolerance)
    assert torch.equal(y[:, :3], torch.ones(b, 3, dtype=dtype))

    strided = torch.zeros(b, width + 3, dtype=dtype)
    strided[:, 3:] = grad.to(dtype)
    index = build_csc(ids, tokens, f)
    out = torch.full((f, width), torch.nan, dtype=dtype)
    codes = (strided[:, 3:], rows.to(dtype), offsets, ids, tokens, index, values, dtype)
    dots = REFERENCE.decoder_backward(*codes, out_FC=out, accumulate=False, dots=True)
    assert dots is not None
    torch.testing.assert_close(dots.double(), (grad @ rows.T)[tokens, ids], **tolerance)
    torch.testing.assert_close(out.double(), dense.T @ grad, **tolerance)
    assert REFERENCE.decoder_backward(*codes, out_FC=out, accumulate=True, dots=False) is None
    torch.testing.assert_close(out.double(), 2 * dense.T @ grad, **tolerance)
    torch.testing.assert_close(REFERENCE.feature_sums(index, values).double(), dense.sum(dim=0), **tolerance)


def test_fused_adam_is_torch_adam_over_fifty_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows idle for several steps, one row on every token, blocks that split the table."""
    monkeypatch.setattr(fused_adam_rows, "_BLOCK_VALUES", 40)
    g = torch.Generator().manual_seed(3)
    rows = torch.randn(13, 7, generator=g, dtype=torch.float64)
    wanted = rows.clone().requires_grad_()
    adam = torch.optim.Adam([wanted], lr=0.03, betas=(0.8, 0.95), eps=1e-6)
    moments = torch.zeros(2, 13, 7, dtype=torch.float64)
    for step in range(1, 51):
        dense, _, ids, tokens = random_codes(9, 13, step, 0.3)
        dense[:, step % 13 : step % 13 + 4] = 0
        dense[:, 12] = 1.5
        tokens, ids = dense.nonzero().t()
        grad = torch.randn(9, 7, generator=g, dtype=torch.float64)
        dots_wanted = (grad @ wanted.detach().T)[tokens, ids]
        wanted.grad = dense.T @ grad
        squares_wanted = wanted.grad.square().sum()
        adam.step()
        hyper = fused_adam_rows.AdamHyper(0.03, 0.8, 0.95, 1e-6, 1 - 0.8**step, 1 - 0.95**step)
        squares, dots = REFERENCE.fused_adam_rows(
            rows, *moments, build_csc(ids, tokens, 13), dense[tokens, ids], grad, hyper, dots=True
        )
        torch.testing.assert_close(rows, wanted.detach(), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(dots, dots_wanted, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(squares, squares_wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("width", [7, 1100])
def test_without_the_sparse_product(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines without MKL take the bag at every width."""
    dense, offsets, ids, tokens = random_codes(9, 30, 0, 0.3)
    rows = torch.randn(30, width, dtype=torch.float64)
    y = [torch.zeros(9, width, dtype=torch.float64) for _ in range(2)]
    REFERENCE.sparse_decode(y[0], offsets, ids, dense[tokens, ids], rows, torch.float64)
    monkeypatch.setattr(row_sums, "_MKL_CSR", False)
    REFERENCE.sparse_decode(y[1], offsets, ids, dense[tokens, ids], rows, torch.float64)
    torch.testing.assert_close(y[0], y[1], rtol=1e-12, atol=1e-12)


def test_bf16_operands() -> None:
    """Operands are rounded to bf16, sums are not: errors stay at the size of one rounding."""
    dense, offsets, ids, tokens = random_codes(40, 64, 1, 0.4)
    dense = dense.bfloat16().double()
    rows = torch.randn(64, 200, dtype=torch.float64).bfloat16().double()
    grad = torch.randn(40, 200, dtype=torch.float64).bfloat16().double()
    values = dense[tokens, ids].float()
    y = torch.zeros(40, 200)
    REFERENCE.sparse_decode(y, offsets, ids, values, rows.float(), torch.bfloat16)
    scale = float((dense @ rows).abs().max())
    assert float((y - dense @ rows).abs().max()) < 2**-8 * scale
    dots = sparse_backward.value_gradients(grad.float(), rows.float(), offsets, ids, tokens, torch.bfloat16)
    wanted = (grad @ rows.T)[tokens, ids]
    assert float((dots - wanted).abs().max()) < 2**-8 * float(wanted.abs().max())
    weights = sparse_backward.row_gradients(build_csc(ids, tokens, 64), values, grad.float(), torch.bfloat16)
    assert float((weights - dense.T @ grad).abs().max()) < 2**-8 * float((dense.T @ grad).abs().max())
