"""Stores of random rows, written by the real writer, for tests of what reads them."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from activation_store.codec import encode
from activation_store.config import Compression, StoreDtype
from activation_store.layout import create_zarr
from activation_store.manifest import COMPLETE, StoreManifest, read_commits
from activation_store.storage import LocalStorage
from activation_store.store import ActivationStore
from activation_store.windows import WindowRecord
from activation_store.writer import StoredRows, WindowRows, WindowWriter

SPECIAL_IDS = (0, 1, 2)


def manifest(
    *,
    n_layers: int = 3,
    d_model: int = 5,
    dtype: StoreDtype = StoreDtype.float16,
    compression: Compression = Compression.none,
    chunk_rows: int = 4,
    shard_rows: int = 12,
    first_layer: int = 0,
    outlier_factor: float = 20.0,
) -> StoreManifest:
    """A manifest as a harvest would begin it."""
    return StoreManifest(
        subject={"path": "random", "architecture": "none", "dtype": "float32", "provenance": "random numbers"},
        bos_token_id=1,
        special_token_ids=list(SPECIAL_IDS),
        input_hook="resid_mid",
        layers=list(range(first_layer, first_layer + n_layers)),
        d_model=d_model,
        dtype=dtype,
        compression=compression,
        config={},
        text={"path": "random", "context_length": 8, "seed": 0},
        chunk_rows=chunk_rows,
        shard_rows=shard_rows,
        outlier_factor=outlier_factor,
        provenance={},
    )  # fmt: skip


def random_rows(n_rows: int, begun: StoreManifest, seed: int, *, outliers: int = 0) -> StoredRows:
    """Rows of pieces of 8 tokens with some special tokens; `outliers` rows have one layer's norm far above the rest."""
    rng = np.random.default_rng(seed)
    shape = (n_rows, len(begun.layers), begun.d_model)
    x, y = rng.normal(1.0, 2.0, shape), rng.normal(-0.5, 0.3, shape)
    for row in rng.permutation(n_rows)[:outliers]:
        (x if row % 2 else y)[row, rng.integers(shape[1])] *= 400.0
    return StoredRows(
        encode(torch.from_numpy(x), begun.dtype),
        encode(torch.from_numpy(y), begun.dtype),
        torch.from_numpy(rng.integers(0, 30, n_rows)),
        torch.from_numpy(np.arange(n_rows) // 16 + 100 * seed),
        torch.from_numpy(np.arange(n_rows) % 8),
        torch.from_numpy(np.arange(n_rows) // 8 % 2),
    )


def write_store(folder: Path, begun: StoreManifest, blocks: list[StoredRows], *, pieces: int = 7) -> ActivationStore:
    """A complete store with a window of each of `blocks`, in its order, appended `pieces` rows at a time."""
    begun.save(folder)
    start_row = 0
    for number, rows in enumerate(blocks):
        assert write_window(folder, begun, rows, number, start_row, pieces=pieces)
        start_row += begun.layout.shards_of(len(rows)) * begun.shard_rows
    complete(folder, begun)
    return ActivationStore.open(folder)


def write_window(
    folder: Path, begun: StoreManifest, rows: StoredRows, number: int, start_row: int, *, pieces: int = 7
) -> bool:
    """Writes and commits a window, its rows in their order."""
    window = WindowRows(begun.layout, len(rows))
    append(window, rows, pieces)
    names = {int(index): f"document {index}" for index in rows.document_ids_N.unique()}
    record = WindowRecord(
        window=number, block=number, context=0, contexts=1, next_block=number + 1, next_context=0,
        start_row=start_row, rows=len(rows), rows_before=0, last=False,
    )  # fmt: skip
    writer = WindowWriter(folder, LocalStorage(folder), begun)
    return writer.write(window, np.arange(len(rows)), record, names)


def append(window: WindowRows, rows: StoredRows, pieces: int) -> None:
    for start in range(0, len(rows), pieces):
        part = slice(start, start + pieces)
        window.append(StoredRows(*(getattr(rows, field.name)[part] for field in fields(StoredRows))))


def complete(folder: Path, begun: StoreManifest) -> None:
    begun.blocks = [[commit.start_row, commit.rows] for commit in read_commits(folder)]
    begun.rows = sum(rows for _, rows in begun.blocks)
    store = ActivationStore(folder, begun, [(start, rows) for start, rows in begun.blocks])
    begun.statistics, begun.outlier_rows = store.compute_statistics()
    begun.status = COMPLETE
    create_zarr(folder, begun.layout, sum(begun.blocks[-1]) if begun.blocks else 0)
    begun.save(folder)
