"""How fast a store is written and read, against what the disk and the page cache give without it.

    python -m benchmarks.store --gb 8 --threads 2 --folder DIR

A store of random float16 activations with SmolLM2-135M's layout (30 layers of width 576) is written and read back: as
shuffled batches, as a plain numpy memory map in order, and as shuffled blocks through `zarr.Array`, with equally many
threads; from the page cache and cold (`posix_fadvise(DONTNEED)`), as stored and decoded to float32. The memory map is
copied (or decoded) into memory of 2,048 rows that is used again. Rates are of stored bytes. Kinds alternate; a ratio is
the median of those of the rounds. Needs the store's size twice in `--folder`, and, to read from the page cache, once in
memory. `--keep DIR --parts ...` measures in several calls.
"""

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median

import numpy as np
import torch
import zarr

from activation_store.codec import encode
from activation_store.config import StoreDtype
from activation_store.layout import create_zarr
from activation_store.manifest import COMPLETE, StoreManifest, read_commits
from activation_store.shuffle import ShuffledBatches
from activation_store.storage import LocalStorage
from activation_store.store import ActivationStore
from activation_store.windows import WindowRecord
from activation_store.writer import StoredRows, WindowRows, WindowWriter
from benchmarks.measure import command, machine

LAYERS, WIDTH, CHUNK_ROWS, SHARD_ROWS = 30, 576, 256, 2_048
# About the default store.window_bytes.
WINDOW_ROWS = 7 * SHARD_ROWS
PARTS = ("write", "cache", "cold")
# Stored bytes per second, decoded or not; the second argument is called just before the clock starts.
Rate = Callable[[bool, Callable[[], None]], float]


def begun_manifest() -> StoreManifest:
    """What a harvest would have begun."""
    return StoreManifest(
        subject={"path": "random", "architecture": "none", "dtype": "float32", "provenance": "random numbers"},
        bos_token_id=None,
        special_token_ids=[],
        input_hook="resid_mid",
        layers=list(range(LAYERS)),
        d_model=WIDTH,
        dtype=StoreDtype.float16,
        config={},
        text={"path": "random", "context_length": 256, "seed": 0},
        chunk_rows=CHUNK_ROWS,
        shard_rows=SHARD_ROWS,
        outlier_factor=20.0,
        provenance={},
    )


