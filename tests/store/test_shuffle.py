"""Shuffled batches: each used row once an epoch, and a pure function of (seed, n, rank, ranks)."""

import gc
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store.batch import ActivationBatch
from activation_store.buffers import Buffers
from activation_store.codec import Encoded, decode, from_bits
from activation_store.config import Compression, StoreDtype
from activation_store.errors import UserError
from activation_store.shuffle import ShuffledBatches
from activation_store.store import ActivationStore
from activation_store.used import BITS, UsedRows
from tests.store.making import manifest, random_rows, write_store

KINDS = [(dtype, Compression.none) for dtype in StoreDtype] + [
    (StoreDtype.float16, Compression.lz4),
    (StoreDtype.int8, Compression.zstd),
]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    dtype, compression = request.param
    begun = manifest(dtype=dtype, compression=compression, d_model=6, chunk_rows=8, shard_rows=16)
    blocks = [random_rows(size, begun, seed) for seed, size in enumerate((61, 16, 100))]
    return write_store(tmp_path_factory.mktemp("store"), begun, blocks)


def take(batches: ShuffledBatches, count: int) -> list[ActivationBatch]:
    with batches:
        return [next(batches) for _ in range(count)]


def in_order(batches: list[ActivationBatch], lanes: int) -> torch.Tensor:
    """Rows by their position in the endless order: a batch holds its lanes one after another."""
    return torch.cat([batch.rows.reshape(lanes, -1).t().reshape(-1) for batch in batches])


def test_batches_hold_the_rows_that_they_name(store: ActivationStore) -> None:
    whole = store[:]
    opened = ShuffledBatches(store, batch_size_tokens=24, seed=5, pool_rows=40, run_rows=2, threads=3)
    assert opened.order.lanes == 4
    batches = take(opened, 20)
    used = np.flatnonzero(store.used_rows())
    seen = in_order(batches, 4)
    for epoch in range(2):
        assert sorted(seen[epoch * len(used) : (epoch + 1) * len(used)].tolist()) == used.tolist()
    for number, batch in enumerate(batches):
        assert batch.mlp_in.dtype is torch.float32
        assert torch.equal(batch.mlp_in, whole.mlp_in[batch.rows])
        assert torch.equal(batch.mlp_out, whole.mlp_out[batch.rows])
        assert batch.epoch == number * 24 // len(used)


@settings(deadline=None, max_examples=10)
@given(
    batch=st.integers(1, 60),
    pool_rows=st.integers(1, 200),
    lanes=st.integers(1, 20),
    run_rows=st.integers(1, 9),
    start=st.integers(0, 12),
    layers=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
    threads=st.integers(1, 3),
    raw=st.booleans(),
)
def test_any_shape_against_zarr(
    store: ActivationStore, batch: int, pool_rows: int, lanes: int, run_rows: int, start: int, layers: list[int],
    threads: int, raw: bool,
) -> None:  # fmt: skip
    """zarr-python reads the same rows of the same arrays."""
    arrays = zarr.open_group(str(store.path), mode="r")
    stored_rows = np.concatenate([np.arange(first, first + rows) for first, rows in store.manifest.blocks])
    batches = take(
        ShuffledBatches(
            store, batch_size_tokens=batch, pool_rows=pool_rows, lanes=lanes, run_rows=run_rows, start_batch=start,
            layers=layers, threads=threads, decoded=not raw,
        ),
        3,
    )  # fmt: skip
    for got in batches:
        rows = stored_rows[got.rows.numpy()]
        for name in ("mlp_in", "mlp_out"):
            bits = arrays[name][:][rows][:, layers]
            scale = arrays[f"{name}_scale"][:][rows][:, layers] if f"{name}_scale" in arrays else None
            wanted = Encoded(from_bits(bits, store.dtype), None if scale is None else torch.from_numpy(scale))
            found = Encoded(getattr(got, name), getattr(got, f"{name}_scale"))
            assert found.values.dtype is (wanted.values.dtype if raw else torch.float32)
            assert torch.equal(decode(found) if raw else found.values, decode(wanted))


