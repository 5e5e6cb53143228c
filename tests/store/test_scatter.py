"""Rows to their places, compiled and not: the same bits, nothing else touched, and damage said in one line."""

import ctypes
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store import files, scatter
from activation_store.codec import has_scale
from activation_store.config import Compression, StoreDtype
from activation_store.errors import UserError
from activation_store.files import LocalFile
from activation_store.layout import StoreLayout
from activation_store.scatter import Block, Scatter
from activation_store.shuffle import ShuffledBatches
from tests.store.making import manifest, random_rows, write_store

UNTOUCHED = 0x5A


@pytest.fixture
def plain() -> Iterator[None]:
    """As where nothing can be compiled."""
    with patch.object(scatter, "compiled", lambda _: None):
        yield


class Case:
    """Random bits of rows, and runs that leave some of them out and put the others anywhere in some batches."""

    def __init__(self, dtype: StoreDtype, *, width: int, rows: int, layers: int, decoded: bool, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.array = StoreLayout(layers, width, dtype, chunk_rows=rows, shard_rows=rows).activations("mlp_in")
        self.stored = rng.integers(0, 256, (layers, rows, self.array.row_bytes), dtype=np.uint8)
        # Zeros, denormals, infinities, NaN, and the numbers beside them.
        special = np.array(
            [0, 0x8000, 1, 0x83FF, 0x0400, 0x7C00, 0xFC00, 0x7E01, 0x7F80, 0x7FC0, 0x7BFF, 0x80], np.uint16
        )
        if self.array.row_bytes >= 2:
            halves = self.stored[..., : self.array.row_bytes // 2 * 2].view(np.uint16)
            np.putmask(halves, rng.random(halves.shape) < 0.3, rng.choice(special, halves.shape))
        cuts = np.unique([0, rows, *rng.integers(0, rows + 1, int(rng.integers(0, 8)))])
        kept = [(int(a), int(b - a)) for a, b in pairwise(cuts) if rng.random() < 0.8]
        batches, share = 2, 2 * rows + 3
        self.runs = np.array([[first, size, i % batches, 0] for i, (first, size) in enumerate(kept or [(0, 1)])])
        for batch in range(batches):
            mine = np.flatnonzero(self.runs[:, 2] == batch)
            mine = mine[rng.permutation(len(mine))]
            self.runs[mine, 3] = int(rng.integers(0, 3)) + np.cumsum(self.runs[mine, 1]) - self.runs[mine, 1]
        self.shape = (batches, layers, share, width)
        self.out_dtype = np.dtype(np.float32) if decoded else self.array.dtype
        self.decoded = dtype if decoded else None
        scaled = decoded and has_scale(dtype)
        wanted = int(self.runs[-1, :2].sum())
        self.scales = rng.normal(size=(layers, wanted)).astype(np.float32) if scaled else None

    def filled(self, pad: int) -> tuple[Scatter, np.ndarray]:
        """Untouched memory at any address, and what fills it."""
        size = int(np.prod(self.shape)) * self.out_dtype.itemsize
        memory = np.full(size + 64, UNTOUCHED, dtype=np.uint8)[pad * self.out_dtype.itemsize :][:size]
        batches = memory.view(self.out_dtype).reshape(self.shape)
        return Scatter(self.array, self.runs, list(batches), self.decoded, self.scales), memory


def planned(target: Scatter, descriptor: int, offsets: np.ndarray, layer: int) -> Block:
    """Where something can be compiled."""
    block = target.planned(descriptor, offsets, layer)
    assert block is not None
    return block


def same_numbers(a: np.ndarray, b: np.ndarray, *, decoded: bool) -> bool:
    """Bit for bit; but of a NaN, which torch and the processor may each write in their own way."""
    if not decoded:
        return np.array_equal(a, b)
    x, y = a.view(np.float32), b.view(np.float32)
    return np.array_equal(np.where(np.isnan(x), 0, x.view(np.int32)), np.where(np.isnan(y), 0, y.view(np.int32)))


@settings(deadline=None, max_examples=150)
@given(
    dtype=st.sampled_from(list(StoreDtype)), width=st.integers(1, 70), rows=st.integers(1, 20),
    layers=st.integers(1, 3), decoded=st.booleans(), pad=st.integers(0, 16), piece=st.integers(1, 600),
    seed=st.integers(0, 2**32), from_layer=st.integers(0, 2),
)  # fmt: skip
def test_compiled_and_plain_give_the_same_bits(
    dtype: StoreDtype, width: int, rows: int, layers: int, decoded: bool, pad: int, piece: int, seed: int,
    from_layer: int,
) -> None:  # fmt: skip
    case = Case(dtype, width=width, rows=rows, layers=layers, decoded=decoded, seed=seed)
    layer = min(from_layer, layers - 1)
    gap, size = seed % 5, case.stored[0].nbytes
    data = b"".join(b"x" * gap + part.tobytes() for part in case.stored[layer:])
    offsets = gap + np.arange(layers - layer) * (gap + size)
    (target, expected), (by_file, from_file), (by_memory, from_memory) = (case.filled(p) for p in (0, pad, pad))
    with patch.object(scatter, "compiled", lambda _: None):
        target.put(np.frombuffer(data, np.uint8), offsets, layer)
    by_memory.put(np.frombuffer(data, np.uint8), offsets, layer)
    asked = max(piece, case.array.row_bytes)
    guard = np.full(asked + case.array.row_bytes, UNTOUCHED, dtype=np.uint8)
    with tempfile.TemporaryFile() as file, patch.object(scatter, "_piece", lambda size: guard[:size]):
        file.write(data)
        file.flush()
        with patch.object(scatter, "_PIECE_BYTES", piece):
            assert scatter.Plan.of([planned(by_file, file.fileno(), offsets, layer)]).read()
    assert (guard[asked:] == UNTOUCHED).all()
    assert same_numbers(from_memory, expected, decoded=decoded)
    assert same_numbers(from_file, expected, decoded=decoded)
    # The runs and nothing else.
    put = sum(int(size) for size in case.runs[:, 1]) * (layers - layer)
    untouched = (from_file.reshape(*case.shape[:3], -1) == UNTOUCHED).all(-1).sum()
    assert untouched >= np.prod(case.shape[:3]) - put


def test_a_file_that_ends_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    case = Case(StoreDtype.float16, width=9, rows=6, layers=2, decoded=True, seed=1)
    case.runs = np.array([[0, 6, 0, 0]])
    (tmp_path / "file").write_bytes(case.stored.tobytes()[:-1])
    target, _ = case.filled(0)
    offsets = np.array([0, case.stored[0].nbytes])
    file = LocalFile(tmp_path / "file")
    assert not scatter.Plan.of([planned(target, file.descriptor, offsets, 0)]).read()
    assert scatter.Plan.of([planned(target, file.descriptor, offsets[:1], 0)]).read()
    folder = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(OSError, match="directory") as raised:
        scatter.Plan.of([planned(target, folder, offsets, 0)]).read()
    assert raised.value.errno == errno.EISDIR
    os.close(folder)


@pytest.mark.parametrize("decoded", [True, False])
@pytest.mark.parametrize("how", ["compiled", "plain"])
@pytest.mark.parametrize(
    ("shard_rows", "batch", "pool_rows", "key"),
    [(256, 16, 16, "mlp_out/c/0/0/0"), (16, 64, 128, "mlp_in/c/7/0/0")],
    ids=["one", "of many that are read at once"],
)
def test_a_shard_cut_short_after_it_was_opened(
    tmp_path: Path, decoded: bool, how: str, shard_rows: int, batch: int, pool_rows: int, key: str,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if how == "plain":
        request.getfixturevalue("plain")
    begun = manifest(chunk_rows=8, shard_rows=shard_rows)
    store = write_store(tmp_path, begun, [random_rows(256, begun, 0)], pieces=256)
    options = {"batch_size_tokens": batch, "pool_rows": pool_rows, "prefetch_bytes": 0, "decoded": decoded}
    with ShuffledBatches(store, **options) as batches:
        next(batches)
        os.truncate(tmp_path / key, 100)
        with pytest.raises(UserError, match=rf"{key} is damaged \(cut short\); .* layerloom store verify"):
            list(islice(batches, 40))


@pytest.mark.parametrize("compression", [Compression.none, Compression.lz4])
@pytest.mark.parametrize("dtype", list(StoreDtype))
def test_batches_are_the_same_where_nothing_can_be_compiled(
    tmp_path: Path, dtype: StoreDtype, compression: Compression, request: pytest.FixtureRequest
) -> None:
    begun = manifest(dtype=dtype, compression=compression, d_model=21, chunk_rows=8, shard_rows=16)
    store = write_store(tmp_path, begun, [random_rows(90, begun, 0)], pieces=90)

    def read(*, decoded: bool) -> list[np.ndarray]:
        options = {"batch_size_tokens": 24, "pool_rows": 32, "run_rows": 2, "layers": [2, 0], "threads": 2}
        with ShuffledBatches(store, **options, decoded=decoded) as batches:
            taken = [next(batches) for _ in range(8)]
        # bfloat16 and float8 are no dtypes of numpy.
        return [x.float().numpy() for batch in taken for x in (batch.mlp_in, batch.mlp_out, batch.rows)]

    compiled = [read(decoded=decoded) for decoded in (True, False)]
    request.getfixturevalue("plain")
    for found, decoded in zip(compiled, (True, False), strict=True):
        for a, b in zip(found, read(decoded=decoded), strict=True):
            np.testing.assert_array_equal(a, b)


def test_hints_are_no_longer_than_the_system_reads_for_one(tmp_path: Path) -> None:
    """Of a longer one, Linux leaves the rest out: that would be read late, behind all that was hinted."""
    (tmp_path / "file").write_bytes(bytes(1_000_000))
    asked: list[tuple[int, int]] = []
    file = LocalFile(tmp_path / "file")
    with patch.object(os, "posix_fadvise", lambda _, offset, length, __: asked.append((offset, length))):
        file.hint(1_000, 400_001)
    assert max(length for _, length in asked) == 1 << 17
    assert asked[0][0] == 1_000
    assert [offset + length for offset, length in asked[:-1]] == [offset for offset, _ in asked[1:]]
    assert sum(asked[-1]) == 401_001
    assert file.at_hand(5_000)
    assert not file.at_hand(2_000_000)


def test_a_system_without_hints_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As macOS."""
    begun = manifest(chunk_rows=8, shard_rows=16)
    store = write_store(tmp_path, begun, [random_rows(32, begun, 0)], pieces=32)

    def rows() -> list[int]:
        with ShuffledBatches(store, batch_size_tokens=16, pool_rows=16) as batches:
            return [row for batch in islice(batches, 3) for row in batch.rows.tolist()]

    expected = rows()
    monkeypatch.setattr(files, "_peek", None)
    monkeypatch.setattr(files, "_NO_WAIT", 0)
    monkeypatch.delattr(os, "posix_fadvise")
    assert rows() == expected


@pytest.mark.parametrize("dtype", [StoreDtype.float16, StoreDtype.bfloat16, None])
def test_nothing_is_compiled_where_the_processor_does_not_convert_half(dtype: StoreDtype | None) -> None:
    """One function serves all dtypes."""
    from activation_store import compiling

    with patch.object(compiling, "widens_half", lambda: False):
        assert scatter.compiled.__wrapped__(dtype) is None


def test_a_numba_that_cannot_be_imported_is_done_without() -> None:
    with patch.dict(sys.modules, {"activation_store.scatter_compiled": None}):
        sys.modules["activation_store"].__dict__.pop("scatter_compiled", None)
        assert scatter.compiled.__wrapped__(None) is None


def test_a_signal_in_the_middle_of_reading_is_no_failure(tmp_path: Path) -> None:
    case = Case(StoreDtype.float16, width=9, rows=6, layers=1, decoded=True, seed=1)
    (tmp_path / "file").write_bytes(case.stored.tobytes())
    file, offsets = LocalFile(tmp_path / "file"), np.array([0])
    quiet, expected = case.filled(0)
    assert scatter.Plan.of([planned(quiet, file.descriptor, offsets, 0)]).read()
    target, found = case.filled(0)
    real, calls = scatter.Plan.run, []

    def interrupted(plan: scatter.Plan) -> int:
        calls.append(1)
        if len(calls) == 1:
            ctypes.set_errno(errno.EINTR)
            return -2
        return real(plan)

    with patch.object(scatter.Plan, "run", interrupted):
        assert scatter.Plan.of([planned(target, file.descriptor, offsets, 0)]).read()
    assert len(calls) == 2
    np.testing.assert_array_equal(found, expected)


def test_many_blocks_in_one_call_stop_at_a_file_that_ends(tmp_path: Path) -> None:
    cases = [Case(StoreDtype.float16, width=9, rows=6, layers=2, decoded=True, seed=seed) for seed in range(3)]
    blocks, found, expected = [], [], []
    for i, case in enumerate(cases):
        (tmp_path / f"{i}").write_bytes(case.stored)
    opened = [LocalFile(tmp_path / f"{i}") for i in range(3)]
    for case, file in zip(cases, opened, strict=True):
        offsets = np.array([0, case.stored[0].nbytes])
        (one, alone), (target, memory) = case.filled(0), case.filled(0)
        assert scatter.Plan.of([planned(one, file.descriptor, offsets, 0)]).read()
        blocks.append(planned(target, file.descriptor, offsets, 0))
        found.append(memory)
        expected.append(alone)
    os.truncate(tmp_path / "1", 10)
    assert not scatter.Plan.of(blocks).read()
    np.testing.assert_array_equal(found[0], expected[0])
    assert (found[2] == UNTOUCHED).all()
    (tmp_path / "1").write_bytes(cases[1].stored)
    assert scatter.Plan.of(blocks).read()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_reader_compiles_before_its_threads_ask_for_it(tmp_path: Path) -> None:
    """numba's cache folder is one setting for all threads."""
    from activation_store import scatter_compiled

    begun = manifest(chunk_rows=8, shard_rows=16)
    store = write_store(tmp_path, begun, [random_rows(32, begun, 0)], pieces=32)
    scatter_compiled.scatter.cache_clear()
    with patch("activation_store.assembly.Assembler.schedule"), patch("threading.Thread.start"):
        batches = ShuffledBatches(store, batch_size_tokens=16, pool_rows=16)
        assert scatter_compiled.scatter.cache_info().currsize == 1
        del batches