def window_rows(manifest: StoreManifest) -> WindowRows:
    """Random rows, of contexts of 256 tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = WindowRows(manifest.layout, WINDOW_ROWS)
    for start in range(0, WINDOW_ROWS, CHUNK_ROWS):
        x, y = (encode(torch.randn(CHUNK_ROWS, LAYERS, WIDTH, generator=generator), manifest.dtype) for _ in "xy")
        ids = torch.arange(start, start + CHUNK_ROWS)
        rows.append(StoredRows(x, y, ids, ids // 1_024, ids % 256, ids // 256))
    return rows


def write_store(folder: Path, n_windows: int, between: Callable[[int], None]) -> float:
    """Makes a store; returns the bytes per second at which its windows were shuffled, written and committed.

    `between` is called before each window, with its bytes, and its time not counted.
    """
    manifest = begun_manifest()
    manifest.save(folder)
    rows, order = window_rows(manifest), np.random.default_rng(0).permutation(WINDOW_ROWS)
    writer = WindowWriter(folder, LocalStorage(folder), manifest)
    names = {int(index): "random" for index in np.unique(rows.columns["document_ids"])}
    window_bytes, seconds = WINDOW_ROWS * manifest.layout.row_bytes, 0.0
    for number in range(n_windows):
        between(window_bytes)
        record = WindowRecord(
            window=number, block=number, context=0, contexts=WINDOW_ROWS // 256, next_block=number + 1,
            next_context=0, start_row=number * WINDOW_ROWS, rows=WINDOW_ROWS, rows_before=number * WINDOW_ROWS,
            last=number == n_windows - 1,
        )  # fmt: skip
        started = time.perf_counter()
        writer.write(rows, order, record, names)
        seconds += time.perf_counter() - started
    manifest.blocks = [[commit.start_row, commit.rows] for commit in read_commits(folder)]
    manifest.rows = n_windows * WINDOW_ROWS
    store = ActivationStore(folder, manifest, [(start, rows) for start, rows in manifest.blocks])
    manifest.statistics, manifest.outlier_rows = store.compute_statistics()
    store.used.save(folder)
    create_zarr(folder, manifest.layout, manifest.rows)
    manifest.status = COMPLETE
    manifest.save(folder)
    return n_windows * window_bytes / seconds


class PlainWrite:
    """Bytes appended to one file, a shard of a window at a time, with an fsync for each."""

    def __init__(self, path: Path) -> None:
        self._path, self.bytes, self.seconds = path, 0, 0.0
        row_bytes = begun_manifest().layout.row_bytes
        self._data = np.random.default_rng(0).integers(0, 255, SHARD_ROWS * row_bytes, dtype=np.uint8).data

    def append(self, size: int) -> None:
        """Adds so many bytes, whole shards."""
        started = time.perf_counter()
        with open(self._path, "ab", buffering=0) as file:
            for _ in range(size // len(self._data)):
                view = self._data
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
        self.seconds += time.perf_counter() - started
        self.bytes += size


def shuffled(store: ActivationStore, batch: int, threads: int) -> Rate:
    """The reader, measured when its pool is full; it is as full at the end."""

    def rate(decoded: bool, prepare: Callable[[], None]) -> float:
        total = store.used.count // batch
        # Until all memory was used once.
        warm = 2 + 2 * 16_384 // batch
        with ShuffledBatches(store, batch_size_tokens=batch, threads=threads, decoded=decoded) as batches:
            for _ in range(warm):
                next(batches)
            prepare()
            started = time.perf_counter()
            for _ in range(total):
                next(batches)
            seconds = time.perf_counter() - started
        return total * batch * activation_bytes() / seconds

    return rate


def activation_bytes() -> int:
    """Of a row in `mlp_in` and `mlp_out`."""
    return 2 * LAYERS * WIDTH * 2


def in_threads(work: Callable[[Path | int], int], items: Iterable[Path | int], threads: int) -> float:
    """Bytes per second of doing `work`, which returns bytes, on all items."""
    with ThreadPoolExecutor(threads) as executor:
        started = time.perf_counter()
        done = sum(executor.map(work, items))
        return done / (time.perf_counter() - started)


def memory_map(store: ActivationStore, threads: int) -> Rate:
    """The same bytes in order: each shard's chunks through `np.memmap`, into memory that each thread uses again."""
    values = SHARD_ROWS * LAYERS * WIDTH
    buffers = {dtype: [np.zeros(values, dtype=dtype) for _ in range(threads)] for dtype in (np.float16, np.float32)}

    def rate(decoded: bool, prepare: Callable[[], None]) -> float:
        free = list(buffers[np.float32 if decoded else np.float16])

        def read(path: Path | int) -> int:
            buffer = free.pop()
            mapped = np.memmap(str(path), dtype=np.float16, mode="c", shape=(values,))
            if decoded:
                decode_flat(mapped, buffer)
            else:
                np.copyto(buffer, mapped)
            free.append(buffer)
            return values * 2

        prepare()
        files = [path for name in ("mlp_in", "mlp_out") for path in sorted(store.path.glob(f"{name}/c/*/0/0"))]
        return in_threads(read, files, threads)

    return rate


def decode_flat(values: np.ndarray, out: np.ndarray) -> None:
    """float16 to float32 with torch, on one thread; in one call, which is faster than in pieces."""
    torch.from_numpy(out).copy_(torch.from_numpy(values))