def test_resumed_at_any_batch_and_shared_by_any_ranks(store: ActivationStore) -> None:
    def rows(start: int, count: int, rank: int = 0, ranks: int = 1) -> torch.Tensor:
        batches = ShuffledBatches(
            store, batch_size_tokens=24, seed=1, pool_rows=32, run_rows=3, start_batch=start, rank=rank, ranks=ranks
        )
        assert batches.position == start
        return torch.stack([batch.rows for batch in take(batches, count)])

    whole = rows(0, 18)
    for start in (1, 6, 7, 8, 15):
        assert torch.equal(rows(start, 3), whole[start : start + 3])
    # The lanes are 4: ranks that divide them, that do not, and more ranks than lanes.
    for ranks in (2, 4, 3, 12):
        shares = [rows(5, 6, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat(shares, dim=1), whole[5:11])


def test_memory_is_reused_only_when_nobody_holds_it(store: ActivationStore) -> None:
    whole = store[:]
    with ShuffledBatches(store, batch_size_tokens=16, pool_rows=64, prefetch_bytes=0) as batches:
        kept = [(batch.mlp_in[3], int(batch.rows[3])) for batch in (next(batches) for _ in range(30))]
        places = {x.untyped_storage().data_ptr() for x, _ in kept}
        assert len(places) == 30
        for x, row in kept:
            assert torch.equal(x, whole.mlp_in[row])
        kept.clear()
        gc.collect()
        dropped = {next(batches).mlp_in.untyped_storage().data_ptr() for _ in range(60)}
        # Of both arrays: those that a pool reaches over, that are read ahead, that wait, and the consumer's.
        assert len(dropped) <= 26


@pytest.mark.parametrize("compression", list(Compression))
def test_a_damaged_shard_reaches_the_consumer(tmp_path: Path, compression: Compression) -> None:
    begun = manifest(chunk_rows=8, shard_rows=16, compression=compression)
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
    with pytest.raises(UserError, match=r"has layers \[0, 1, 2\], not \[3\]"):
        ShuffledBatches(store, batch_size_tokens=10, layers=[3])
    batches = ShuffledBatches(store, batch_size_tokens=10)
    assert batches.rows_per_epoch == store.used_rows().sum()
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_saved_used_rows_are_those_of_a_scan(tmp_path: Path) -> None:
    begun = manifest(chunk_rows=8, shard_rows=16)
    store = write_store(tmp_path, begun, [random_rows(61, begun, 0, outliers=2), random_rows(30, begun, 1)])
    scanned = store.used_rows()
    store.used.save(tmp_path)
    loaded = ActivationStore.open(tmp_path)
    assert isinstance(loaded.used.bits.base, np.memmap)
    np.testing.assert_array_equal(loaded.used_rows(), scanned)
    np.testing.assert_array_equal(loaded.used_rows(5, 70), scanned[5:70])
    # Of another store, or cut short: found anew.
    shape = {"chunks": len(store.chunks), "chunk_rows": 8}
    assert UsedRows.load(tmp_path, **shape, count=int(scanned.sum()) + 1) is None
    assert UsedRows.load(tmp_path, chunks=3, chunk_rows=8, count=int(scanned.sum())) is None
    (tmp_path / BITS).write_bytes((tmp_path / BITS).read_bytes()[:-5])
    np.testing.assert_array_equal(ActivationStore.open(tmp_path).used_rows(), scanned)


def bytes_read() -> int:
    """By this process's read calls so far."""
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "rchar" in line).split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what the kernel counts")
def test_layers_and_ranks_read_only_their_own_bytes(tmp_path: Path) -> None:
    begun = manifest(n_layers=8, d_model=64, chunk_rows=64, shard_rows=256)
    store = write_store(tmp_path, begun, [random_rows(4096, begun, seed) for seed in range(2)], pieces=4096)
    store.used.save(tmp_path)
    store = ActivationStore.open(tmp_path)
    batches = store.used.count // 128

    def epoch_bytes(**options: object) -> int:
        before = bytes_read()
        # Else 64 batches, another epoch, may be read before the reader is closed.
        few: dict[str, object] = {"batch_size_tokens": 128, "pool_rows": 1024, "prefetch_bytes": 0}
        with ShuffledBatches(store, **few, **options) as reader:
            for _ in range(batches):
                next(reader)
        return bytes_read() - before

    whole = store.n_rows * 2 * 8 * 64 * 2
    # Every byte once, and what is read ahead at the end: pools of 1,024 rows of 8,192, and the index of each shard.
    assert 0.97 * whole < epoch_bytes() < 1.2 * whole
    one = epoch_bytes(layers=[5])
    assert 0.97 * whole / 8 < one < 1.3 * whole / 8
    assert epoch_bytes(layers=[0, 1, 6]) < 1.3 * whole * 3 / 8
    for rank in range(4):
        assert 0.97 * whole / 4 < epoch_bytes(rank=rank, ranks=4) < 1.3 * whole / 4
    before = bytes_read()
    store.read_rows(0, 2048, layers=[3])
    assert bytes_read() - before < 1.3 * (2048 * 2 * 64 * 2)


