"""The Triton kernels of the encode side against brute force in float64, to the bit, and against the reference.

Without CUDA they run in Triton's interpreter; tests/gpu runs the same functions on a device.
"""

import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.encode_cases import (
    BF16,
    F32,
    NO_FLOOR,
    Encoder,
    assert_candidates,
    assert_selection,
    assert_topk,
    encoder,
    norms,
    of_table,
)
from tests.kernels.sparse_cases import DEVICE

pytest.importorskip("triton")

from trainer.kernels import batch_threshold as reference_batch
from trainer.kernels import build_csc as reference_csc
from trainer.kernels import encode_jumprelu as reference_jumprelu
from trainer.kernels import encode_topk as reference_topk
from trainer.kernels.batch_threshold import Candidates
from trainer.kernels.gpu import best_of_token, groups, products
from trainer.kernels.gpu.batch_threshold import batch_threshold, encode_candidates
from trainer.kernels.gpu.build_csc import build_csc
from trainer.kernels.gpu.encode_jumprelu import encode_jumprelu
from trainer.kernels.gpu.encode_topk import encode_topk
from trainer.kernels.gpu.entries import write_entries
from trainer.kernels.gpu.nth_largest import bound_of_nth, largest, marks_from_scores, nth_largest

ODD = (41, 1271, 100)
# Parameters, product.
PRECISIONS = [(F32, F32), (F32, BF16), (BF16, BF16)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens a block, and searches that do not fit registers."""
    monkeypatch.setattr(products, "block_bytes", lambda device: 4096)
    for module in (groups, best_of_token):
        monkeypatch.setattr(module, "LIST_BLOCK", 16)
    monkeypatch.setattr(best_of_token, "MIN_BEST_BLOCK", 16)
    monkeypatch.setattr(best_of_token, "MAX_BEST_BLOCK", 16)


def with_nan(case: Encoder, *features: int, nan: float = float("nan")) -> Encoder:
    for feature in features:
        case.bias_F[feature] = case.pre_BF[:, feature] = nan
    return case


@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_nan_is_the_largest(nan: float) -> None:
    """A broken bias, and a broken norm, in every selection; infinity comes next. A processor's own NaN has a sign."""
    case = with_nan(encoder(4, 90), 17, 80, nan=nan)
    assert bool(case.bias_F[17].signbit()) == (math.copysign(1, nan) < 0)
    case.bias_F[33] = case.pre_BF[:, 33] = float("inf")
    assert_topk(encode_topk(*case.operands, 3, None, F32), case, 3)
    assert_candidates(encode_candidates(*case.operands, 10, NO_FLOOR, None, F32), case, 10)
    norm_F = norms(90)
    norm_F[41] = nan
    assert_topk(encode_topk(*case.operands, 5, norm_F, F32), case, 5, norm_F)
    found = encode_jumprelu(*case.operands, 1e9, 0.0, F32)
    assert found is not None
    assert_selection(found, case, [[17, 33, 80]] * 4)


@pytest.mark.parametrize(("parameters", "compute"), PRECISIONS)
@pytest.mark.parametrize("bandwidth", [0.0, 0.75])
def test_jumprelu(parameters: torch.dtype, compute: torch.dtype, bandwidth: float) -> None:
    """Thresholds and band edges that many entries meet exactly."""
    case = encoder(23, 1271, 3, compute=compute, parameters=parameters)
    theta_F = (torch.arange(1271) % 40 / 4).to(DEVICE, parameters)
    found = encode_jumprelu(*case.operands, theta_F, bandwidth, compute)
    assert found is not None
    kept = case.pre_BF - theta_F.double() > -bandwidth / 2
    assert_selection(found, case, [row.nonzero()[:, 0].tolist() for row in kept])
    wanted = reference_jumprelu.encode_jumprelu(*case.operands, theta_F, bandwidth, compute)
    assert wanted is not None
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_jumprelu_gives_up_above_a_density() -> None:
    """One scalar threshold, several blocks; None exactly where the share of the reference passes the limit."""
    case = encoder(30, 200)
    kept = case.pre_BF > 0.5
    density = float(kept.double().mean())
    assert encode_jumprelu(*case.operands, 0.5, 0.0, F32, density * 0.99) is None
    found = encode_jumprelu(*case.operands, 0.5, 0.0, F32, density)
    assert found is not None
    assert_selection(found, case, [row.nonzero()[:, 0].tolist() for row in kept])


def test_jumprelu_of_nothing() -> None:
    case = of_table(torch.randn(3, 70))
    for x in (case.x_BD, case.x_BD[:0]):
        found = encode_jumprelu(x, case.weight_FD, case.bias_F, 9.0, 0.5, F32)
        assert found is not None
        assert found.offsets.tolist() == [0] * (x.shape[0] + 1)
        assert found.feature_ids.numel() == found.values.numel() == 0


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("parameters", "compute"), PRECISIONS)
def test_candidates(parameters: torch.dtype, compute: torch.dtype, norm: bool) -> None:
    case = encoder(*ODD, compute=compute, parameters=parameters)
    norm_F = norms(1271) if norm else None
    found = encode_candidates(*case.operands, 287, NO_FLOOR, norm_F, compute)
    assert_candidates(found, case, 287, norm_F)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n", [0, 1, 100, 500, 2100])