def zarr_blocks(store: ActivationStore, threads: int, share: float) -> Rate:
    """Shuffled blocks of a chunk's rows, all layers, through zarr.Array; a share of the store."""
    arrays = [zarr.open_array(str(store.path / name), mode="r") for name in ("mlp_in", "mlp_out")]

    def rate(decoded: bool, prepare: Callable[[], None]) -> float:
        def read(start: Path | int) -> int:
            assert isinstance(start, int)
            for array in arrays:
                block = np.asarray(array[start : start + CHUNK_ROWS])
                if decoded:
                    decode_flat(block.reshape(-1), np.empty(block.size, dtype=np.float32))
            return CHUNK_ROWS * activation_bytes()

        prepare()
        starts = np.random.default_rng(0).permutation(store.n_rows // CHUNK_ROWS) * CHUNK_ROWS
        wanted = starts[: max(threads, int(len(starts) * share))].tolist()
        with zarr.config.set({"threading.max_workers": threads, "async.concurrency": 2 * threads}):
            return in_threads(read, wanted, threads)

    return rate


def drop_cache(folder: Path) -> None:
    """Writes what is dirty and gives the pages of all files back."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def warm_cache(folder: Path) -> None:
    """Reads all files once."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def prepare(folder: Path, *, cold: bool) -> None:
    """Before the clock starts, whatever is measured."""
    (drop_cache if cold else warm_cache)(folder)
    # As timeit: what earlier rounds left would be looked through in this one, a quarter of a second.
    gc.collect()


def measure(store: ActivationStore, arguments: argparse.Namespace, *, cold: bool, decoded: bool) -> str:
    """A row of the table."""
    kinds = {
        "shuffled": shuffled(store, arguments.batch, arguments.threads),
        "map": memory_map(store, arguments.threads),
        "zarr": zarr_blocks(store, arguments.threads, arguments.zarr_share),
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(arguments.rounds):
        for name, rate in kinds.items():
            rates[name].append(rate(decoded, partial(prepare, store.path, cold=cold)))
    ratios = {
        name: median(a / b for a, b in zip(rates["shuffled"], rates[name], strict=True)) for name in ("map", "zarr")
    }
    shown = [f"{median(rates[name]) / 1e9:.2f}" for name in kinds]
    where, what = "cold" if cold else "page cache", "float32" if decoded else "as stored"
    return f"| {where} | {what} | {' | '.join(shown)} | {ratios['map']:.2f} | {ratios['zarr']:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=8.0, help="size of the store")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2_048, help="rows of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--zarr-share", type=float, default=0.25, help="share of the store that zarr reads")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--keep", type=Path, help="folder of a store that is made if it is not there, and stays")
    parser.add_argument("--folder", type=Path, help="where else the store is made and removed; default: temporary")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    n_windows = max(2, ceil(arguments.gb * 1e9 / (WINDOW_ROWS * begun_manifest().layout.row_bytes)))
    print(f"    {command('benchmarks.store')}\n\n{machine(torch.device('cpu'))}.\n")
    folder = arguments.keep or Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        if "write" in arguments.parts or not (folder / "store").is_dir():
            write_and_compare(folder, n_windows)
        store = ActivationStore.open(folder / "store")
        size = store.n_rows * store.layout.row_bytes / 1e9
        print(f"{store.n_rows:,} rows, {size:.1f} GB, {arguments.threads} threads, batches of {arguments.batch} rows\n")
        print("| from | values | shuffled GB/s | memory map GB/s | zarr GB/s | of memory map | of zarr |")
        print("|---|---|---|---|---|---|---|")
        for part in [part for part in arguments.parts if part != "write"]:
            for decoded in (False, True):
                print(measure(store, arguments, cold=part == "cold", decoded=decoded))
                sys.stdout.flush()
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


def write_and_compare(folder: Path, n_windows: int) -> None:
    """Writes the store, and plainly as many bytes before each of its windows."""
    shutil.rmtree(folder / "store", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    plain = PlainWrite(folder / "plain")
    rate = write_store(folder / "store", n_windows, plain.append)
    plain_rate = plain.bytes / plain.seconds
    (folder / "plain").unlink()
    print(
        f"writing: {rate / 1e9:.2f} GB/s; plain, before each window, {plain_rate / 1e9:.2f} GB/s; "
        f"ratio {rate / plain_rate:.2f}\n"
    )


if __name__ == "__main__":
    main()
