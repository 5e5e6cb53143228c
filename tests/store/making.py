"""Stores of random rows, written by the real writer, for tests of what reads them."""

from pathlib import Path

import numpy as np
import torch

from activation_store.config import Dtype
from activation_store.layout import to_stored
from activation_store.manifest import COMPLETE, StoreManifest, read_commits
from activation_store.store import ActivationStore
from activation_store.writer import ActivationWriter, StoredRows

SPECIAL_IDS = (0, 1, 2)


def manifest(
    *,
    n_layers: int = 3,
    d_model: int = 5,
    dtype: Dtype = Dtype.float16,
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
        to_stored(torch.from_numpy(x), begun.dtype),
        to_stored(torch.from_numpy(y), begun.dtype),
        torch.from_numpy(rng.integers(0, 30, n_rows)),
        torch.from_numpy(np.arange(n_rows) // 16 + 100 * seed),
        torch.from_numpy(np.arange(n_rows) % 8),
    )


def write_store(folder: Path, begun: StoreManifest, blocks: list[StoredRows], *, pieces: int = 7) -> ActivationStore:
    """A complete store of `blocks`, appended `pieces` rows at a time."""
    begun.save(folder)
    writer = ActivationWriter(folder, begun)
    for number, rows in enumerate(blocks):
        append(writer, rows, pieces)
        writer.commit([(int(index), f"document {index}") for index in rows.document_ids_N.unique()] or [(number, "")])
    complete(folder, begun)
    return ActivationStore.open(folder)


def append(writer: ActivationWriter, rows: StoredRows, pieces: int) -> None:
    for start in range(0, len(rows), pieces):
        part = slice(start, start + pieces)
        writer.append(
            StoredRows(
                rows.mlp_in_NLD[part],
                rows.mlp_out_NLD[part],
                rows.token_ids_N[part],
                rows.document_ids_N[part],
                rows.positions_N[part],
            )
        )


def complete(folder: Path, begun: StoreManifest) -> None:
    begun.blocks = [[commit.start_row, commit.rows] for commit in read_commits(folder)]
    begun.rows = sum(rows for _, rows in begun.blocks)
    store = ActivationStore(folder, begun, [(start, rows) for start, rows in begun.blocks])
    begun.statistics, begun.outlier_rows = store.compute_statistics()
    begun.status = COMPLETE
    begun.save(folder)