def test_candidates_in_blocks(n: int) -> None:
    """The floor rises from block to block; more wanted than there are."""
    case = encoder(14, 150)
    assert_candidates(encode_candidates(*case.operands, n, NO_FLOOR, None, F32), case, n)


@pytest.mark.parametrize("floor", [-1.0, 0.0, 2.25, 2.2500000001, 1e30, float("inf"), float("nan")])
def test_candidates_above_a_floor(floor: float) -> None:
    """The floor itself belongs to them; NaN is no floor."""
    case = encoder(5, 150)
    assert_candidates(encode_candidates(*case.operands, 200, floor, None, F32), case, 200, floor=floor)
    assert_candidates(encode_candidates(*case.operands, 200, floor, norms(150), F32), case, 200, norms(150), floor)


def layers_of(n_features: int, sizes: list[int], seed: int = 0, distinct: int = 4) -> list[Candidates]:
    g = torch.Generator().manual_seed(seed)
    layers = []
    for size in sizes:
        positions = torch.randperm(20 * n_features, generator=g)[:size].sort().values.to(DEVICE)
        values = (torch.randint(0, distinct, (size,), generator=g) / 2).to(DEVICE)
        layers.append(Candidates(positions, values, values))
    return layers


@pytest.mark.parametrize("n", [0, 1, 90, 200, 300, 1000])
def test_batch_threshold(n: int) -> None:
    """Ties by (token, layer, feature); no tie at the border where scores are many; a layer without candidates."""
    for distinct in (4, 10**6):
        layers = layers_of(30, [100, 0, 90, 110], distinct=distinct)
        wanted = reference_batch.batch_threshold(layers, n, 30)
        found = batch_threshold(layers, n, 30)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_batch_threshold_with_nan() -> None:
    layers = layers_of(30, [50, 60])
    layers[1].scores[20:23] = float("nan")
    found = batch_threshold(layers, 5, 30)
    assert sum(int(mask.sum()) for mask in found) == 5
    assert bool(found[1][20:23].all())


