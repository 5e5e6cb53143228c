"""Writes windows of activation rows: whole shards first, in the window's shuffled order, the commit last.

Letters: N rows, R rows of an inner chunk, L layers, D d_model.
"""

import os
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_store.codec import Encoded, decode, from_bits, stored_bits
from activation_store.errors import UserError, os_error_line
from activation_store.layout import StoreLayout
from activation_store.manifest import Commit, CommittedDocument, StoreManifest
from activation_store.places import Place
from activation_store.progress import human_bytes
from activation_store.shard_writer import adopt_shard, write_shard
from activation_store.shards import ShardRecord
from activation_store.statistics import RowSums, eligible_rows, sum_chunk
from activation_store.storage import Storage
from activation_store.windows import WindowRecord

IntRows = np.ndarray[Any, np.dtype[np.int64]]
_IDS = ("token_ids", "document_ids", "pieces", "positions")


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows as they go to disk: activations (N, L, D) as encoded, on the CPU, and what they belong to (N,)."""

    mlp_in_NLD: Encoded
    mlp_out_NLD: Encoded
    token_ids_N: Tensor
    document_ids_N: Tensor
    positions_N: Tensor
    pieces_N: Tensor

    def __len__(self) -> int:
        return len(self.token_ids_N)


class WindowRows:
    """The rows of a window in the order in which they were computed, in memory or in a scratch file.

    A scratch file has no name: it is gone with its process, however that ends.
    """

    def __init__(self, layout: StoreLayout, capacity: int, scratch: str = "") -> None:
        """Room for `capacity` rows. Raises UserError if the disk of the folder `scratch` (empty: memory) has none."""
        self.columns: dict[str, np.ndarray[Any, Any]] = {}
        for array in layout.arrays():
            if array.name == "norms":
                continue
            shape = (capacity, *array.row_shape)
            if scratch and array.per_layer:
                self.columns[array.name] = _mapped(Path(scratch), array.dtype, shape)
            else:
                self.columns[array.name] = np.empty(shape, dtype=array.dtype)
        self.filled = 0

    def append(self, rows: StoredRows) -> None:
        """Adds rows behind those that are there."""
        stop = self.filled + len(rows)
        ids = (rows.token_ids_N, rows.document_ids_N, rows.pieces_N, rows.positions_N)
        values = {name: column.numpy() for name, column in zip(_IDS, ids, strict=True)}
        for name, encoded in (("mlp_in", rows.mlp_in_NLD), ("mlp_out", rows.mlp_out_NLD)):
            values[name] = stored_bits(encoded.values)
            if encoded.scale is not None:
                values[f"{name}_scale"] = encoded.scale.numpy()
        for name, column in self.columns.items():
            column[self.filled : stop] = values[name]
        self.filled = stop


def _mapped(folder: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """An array in a file without a name. Its bytes are taken now: a disk that fills later would end the process."""
    size = prod(shape) * dtype.itemsize
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(1, size))
            return np.memmap(file, dtype=dtype, mode="r+", shape=shape)
    except OSError as error:
        raise UserError(
            f"store.scratch={folder} has no room for a window ({os_error_line(error)}; {human_bytes(size)} more are "
            "wanted); give another folder, or a smaller store.window_bytes with a new store.path"
        ) from error


class WindowWriter:
    """Writes the shards of windows and commits them. Not thread-safe; any number of writers may share a store.

    A window begins at a shard boundary and owns its shards, which count for nothing before the commit. Files are
    created and never changed: of two workers that write the same window (one was taken for dead), the first to create a
    shard decides its bytes and the other takes them over, so that both would commit the same checksums; on equal
    hardware the bytes are equal anyway.
    """

    def __init__(self, folder: Place, storage: Storage, manifest: StoreManifest) -> None:
        self._folder, self._storage, self.layout = folder, storage, manifest.layout
        self._special_ids = manifest.special_token_ids
        # One shard of every array, as it lies on disk.
        self._buffers = {a.name: np.empty(a.buffer_shape, dtype=a.dtype) for a in self.layout.arrays()}

    def write(self, rows: WindowRows, order: IntRows, record: WindowRecord, names: dict[int, str]) -> bool:
        """Writes and commits a window; False if somebody else's commit of it was first.

        `order`: which of `rows` comes first, second, ... Raises OSError (such as ENOSPC) from the disk; the window is
        then not committed.
        """
        files: dict[str, ShardRecord] = {}
        sums = RowSums.zeros(self.layout.n_layers, self.layout.d_model)
        first = record.start_row // self.layout.shard_rows
        for number in range(self.layout.shards_of(len(order))):
            start = number * self.layout.shard_rows
            taken = order[start : start + self.layout.shard_rows]
            self._gather(rows, taken)
            sums.add(self._write_shard(first + number, len(taken), files))
        indices, counts = np.unique(rows.columns["document_ids"][: rows.filled], return_counts=True)
        commit = Commit(
            window=record.window,
            first_block=record.block,
            first_context=record.context,
            contexts=record.contexts,
            start_row=record.start_row,
            rows=len(order),
            documents=[
                CommittedDocument(int(index), names[int(index)], int(count))
                for index, count in zip(indices, counts, strict=True)
            ],
            files=files,
            sums=sums,
        )
        return commit.create(self._folder)

    def _gather(self, rows: WindowRows, taken: IntRows) -> None:
        """Copies rows into the shard's buffers; what follows the last one in its chunk is made fill values."""
        chunk_rows = self.layout.chunk_rows
        for array in self.layout.arrays():
            if array.name == "norms":
                continue
            column, buffer = rows.columns[array.name], self._buffers[array.name]
            for chunk, start in enumerate(range(0, len(taken), chunk_rows)):
                values = column[taken[start : start + chunk_rows]]
                if array.per_layer:
                    # A chunk holds the rows of one layer together.
                    buffer[chunk, :, : len(values)] = values.swapaxes(0, 1)
                else:
                    buffer[chunk, 0, : len(values)] = values
                buffer[chunk, :, len(values) :] = array.fill

    def _write_shard(self, shard: int, filled: int, files: dict[str, ShardRecord]) -> RowSums:
        """Writes one shard of every array from the buffers, adds them to `files`, and returns their rows' sums."""
        row_chunks = -(-filled // self.layout.chunk_rows)
        arrays = {array.name: array for array in self.layout.arrays()}
        for name in arrays:
            if name != "norms" and name not in _IDS:
                self._settle(name, shard, row_chunks, files)
        sums = self._summarise(row_chunks, filled)
        # Function of the two that were settled; where another machine rounded another way, its norms stay.
        self._settle("norms", shard, row_chunks, files)
        for name in _IDS:
            written = write_shard(self._storage, arrays[name], shard, self._buffers[name], row_chunks)
            if written.other:
                raise UserError(
                    f"store {self._folder}: {arrays[name].shard_key(shard)} holds rows of another text or config; give "
                    "another store.path, or delete this store"
                )
            files[arrays[name].shard_key(shard)] = written.record
        return sums

    def _settle(self, name: str, shard: int, row_chunks: int, files: dict[str, ShardRecord]) -> None:
        """Writes a shard of computed values; if other values were there before, they go into the buffer."""
        array = next(array for array in self.layout.arrays() if array.name == name)
        written = write_shard(self._storage, array, shard, self._buffers[name], row_chunks)
        if written.other:
            adopt_shard(self._folder, array, shard, self._buffers[name], row_chunks)
        files[array.shard_key(shard)] = written.record

    def _summarise(self, row_chunks: int, filled: int) -> RowSums:
        """Fills the shard's norms and returns its sums over the eligible rows."""
        sums = RowSums.zeros(self.layout.n_layers, self.layout.d_model)
        buffers = self._buffers
        for chunk in range(row_chunks):
            real = min(self.layout.chunk_rows, filled - chunk * self.layout.chunk_rows)
            eligible = eligible_rows(buffers["token_ids"][chunk, 0], buffers["positions"][chunk, 0], self._special_ids)
            eligible[real:] = False
            weight_R = torch.from_numpy(eligible.astype(np.float64))
            in_norms_RL = sum_chunk(self._decoded("mlp_in", chunk), weight_R, (sums.in_sum_LD, sums.in_square_sum_LD))
            out_norms_RL = sum_chunk(
                self._decoded("mlp_out", chunk), weight_R, (sums.out_sum_LD, sums.out_square_sum_LD)
            )
            norms_RL2 = torch.stack([in_norms_RL, out_norms_RL], dim=2).float()
            buffers["norms"][chunk, 0] = norms_RL2.numpy()
            sums.norm_sum_L2 += torch.einsum("r,rlt->lt", weight_R, norms_RL2.double())
            sums.count += int(eligible.sum())
        return sums

    def _decoded(self, name: str, chunk: int) -> Tensor:
        """One chunk of all layers (L, R, D) as a reader will see it; the values themselves where they have no scale."""
        values = from_bits(self._buffers[name][chunk], self.layout.dtype)
        if self.layout.scale(name) is None:
            return values
        return decode(Encoded(values, torch.from_numpy(self._buffers[f"{name}_scale"][chunk])))