MEMORY = """
import resource, sys
from activation_store.shuffle import ShuffledBatches
from activation_store.store import ActivationStore
store = ActivationStore.open(sys.argv[1])
with ShuffledBatches(store, batch_size_tokens=256, pool_rows=2048, prefetch_bytes=4 << 20, threads=2) as batches:
    next(batches)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(store.used.count // 256):
        next(batches)
print("KB", before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_is_what_was_configured_whatever_the_store(tmp_path: Path) -> None:
    """An epoch of 20 and of 160 MB, in processes of their own: 2,048 rows of 4 kB are 8 MB, and 4 MB are read ahead."""
    peaks, grown = [], []
    for size in (5, 40):
        begun = manifest(n_layers=8, d_model=128, chunk_rows=128, shard_rows=1024)
        block = random_rows(1024, begun, 0)
        store = write_store(tmp_path / str(size), begun, [block] * size, pieces=1024)
        store.used.save(store.path)
        job = [sys.executable, "-c", MEMORY, str(store.path)]
        output = subprocess.run(job, check=True, capture_output=True, text=True).stdout
        before, peak = (int(word) for word in output.split("KB")[1].split())
        peaks.append(peak)
        grown.append(peak - before)
    # A reader that held the store, or its shards' pages, would grow by 140 MB.
    assert peaks[1] - peaks[0] < 10_000
    assert max(grown) < 25_000


def test_the_consumer_waits_for_all_that_was_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scales of values as stored too, in the order of a device's own stream; here without a device."""
    waited: list[torch.Tensor] = []

    class Copier:
        def __init__(self, device: torch.device) -> None: ...

        def copy(self, parts: list[Encoded], *, decoded: bool) -> list[Encoded]:
            return parts

        def wait(self, *tensors: torch.Tensor) -> None:
            waited.extend(tensors)

    monkeypatch.setattr("activation_store.background.DeviceCopier", Copier)
    monkeypatch.setattr("activation_store.background.Buffers", lambda pinned=False: Buffers())
    begun = manifest(dtype=StoreDtype.int8)
    store = write_store(tmp_path, begun, [random_rows(40, begun, 0)])
    with ShuffledBatches(
        store, batch_size_tokens=8, pool_rows=16, decoded=False, device=torch.device("cuda")
    ) as batches:
        batch = next(batches)
    parts = (batch.mlp_in, batch.mlp_out, batch.mlp_in_scale, batch.mlp_out_scale)
    assert [id(tensor) for tensor in waited] == [id(tensor) for tensor in parts]
