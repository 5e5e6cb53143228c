"""Writes blocks of activation rows: whole shards first, the commit last.

Letters: N rows, R rows of an inner chunk, L layers, D d_model.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_store.errors import UserError
from activation_store.layout import create_zarr, from_bits, grow_zarr, stored_bits
from activation_store.manifest import Commit, CommittedDocument, StoreManifest, read_commits
from activation_store.shards import ShardRecord, sync_shards, write_shard
from activation_store.statistics import RowSums, eligible_rows, sum_chunk


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows as they go to disk: activations (N, L, D) in the store's dtype on the CPU, and what they belong to (N,)."""

    mlp_in_NLD: Tensor
    mlp_out_NLD: Tensor
    token_ids_N: Tensor
    document_ids_N: Tensor
    positions_N: Tensor

    def __len__(self) -> int:
        return len(self.token_ids_N)


class ActivationWriter:
    """Appends rows to the current block of a store and commits it.

    A block begins at a shard boundary and owns its shards. Shards are written when they are full; until the commit they
    count for nothing, and a writer that starts on the folder later removes them. So a kill at any point costs the block
    that was being written, and what was committed never changes. One writer per store at a time.
    """

    def __init__(self, folder: Path, manifest: StoreManifest) -> None:
        """Opens the folder of `manifest` for writing, after its last commit; removes what was not committed."""
        self.folder, self.layout = folder, manifest.layout
        self._special_ids = manifest.special_token_ids
        # One shard of every array, as it lies on disk.
        self._buffers = {a.name: np.empty(a.buffer_shape, dtype=a.dtype) for a in self.layout.arrays()}
        self.rows = self.next_block = self._end_row = 0
        for commit in read_commits(folder):
            self.rows += commit.rows
            self.next_block = commit.block + 1
            self._end_row = commit.start_row + self.layout.shards_of(commit.rows) * self.layout.shard_rows
        create_zarr(folder, self.layout)
        self.discard_block()

    def append(self, rows: StoredRows) -> None:
        """Adds rows to the current block. Raises OSError (such as ENOSPC) from the disk."""
        start = 0
        while start < len(rows):
            take = min(len(rows) - start, self.layout.shard_rows - self._filled)
            self._fill(rows, start, start + take)
            start += take
            if self._filled == self.layout.shard_rows:
                self._flush_shard()

    def commit(self, documents: list[tuple[int, str]]) -> Commit:
        """Makes the current block part of the store. `documents`: index and name of every document of the block."""
        if self._filled:
            self._flush_shard()
        commit = Commit(
            block=self.next_block,
            start_row=self._end_row,
            rows=self._block_rows,
            documents=[CommittedDocument(index, name, self._document_rows.get(index, 0)) for index, name in documents],
            files=self._files,
            sums=self._sums,
        )
        # The arrays end with the last block's last row. Growing them is metadata; a kill in between is harmless.
        if commit.rows:
            grow_zarr(self.folder, self.layout, commit.start_row + commit.rows)
        sync_shards(self.folder, commit.files)
        if not commit.create(self.folder):
            raise UserError(f"store {self.folder}: block {commit.block} was committed by another process; start again")
        self.rows += commit.rows
        self.next_block += 1
        self._end_row += self.layout.shards_of(commit.rows) * self.layout.shard_rows
        self._start_block()
        return commit

    def discard_block(self) -> None:
        """Removes every file of rows that are not committed: finished shards and partial files."""
        first_free = self._end_row // self.layout.shard_rows
        for array in self.layout.arrays():
            chunks = self.folder / array.name / "c"
            for shard in chunks.iterdir() if chunks.is_dir() else ():
                if not shard.name.isdecimal() or int(shard.name) >= first_free:
                    _remove(shard)
        for folder in (self.folder, self.folder / "commits", *(self.folder / a.name for a in self.layout.arrays())):
            for partial in folder.glob("*.partial") if folder.is_dir() else ():
                partial.unlink()
        self._start_block()

    def _start_block(self) -> None:
        self._sums = RowSums.zeros(self.layout.n_layers, self.layout.d_model)
        self._files: dict[str, ShardRecord] = {}
        self._document_rows: dict[int, int] = {}
        self._block_rows = self._filled = 0

    def _fill(self, rows: StoredRows, start: int, stop: int) -> None:
        """Copies rows [start, stop) behind those that the shard has."""
        columns: dict[str, np.ndarray[Any, Any]] = {
            "mlp_in": stored_bits(rows.mlp_in_NLD),
            "mlp_out": stored_bits(rows.mlp_out_NLD),
            "token_ids": rows.token_ids_N.numpy()[:, None],
            "document_ids": rows.document_ids_N.numpy()[:, None],
            "positions": rows.positions_N.numpy()[:, None],
        }
        chunk_rows = self.layout.chunk_rows
        while start < stop:
            chunk, row = divmod(self._filled, chunk_rows)
            take = min(stop - start, chunk_rows - row)
            for name, values in columns.items():
                # (rows, abreast, ...) to (abreast, rows, ...): a chunk holds the rows of one layer together.
                self._buffers[name][chunk, :, row : row + take] = np.swapaxes(values[start : start + take], 0, 1)
            start += take
            self._filled += take

    def _flush_shard(self) -> None:
        row_chunks = -(-self._filled // self.layout.chunk_rows)
        if rows := self._filled % self.layout.chunk_rows:
            # The buffers are used again and again: what follows the last row is made fill values.
            for array in self.layout.arrays():
                self._buffers[array.name][row_chunks - 1, :, rows:] = array.fill
        self._count_documents()
        self._sums.add(self._summarise(row_chunks))
        shard = self._end_row // self.layout.shard_rows + self._block_rows // self.layout.shard_rows
        for array in self.layout.arrays():
            record = write_shard(self.folder, array, shard, self._buffers[array.name], row_chunks)
            self._files[array.shard_key(shard)] = record
        self._block_rows += self._filled
        self._filled = 0

    def _count_documents(self) -> None:
        ids = self._buffers["document_ids"].reshape(-1)[: self._filled]
        for index, count in zip(*np.unique(ids, return_counts=True), strict=True):
            self._document_rows[int(index)] = self._document_rows.get(int(index), 0) + int(count)

    def _summarise(self, row_chunks: int) -> RowSums:
        """Fills the shard's norms and returns its sums over the eligible rows."""
        sums = RowSums.zeros(self.layout.n_layers, self.layout.d_model)
        buffers = self._buffers
        for chunk in range(row_chunks):
            real = min(self.layout.chunk_rows, self._filled - chunk * self.layout.chunk_rows)
            eligible = eligible_rows(buffers["token_ids"][chunk, 0], buffers["positions"][chunk, 0], self._special_ids)
            eligible[real:] = False
            weight_R = torch.from_numpy(eligible.astype(np.float64))
            mlp_in_LRD = from_bits(buffers["mlp_in"][chunk], self.layout.dtype)
            mlp_out_LRD = from_bits(buffers["mlp_out"][chunk], self.layout.dtype)
            in_norms_RL = sum_chunk(mlp_in_LRD, weight_R, (sums.in_sum_LD, sums.in_square_sum_LD))
            out_norms_RL = sum_chunk(mlp_out_LRD, weight_R, (sums.out_sum_LD, sums.out_square_sum_LD))
            norms_RL2 = torch.stack([in_norms_RL, out_norms_RL], dim=2).float()
            buffers["norms"][chunk, 0] = norms_RL2.numpy()
            sums.norm_sum_L2 += torch.einsum("r,rlt->lt", weight_R, norms_RL2.double())
            sums.count += int(eligible.sum())
        return sums


def _remove(path: Path) -> None:
    """Removes a file or a folder of files."""
    if path.is_dir():
        for folder, _, files in os.walk(path, topdown=False):
            for name in files:
                (Path(folder) / name).unlink()
            Path(folder).rmdir()
    else:
        path.unlink()
