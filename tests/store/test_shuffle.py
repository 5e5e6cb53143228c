"""Shuffled batches: each used row once an epoch, and a pure function of (seed, n, rank, ranks)."""

import gc
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store.config import Dtype
from activation_store.errors import UserError
from activation_store.shuffle import ActivationBatch, ShuffledBatches, ShuffleOrder
from activation_store.store import ActivationStore
from tests.store.making import manifest, random_rows, write_store


def rows_at(order: ShuffleOrder, start: int, stop: int) -> list[int]:
    """Logical rows at positions of the order."""
    rows: list[int] = []
    for part in order.segments(start, stop):
        rows += order.pool_rows(part.epoch, part.pool)[0][part.start : part.stop].tolist()
    return rows


def make_order(sizes: list[int], seed: int, pool_chunks: int, share: float) -> tuple[ShuffleOrder, np.ndarray]:
    sizes_array = np.array(sizes, dtype=np.int64)
    used = np.random.default_rng(len(sizes)).random(sizes_array.sum()) < share
    first = np.cumsum(sizes_array) - sizes_array
    return ShuffleOrder(first, sizes_array, used, seed=seed, pool_chunks=pool_chunks), used


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    seed=st.integers(0, 2**40),
    pool_chunks=st.integers(1, 12),
    share=st.sampled_from([0.3, 0.9, 1.0]),
    split=st.tuples(st.integers(1, 25), st.integers(1, 4)),
)
def test_each_used_row_once_an_epoch(
    sizes: list[int], seed: int, pool_chunks: int, share: float, split: tuple[int, int]
) -> None:
    order, used = make_order(sizes, seed, pool_chunks, share)
    batch, ranks = split
    per_epoch = order.rows_per_epoch
    assert per_epoch == used.sum()
    if per_epoch == 0:
        return
    for epoch in range(3):
        rows = rows_at(order, epoch * per_epoch, (epoch + 1) * per_epoch)
        assert sorted(rows) == np.flatnonzero(used).tolist()
    # Any cut into batches and ranks is the same sequence; ranks are disjoint and together complete.
    sequence = rows_at(order, 0, 3 * per_epoch)
    for number in range(2 * per_epoch // (batch * ranks)):
        start = number * batch * ranks
        shares = [rows_at(order, start + rank * batch, start + (rank + 1) * batch) for rank in range(ranks)]
        assert list(chain.from_iterable(shares)) == sequence[start : start + batch * ranks]


def test_epochs_and_seeds_differ_and_pools_mix() -> None:
    order, _ = make_order([8] * 64, 3, 8, 1.0)
    first, second = rows_at(order, 0, 512), rows_at(order, 512, 1024)
    other = rows_at(make_order([8] * 64, 4, 8, 1.0)[0], 0, 512)
    assert first != second
    assert first != other
    # A batch of 64 rows of a pool of 8 scattered chunks: no chunk has more than a few times its share of 8 rows.
    chunks, counts = np.unique(np.array(first[:64]) // 8, return_counts=True)
    assert len(chunks) == 8
    assert abs(np.corrcoef(first, np.arange(512))[0, 1]) < 0.2
    assert counts.max() == 8
    inside = [row % 8 for row in first[:32]]
    assert len(set(np.array(first[:32]) // 8)) >= 6
    assert inside != sorted(inside)


@pytest.fixture(scope="module", params=list(Dtype))
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    begun = manifest(dtype=request.param, d_model=6, chunk_rows=8, shard_rows=16)
    blocks = [random_rows(size, begun, seed) for seed, size in enumerate((61, 16, 100))]
    return write_store(tmp_path_factory.mktemp("store"), begun, blocks)


def take(batches: ShuffledBatches, count: int) -> list[ActivationBatch]:
    with batches:
        return [next(batches) for _ in range(count)]


def test_batches_hold_the_rows_that_they_name(store: ActivationStore) -> None:
    whole = store[:]
    batches = take(ShuffledBatches(store, batch_size_tokens=24, seed=5, pool_rows=40), 20)
    used = np.flatnonzero(store.used_rows())
    seen = torch.cat([batch.rows for batch in batches])
    assert sorted(seen[: len(used)].tolist()) == used.tolist()
    for number, batch in enumerate(batches):
        assert batch.mlp_in.dtype is torch.float32
        assert torch.equal(batch.mlp_in, whole.mlp_in[batch.rows])
        assert torch.equal(batch.mlp_out, whole.mlp_out[batch.rows])
        assert batch.epoch == number * 24 // len(used)


def test_resumed_at_any_batch(store: ActivationStore) -> None:
    def rows(start: int, count: int, rank: int = 0, ranks: int = 1) -> torch.Tensor:
        batches = ShuffledBatches(
            store, batch_size_tokens=20, seed=1, pool_rows=32, start_batch=start, rank=rank, ranks=ranks
        )
        assert batches.position == start
        return torch.stack([batch.rows for batch in take(batches, count)])

    whole = rows(0, 18)
    for start in (1, 6, 7, 8, 15):
        assert torch.equal(rows(start, 3), whole[start : start + 3])
    for ranks in (2, 4):
        shares = [rows(5, 6, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat(shares, dim=1), whole[5:11])


def test_memory_is_reused_only_when_nobody_holds_it(store: ActivationStore) -> None:
    whole = store[:]
    with ShuffledBatches(store, batch_size_tokens=16, pool_rows=64) as batches:
        kept = [(batch.mlp_in[3], int(batch.rows[3])) for batch in (next(batches) for _ in range(30))]
        places = {x.untyped_storage().data_ptr() for x, _ in kept}
        assert len(places) == 30
        for x, row in kept:
            assert torch.equal(x, whole.mlp_in[row])
        kept.clear()
        gc.collect()
        dropped = {next(batches).mlp_in.untyped_storage().data_ptr() for _ in range(60)}
        assert len(dropped) <= 12


def test_a_damaged_shard_reaches_the_consumer(tmp_path: Path) -> None:
    begun = manifest(chunk_rows=8, shard_rows=16)
    store = write_store(tmp_path, begun, [random_rows(64, begun, 0)])
    (tmp_path / "mlp_in" / "c" / "2" / "0" / "0").write_bytes(b"short")
    with ShuffledBatches(store, batch_size_tokens=16, pool_rows=16) as batches:
        with pytest.raises(UserError, match=r"mlp_in/c/2/0/0 is damaged .* layerloom store verify"):
            list(islice(batches, 10))
        with pytest.raises(UserError, match="mlp_in/c/2/0/0"):
            next(batches)


def test_bad_shares_and_closing(store: ActivationStore) -> None:
    with pytest.raises(UserError, match="batch_size_tokens=10 cannot be shared by 4 ranks; use a multiple of 4"):
        ShuffledBatches(store, batch_size_tokens=10, ranks=4)
    batches = ShuffledBatches(store, batch_size_tokens=10)
    assert batches.rows_per_epoch == store.used_rows().sum()
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)
