"""The order of the rows: complete, the same however it is cut, and mixed as docs/store.md says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store import order as order_module
from activation_store.order import EpochLine, ShuffleOrder


def make_order(counts: list[int], *, seed: int = 0, lanes: int = 4, pool_chunks: int = 2, run_rows: int = 3):
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return ShuffleOrder(ends, seed=seed, lanes=lanes, pool_chunks=pool_chunks, run_rows=run_rows), ends


def lane_rows(order: ShuffleOrder, ends: np.ndarray, lane: int, start: int, stop: int) -> list[int]:
    """Used rows at places [start, stop) of a lane's stream, asking for the pool of each place anew now and then."""
    rows: list[int] = []
    while start < stop:
        pool = order.pool_at(lane, start)
        assert pool.start <= start < pool.stop
        found = np.concatenate([ends[part.chunk] + np.arange(part.start, part.stop) for part in pool.parts])
        placed = np.full(pool.stop - pool.start, -1)
        placed[pool.places] = found
        assert (placed >= 0).all()
        take = placed[start - pool.start : stop - pool.start].tolist()
        rows += take
        start += len(take)
    return rows


def positions(order: ShuffleOrder, ends: np.ndarray, count: int) -> np.ndarray:
    """Used rows at the first `count` positions of the endless order."""
    out = np.empty(count, dtype=np.int64)
    for lane in range(order.lanes):
        here = out[lane :: order.lanes]
        here[:] = lane_rows(order, ends, lane, 0, len(here))
    return out


@settings(deadline=None, max_examples=80)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any),
    seed=st.integers(0, 2**40),
    lanes=st.integers(1, 12),
    pool_chunks=st.integers(1, 5),
    run_rows=st.integers(1, 6),
    max_parts=st.sampled_from([1, 3, 4096]),
)
def test_each_used_row_once_an_epoch(
    counts: list[int], seed: int, lanes: int, pool_chunks: int, run_rows: int, max_parts: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "MAX_PARTS", max_parts)
        order, ends = make_order(counts, seed=seed, lanes=lanes, pool_chunks=pool_chunks, run_rows=run_rows)
        per_epoch = order.rows_per_epoch
        assert per_epoch == sum(counts)
        sequence = positions(order, ends, 3 * per_epoch)
        for epoch in range(3):
            assert sorted(sequence[epoch * per_epoch : (epoch + 1) * per_epoch]) == list(range(per_epoch))
        # A lane that is entered anywhere goes on in the same way.
        for start in {0, per_epoch // (2 * lanes), 2 * per_epoch // lanes - 1}:
            if 0 <= start < len(sequence[::lanes]):
                assert lane_rows(order, ends, 0, start, len(sequence[::lanes])) == sequence[::lanes][start:].tolist()


def test_pools_hold_as_many_chunks_as_they_may() -> None:
    order, _ = make_order([8] * 64, lanes=4, pool_chunks=3)
    pools, t = [], 0
    while t < 128:
        pools.append(order.pool_at(1, t))
        t = pools[-1].stop
    assert max(len(pool.parts) for pool in pools) == 3
    # Full ones but the first, which is short on purpose, and the last.
    assert [len(pool.parts) for pool in pools[1:-1]] == [3] * (len(pools) - 2)


def spearman(order_of_rows: np.ndarray) -> float:
    return float(np.corrcoef(order_of_rows, np.arange(len(order_of_rows)))[0, 1])


@pytest.mark.parametrize("max_parts", [4096, 16])
def test_the_mixing_is_what_the_docs_say(max_parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 chunks of 64 rows, 16 lanes. Chunks (parts of 16 chunks) are the units: |rho| below 4 / sqrt(units - 1)."""
    monkeypatch.setattr(order_module, "MAX_PARTS", max_parts)
    batch, lanes, chunk = 128, 16, 64
    for seed in range(5):
        order, ends = make_order([chunk] * 256, seed=seed, lanes=lanes, pool_chunks=1, run_rows=4)
        sequence = positions(order, ends, order.rows_per_epoch)
        assert abs(spearman(sequence)) < 4 / np.sqrt(min(256, max_parts) - 1)
        inside = [spearman(np.argsort(np.argsort(rows))) for rows in sequence.reshape(-1, batch)]
        assert abs(np.mean(inside)) < 0.1
        # A batch has exactly batch / lanes rows of each lane, so of one chunk at most as many, but for a lane's end.
        most = max(np.unique(rows // chunk, return_counts=True)[1].max() for rows in sequence.reshape(-1, batch))
        assert most <= 2 * batch // lanes
        # Documents of 2,048 rows, one after another: 32 chunks, an eighth of the store. A batch's share of one is
        # that of 16 draws of chunks: below 1/8 + 5 standard deviations.
        documents = sequence.reshape(-1, batch) // 2_048
        shares = [np.unique(rows, return_counts=True)[1].max() / batch for rows in documents]
        assert max(shares) < 1 / 8 + 5 * np.sqrt(1 / 8 * 7 / 8 / lanes)
    other, _ = make_order([chunk] * 256, seed=99, lanes=lanes, pool_chunks=1, run_rows=4)
    assert (positions(other, ends, 512) != sequence[:512]).any()


def test_what_is_held_does_not_grow_with_the_store() -> None:
    """A line over ten million chunks, given as a function of the number, holds tables of a few thousand numbers."""

    class Ends:
        """256 used rows a chunk."""

        def __len__(self) -> int:
            return 10_000_001

        def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
            return np.asarray(numbers) * 256

    line = EpochLine(Ends(), seed=1, epoch=0)  # type: ignore[arg-type]
    assert sum(value.size for value in vars(line).values() if isinstance(value, np.ndarray)) < 4 * 4096 + 8
    chunk, start, stop = line.chunk_at(line.place_of(1_234_567_890))
    assert start <= 1_234_567_890 < stop == start + 256
    assert 0 <= chunk < 10_000_000
