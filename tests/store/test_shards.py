"""The files against zarr-python: what the writer writes zarr reads, and what zarr writes the reader reads."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store.codec import decode, encode, from_bits, stored_bits
from activation_store.config import StoreDtype
from activation_store.errors import UserError
from activation_store.layout import create_zarr
from activation_store.manifest import read_commits
from activation_store.shards import DamagedShardError
from activation_store.store import ActivationStore
from activation_store.verify import verify_store
from tests.store.making import manifest, random_rows, write_store, write_window

# Where fsync costs nothing: hypothesis writes hundreds of shards.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
SHAPES = st.fixed_dictionaries(
    {
        "n_layers": st.integers(1, 4),
        "d_model": st.integers(1, 7),
        "dtype": st.sampled_from(list(StoreDtype)),
        "chunk_rows": st.integers(1, 5),
    }
)


@settings(deadline=None, max_examples=15)
@given(shape=SHAPES, chunks=st.integers(1, 3), sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
       pieces=st.integers(1, 17))  # fmt: skip
def test_zarr_reads_what_the_writer_writes(shape: dict, chunks: int, sizes: list[int], pieces: int) -> None:
    if sum(sizes) < 3:
        sizes = [*sizes, 19]
    with TemporaryDirectory(dir=MEMORY) as folder:
        begun = manifest(**shape, shard_rows=chunks * shape["chunk_rows"], outlier_factor=1e9)
        blocks = [random_rows(size, begun, seed) for seed, size in enumerate(sizes)]
        store = write_store(Path(folder), begun, blocks, pieces=pieces)
        arrays = zarr.open_group(folder, mode="r")
        start = 0
        for (first, rows), block in zip(begun.blocks, blocks, strict=True):
            for name, x in (("mlp_in", block.mlp_in_NLD), ("mlp_out", block.mlp_out_NLD)):
                np.testing.assert_array_equal(arrays[name][first : first + rows], stored_bits(x.values))
                if x.scale is not None:
                    np.testing.assert_array_equal(arrays[f"{name}_scale"][first : first + rows], x.scale)
            assert first % store.layout.shard_rows == 0
            np.testing.assert_array_equal(arrays["token_ids"][first : first + rows], block.token_ids_N)
            read = store[start : start + rows]
            torch.testing.assert_close(read.mlp_in, decode(block.mlp_in_NLD), rtol=0, atol=0)
            torch.testing.assert_close(read.mlp_out, decode(block.mlp_out_NLD), rtol=0, atol=0)
            assert torch.equal(read.document_ids, block.document_ids_N)
            assert torch.equal(read.positions, block.positions_N)
            start += rows
        # Holes between blocks are fill values for whoever opens the store as zarr.
        filled = np.zeros(arrays["document_ids"].shape[0], dtype=bool)
        for first, rows in begun.blocks:
            filled[first : first + rows] = True
        assert (arrays["document_ids"][:][~filled] == -1).all()
        assert (arrays["mlp_out"][:][~filled] == 0).all()
        assert arrays["mlp_in"].attrs["logical_dtype"] == shape["dtype"].value


@settings(deadline=None, max_examples=15)
@given(shape=SHAPES, chunks=st.integers(1, 3), rows=st.integers(1, 40), data=st.data())
def test_the_reader_reads_what_zarr_writes(shape: dict, chunks: int, rows: int, data: st.DataObject) -> None:
    """zarr lays the chunks of a shard out in another order than the writer: the index decides."""
    with TemporaryDirectory(dir=MEMORY) as folder:
        begun = manifest(**shape, shard_rows=chunks * shape["chunk_rows"])
        create_zarr(Path(folder), begun.layout)
        expected = random_rows(rows, begun, seed=3)
        group = zarr.open_group(folder, mode="r+")
        # A block's rows; the arrays are as long as whole chunks, as a chunk on disk is.
        whole = -(-rows // begun.chunk_rows) * begun.chunk_rows
        columns = {
            "mlp_in": stored_bits(expected.mlp_in_NLD.values),
            "mlp_out": stored_bits(expected.mlp_out_NLD.values),
            "token_ids": expected.token_ids_N.numpy(),
            "document_ids": expected.document_ids_N.numpy(),
            "positions": expected.positions_N.numpy(),
        }
        for name, x in (("mlp_in", expected.mlp_in_NLD), ("mlp_out", expected.mlp_out_NLD)):
            if x.scale is not None:
                columns[f"{name}_scale"] = x.scale.numpy()
        with zarr.config.set({"array.write_empty_chunks": True}):
            for name, values in columns.items():
                array = zarr.open_array(f"{folder}/{name}", mode="r+", config={"write_empty_chunks": True})
                array.resize((whole, *array.shape[1:]))
                array[:rows] = values
        assert set(columns) < set(group.array_keys())
        store = ActivationStore(Path(folder), begun, [(0, rows)])
        start = data.draw(st.integers(0, rows))
        stop = data.draw(st.integers(start, rows))
        layers = data.draw(st.lists(st.sampled_from(begun.layers), min_size=1, unique=True))
        read = store.read_rows(start, stop, layers=layers)
        torch.testing.assert_close(read.mlp_in, decode(expected.mlp_in_NLD[start:stop, layers]), rtol=0, atol=0)
        torch.testing.assert_close(read.mlp_out, decode(expected.mlp_out_NLD[start:stop, layers]), rtol=0, atol=0)
        assert torch.equal(read.token_ids, expected.token_ids_N[start:stop])


def test_bfloat16_bits_are_exact() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, 3.140625, 1e38, -1e-38, float("inf"), 5e-40]).bfloat16()
    assert torch.equal(from_bits(stored_bits(x), StoreDtype.bfloat16).view(torch.int16), x.view(torch.int16))


def test_layers_are_named_by_their_number_in_the_subject(tmp_path: Path) -> None:
    begun = manifest(first_layer=4)
    rows = random_rows(20, begun, 0)
    store = write_store(tmp_path, begun, [rows])
    assert store.layers == (4, 5, 6)
    assert torch.equal(store.read_rows(3, 9, layers=[6]).mlp_in, decode(rows.mlp_in_NLD[3:9, 2:]))
    with pytest.raises(ValueError, match=r"has layers \[4, 5, 6\], not \[0\]"):
        store.read_rows(0, 1, layers=[0])
    with pytest.raises(IndexError, match="store of 20 rows"):
        store.read_rows(0, 21)
    assert "20 rows" in repr(store)
    assert "layers 4-6" in repr(store)


def test_a_window_that_was_left_is_written_again_to_the_same_bytes(tmp_path: Path) -> None:
    """Shards of a worker that was killed before its commit stay, and the next one takes over what is there."""
    begun = manifest()
    blocks = [random_rows(30, begun, seed) for seed in range(3)]
    write_store(tmp_path / "plain", manifest(), blocks)
    folder = tmp_path / "stopped"
    begun.save(folder)
    assert write_window(folder, begun, blocks[1], 1, 36)
    (folder / "commits" / "00000001.json").unlink()
    (folder / "mlp_out" / "c" / "4" / "0" / "0").unlink()
    write_store(folder, begun, blocks)
    assert tree(folder) == tree(tmp_path / "plain")


@pytest.mark.parametrize("name", ["mlp_in", "norms"])
def test_a_window_written_by_two_is_whole_whoever_commits(tmp_path: Path, name: str) -> None:
    """Two machines that round differently: the one that loses a shard takes the other's, in its sums too."""
    begun, other = manifest(dtype=StoreDtype.float32), manifest(dtype=StoreDtype.float32)
    rows = random_rows(30, begun, 0)
    nearly = replace(rows, mlp_in_NLD=encode(rows.mlp_in_NLD.values * 1.001, StoreDtype.float32))
    write_store(tmp_path / "other", other, [nearly])
    folder = tmp_path / "store"
    begun.save(folder)
    key = begun.layout.activations("mlp_in").shard_key(1) if name == "mlp_in" else "norms/c/1/0/0"
    (folder / key).parent.mkdir(parents=True)
    (folder / key).write_bytes((tmp_path / "other" / key).read_bytes())
    store = write_store(folder, begun, [rows])
    assert verify_store(folder).ok
    assert not write_window(folder, begun, nearly, 0, 0)
    assert verify_store(folder).ok
    expected = nearly if name == "mlp_in" else rows
    assert torch.equal(store[12:24].mlp_in, decode(expected.mlp_in_NLD[12:24]))
    x = store[:].mlp_in.double()[store.used_rows()]
    torch.testing.assert_close(store.statistics().in_mean_LD, x.mean(0), rtol=1e-9, atol=1e-11)


