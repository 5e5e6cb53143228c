"""Selection over ranks, played in one process: every rank's part is a list, and a sum over ranks is a sum of lists."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.kernels.selection import largest
from trainer.parallel.selection import counts_of_best, mark_best, mark_largest, nth_largest, score_keys


def _ranks(n_ranks: int, function: Callable[[int, Callable[[Tensor], Tensor]], Tensor]) -> list[Tensor]:
    """function(rank, add) on a thread each; add sums over them."""
    barrier, slots = Barrier(n_ranks), [torch.zeros(0)] * n_ranks

    def run(rank: int) -> Tensor:
        def add(x: Tensor) -> Tensor:
            slots[rank] = x
            barrier.wait(30)
            total = torch.stack(slots).sum(dim=0)
            barrier.wait(30)
            return total

        return function(rank, add)

    with ThreadPoolExecutor(n_ranks) as pool:
        return list(pool.map(run, range(n_ranks)))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_ranks=st.sampled_from([1, 2, 4]),
    distinct=st.sampled_from([1, 3, 1000]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_largest_of_all_ranks_with_the_smallest_ties(
    seed: int, n_ranks: int, distinct: int, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(seed)
    each = 50
    values = torch.rand(distinct, generator=g, dtype=dtype) * 10.0 ** float(torch.randint(-30, 30, (1,), generator=g))
    values[0] = 0.0
    scores = values[torch.randint(distinct, (n_ranks * each,), generator=g)]
    ties = torch.randperm(1 << 20, generator=g)[: scores.numel()]
    n = int(torch.randint(1, scores.numel(), (1,), generator=g))
    expected = largest(scores, n, ties)

    def one(rank: int, add: Callable[[Tensor], Tensor]) -> Tensor:
        part = slice(rank * each, (rank + 1) * each)
        return mark_largest(scores[part], ties[part], n, 20, add, torch.int32)

    found = torch.cat(_ranks(n_ranks, one))
    assert int(found.sum()) == n
    assert torch.equal(found, expected)


def test_nan_is_the_largest_and_shows() -> None:
    scores = torch.tensor([1.0, float("nan"), torch.inf, 2.0, float("-nan")])
    ties = torch.arange(5)
    for n in (1, 2):
        assert mark_largest(scores, ties, n, 3, lambda x: x, torch.int32).tolist() == [False, True, False, False, True]
    assert mark_largest(scores, ties, 3, 3, lambda x: x, torch.int32).tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounds_are_as_many_as_the_bits_need(dtype: torch.dtype) -> None:
    """Whatever the scores: none is a bisection that stops when it has found them."""
    rounds = []

    def add(x: Tensor) -> Tensor:
        rounds.append(x.numel())
        return x

    for scores in (torch.zeros(9, dtype=dtype), torch.rand(9, dtype=dtype)):
        rounds.clear()
        keys, bits = score_keys(scores)
        nth_largest(keys, 4, bits, add, torch.int32)
        assert rounds == ([2048, 2048, 512] if dtype == torch.float32 else [2048] * 5 + [256])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_ranks=st.sampled_from([2, 3]),
    n_layers=st.sampled_from([1, 3]),
    levels=st.sampled_from([2, 5, 1000]),
    k=st.integers(1, 20),
)
def test_counts_and_marks_choose_the_best_of_a_token(
    seed: int, n_ranks: int, n_layers: int, levels: int, k: int
) -> None:
    """Against sorting every entry of a token by (score, layer, feature)."""
    g = torch.Generator().manual_seed(seed)
    n_tokens, width, n_features = 6, 7, 10
    scores = torch.randint(levels, (n_tokens, n_ranks, width), generator=g).float()
    scores[torch.rand(scores.shape, generator=g) < 0.2] = float("-inf")
    # Empty columns last.
    scores = scores.sort(dim=2, descending=True).values
    filled = scores > float("-inf")
    scores = torch.where(filled, torch.randint(levels, scores.shape, generator=g).float(), scores)
    layers = torch.randint(n_layers, scores.shape, generator=g)
    layers = torch.where(filled, layers, n_layers).sort(dim=2).values
    counts = counts_of_best(scores, layers if n_layers > 1 else None, k)
    for token in range(n_tokens):
        entries = [
            (-float(scores[token, r, c]), int(layers[token, r, c]), r * n_features, c, r)
            for r in range(n_ranks)
            for c in range(width)
            if filled[token, r, c]
        ]
        chosen = {(r, c) for *_, c, r in sorted(entries)[:k]}
        for rank in range(n_ranks):
            marked = mark_best(scores[token, rank][None], counts[token, rank][None])[0]
            assert {(rank, c) for c in marked.nonzero()[:, 0].tolist()} == {e for e in chosen if e[0] == rank}