def on_devices(works: list[Callable[[Callable[[Tensor], Tensor]], Tensor]]) -> list[Tensor]:
    """Run each with a sum over all, in threads of which one runs at a time (the interpreter is not made for more)."""
    turn, meeting = threading.Lock(), threading.Barrier(len(works), timeout=60)
    given: list[Tensor] = [torch.empty(0)] * len(works)
    results: list[Tensor] = [torch.empty(0)] * len(works)

    def device(rank: int) -> None:
        def reduce(counts: Tensor) -> Tensor:
            given[rank] = counts.clone()
            turn.release()
            meeting.wait()
            total = torch.stack(given).sum(0)
            meeting.wait()
            turn.acquire()
            return total

        with turn:
            results[rank] = works[rank](reduce)

    threads = [threading.Thread(target=device, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(("n", "distinct"), [(1, 3), (150, 3), (150, 10**6), (10**4, 3)])
def test_largest_over_devices(n: int, distinct: int) -> None:
    """Two devices with half of the candidates each select what one device selects of all, ties included."""
    g = torch.Generator().manual_seed(n)
    scores = torch.randint(0, distinct, (400,), generator=g).float().to(DEVICE)
    ties = torch.randperm(400, generator=g).to(DEVICE) * 10**9
    marks = marks_from_scores(scores)
    halves = [slice(0, 130), slice(130, 400)]
    found = on_devices([lambda reduce, half=half: largest(marks[half], n, ties[half], reduce) for half in halves])
    assert torch.equal(torch.cat(found), largest(marks, n, ties))
    order = sorted(range(400), key=lambda i: (-float(scores[i]), int(ties[i])))
    assert torch.cat(found).nonzero()[:, 0].tolist() == sorted(order[:n])


@pytest.mark.parametrize("size", [1, 5, 6000])
def test_nth_largest(size: int) -> None:
    """Of the whole range, with every value repeated; 0 beyond the end."""
    g = torch.Generator().manual_seed(size)
    keys = torch.randint(0, 2**31 - 1, (size,), generator=g).repeat(2).int().to(DEVICE)
    keys[0] = 2**31 - 1
    ordered = keys.sort(descending=True).values.tolist()
    for n in {1, size, 2 * size}:
        nth, missing = nth_largest(keys, n, 31)
        assert int(nth) == ordered[n - 1]
        assert int(missing) == n - sum(key > ordered[n - 1] for key in ordered)
        # A bound that is further below lets whole blocks through where scores are close to one another.
        assert ordered[n - 1] - 2**8 < int(bound_of_nth(keys, n)) <= ordered[n - 1]
    assert int(nth_largest(keys, 2 * size + 1, 31)[0]) == 0
    assert int(nth_largest(keys[:0], 1, 31)[0]) == 0


def test_nth_largest_of_64_bits() -> None:
    keys = torch.tensor([2**62, 2**62 - 1, 3, 0, 2**40], device=DEVICE)
    assert [int(nth_largest(keys, n, 63)[0]) for n in range(1, 6)] == [2**62, 2**62 - 1, 2**40, 3, 0]


@pytest.mark.parametrize("n_features", [1, 37, 2**15, 2**15 + 1, 2**20])
@pytest.mark.parametrize("n", [0, 500])
def test_build_csc(n_features: int, n: int) -> None:
    """Each width of keys, the last feature among them; nothing at all."""
    ids = torch.randint(max(0, n_features - 50), n_features, (n,)).to(DEVICE)
    tokens = torch.randint(0, 40, (n,)).sort().values.to(DEVICE)
    found, wanted = build_csc(ids, tokens, n_features), reference_csc.build_csc(ids, tokens, n_features)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_offsets_beyond_32_bits() -> None:
    """A stride of 32 bits whose double is none (memory that is hardly touched), and positions above 2**40."""
    stride, f = 2**30 + 64, 100
    storage = torch.empty(2 * stride + f, dtype=BF16, device=DEVICE)
    product = storage.as_strided((3, f), (stride, 1))
    product.copy_(torch.randint(-9, 10, (3, f)))
    case = of_table(product.float())
    block = products.Block(first=3 * 2**20, product_RF=product, bias_F=None)
    rule, scratch = groups.Rule(kind=groups.PLAIN), groups.new_groups(3, f, 8, product.device)
    groups.mark_groups(block, rule, scratch)
    ids, values = torch.empty(3, 4, dtype=torch.int64, device=DEVICE), torch.empty(3, 4, device=DEVICE)
    counts = ids.new_empty(3, dtype=torch.int32)
    lists = best_of_token.new_scratch(3, f, 8, 4, ids.device)
    best_of_token.select(block, rule, scratch, 4, lists, (ids, values, counts))
    offsets = torch.tensor([0, 4, 8, 12], device=DEVICE)
    assert_topk(reference_topk.Selection(offsets, ids.flatten(), values.flatten()), case, 4)
    one = torch.ones(1, dtype=torch.int32, device=DEVICE)
    groups.list_groups(scratch, one, 3)
    positive = (product > 0).sum(dim=1)
    starts = positive.cumsum(0) - positive
    entries = write_entries(block, rule, scratch, one, starts, int(positive.sum()), row_step=2**20)
    rows, cols = (product > 0).nonzero().T
    assert torch.equal(entries.places, (3 * 2**20 + rows) * 2**20 + cols)


def test_blocks_of_tokens() -> None:
    """Equal, within the limit, of whole tiles of the matrix product; a row above the limit is a block."""
    for n_tokens, row_bytes in [(16384, 92_000), (1000, 10), (300, 2**21), (5, 2**30), (0, 1), (129, 2**22)]:
        tokens = products.block_tokens(n_tokens, row_bytes, torch.device(DEVICE))
        assert tokens >= 1
        assert tokens * row_bytes <= max(products.block_bytes(torch.device(DEVICE)), row_bytes)
        assert tokens >= n_tokens or tokens < 128 or tokens % 128 == 0


def test_float64_is_done_by_the_reference() -> None:
    case = encoder(4, 50)
    x, weight, bias = (t.double() for t in case.operands)
    assert encode_topk(x, weight, bias, 3, None, torch.float64).values.dtype == torch.float64
    assert encode_candidates(x, weight, bias, 3, NO_FLOOR, None, torch.float64).values.dtype == torch.float64
    found = encode_jumprelu(x, weight, bias, 0.0, 0.0, torch.float64)
    assert found is not None
    assert found.values.dtype == torch.float64