def test_shards_of_other_rows_are_refused(tmp_path: Path) -> None:
    begun = manifest()
    begun.save(tmp_path)
    assert write_window(tmp_path, begun, random_rows(30, begun, 0), 0, 0)
    with pytest.raises(UserError, match=r"token_ids/c/0 holds rows of another text or config.*delete this store"):
        write_window(tmp_path, begun, random_rows(30, begun, 1), 1, 0)


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    begun = manifest()
    store = write_store(tmp_path, begun, [random_rows(30, begun, 0)])
    shard = tmp_path / "mlp_out" / "c" / "1" / "0" / "0"
    assert set(next(iter(read_commits(tmp_path))).files) >= {"mlp_out/c/1/0/0"}
    whole = shard.read_bytes()
    for damage, reason in ((whole[:-1], "checksum of its index"), (whole[:20], "cut short")):
        shard.write_bytes(damage)
        with pytest.raises(
            DamagedShardError, match=rf"mlp_out/c/1/0/0 is damaged \(.*{reason}.*layerloom store verify"
        ):
            store.read_rows(10, 20)
        assert store.read_rows(0, 12).mlp_in.shape == (12, 3, 5)
    # The end of the file, with its index, moved forward over lost chunks.
    shard.write_bytes(whole[40:])
    with pytest.raises(DamagedShardError, match="cut short"):
        store.read_rows(10, 20)
    shard.unlink()
    with pytest.raises(DamagedShardError, match="missing"):
        store.read_rows(10, 20)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a store by its relative name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
