"""Writes windows of activation rows: whole shards first, in the window's shuffled order, the commit last.

Letters: N rows, R rows of an inner chunk, L layers, D d_model.
"""

import os
import tempfile
from concurrent.futures import Executor, Future, ThreadPoolExecutor
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
from activation_store.shard_writer import ShardWrite, adopt_shard, write_shard
from activation_store.shards import ShardRecord
from activation_store.statistics import RowSums, eligible_rows, sum_chunk
from activation_store.storage import Storage
from activation_store.windows import WindowRecord

IntRows = np.ndarray[Any, np.dtype[np.int64]]
_IDS = ("token_ids", "document_ids", "pieces", "positions")
Buffers = dict[str, np.ndarray[Any, Any]]
# Shards in memory at once, and threads that write them.
_SHARDS, _WRITES = 2, 2


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
        # Shards of every array, as they lie on disk: one is filled while one is written.
        self._buffers = [
            {a.name: np.empty(a.buffer_shape, dtype=a.dtype) for a in self.layout.arrays()} for _ in range(_SHARDS)
        ]

    def write(self, rows: WindowRows, order: IntRows, record: WindowRecord, names: dict[int, str]) -> bool:
        """Writes and commits a window; False if somebody else's commit of it was first.

        `order`: which of `rows` comes first, second, ... Raises OSError (such as ENOSPC) from the disk; the window is
        then not committed.
        """
        files: dict[str, ShardRecord] = {}
        sums = RowSums.zeros(self.layout.n_layers, self.layout.d_model)
        first = record.start_row // self.layout.shard_rows
        writing: _Writing | None = None
        with ThreadPoolExecutor(_WRITES, thread_name_prefix="store-shards") as pool:
            for number in range(self.layout.shards_of(len(order))):
                start = number * self.layout.shard_rows
                taken = order[start : start + self.layout.shard_rows]
                begun = self._begin_shard(rows, taken, first + number, pool)
                if writing is not None:
                    sums.add(self._end_shard(writing, files))
                writing = begun
            if writing is not None:
                sums.add(self._end_shard(writing, files))
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

    def _begin_shard(self, rows: WindowRows, taken: IntRows, shard: int, pool: Executor) -> "_Writing":
        """Gathers a shard's rows, begins to write its computed values, and sums them up meanwhile."""
        buffers = self._buffers[shard % _SHARDS]
        self._gather(rows, taken, buffers)
        row_chunks = -(-len(taken) // self.layout.chunk_rows)
        writes = {
            array.name: pool.submit(write_shard, self._storage, array, shard, buffers[array.name], row_chunks)
            for array in self.layout.arrays()
            if array.name != "norms" and array.name not in _IDS
        }
        return _Writing(
            shard, row_chunks, len(taken), buffers, writes, self._summarise(buffers, row_chunks, len(taken))
        )

    def _gather(self, rows: WindowRows, taken: IntRows, buffers: Buffers) -> None:
        """Copies rows into the shard's buffers; what follows the last one in its chunk is made fill values."""
        chunk_rows = self.layout.chunk_rows
        for array in self.layout.arrays():
            if array.name == "norms":
                continue
            column, buffer = rows.columns[array.name], buffers[array.name]
            for chunk, start in enumerate(range(0, len(taken), chunk_rows)):
                values = column[taken[start : start + chunk_rows]]
                if array.per_layer:
                    # A chunk holds the rows of one layer together.
                    buffer[chunk, :, : len(values)] = values.swapaxes(0, 1)
                else:
                    buffer[chunk, 0, : len(values)] = values
                buffer[chunk, :, len(values) :] = array.fill

    def _end_shard(self, writing: "_Writing", files: dict[str, ShardRecord]) -> RowSums:
        """Waits for the values, writes the rest of the shard, adds all to `files`, and returns its rows' sums."""
        shard, row_chunks, sums = writing.shard, writing.row_chunks, writing.sums
        arrays = {array.name: array for array in self.layout.arrays()}
        others = [name for name, write in writing.writes.items() if self._settled(name, write.result(), writing, files)]
        if others:
            sums = self._summarise(writing.buffers, row_chunks, writing.filled)
        # Function of the values that were settled; where another machine rounded another way, its norms stay.
        for name in ("norms", *_IDS):
            written = write_shard(self._storage, arrays[name], shard, writing.buffers[name], row_chunks)
            if self._settled(name, written, writing, files) and name in _IDS:
                raise UserError(
                    f"store {self._folder}: {arrays[name].shard_key(shard)} holds rows of another text or config; give "
                    "another store.path, or delete this store"
                )
        return sums

    def _settled(self, name: str, written: ShardWrite, writing: "_Writing", files: dict[str, ShardRecord]) -> bool:
        """Adds a shard to `files`; if other values were there before, they go into the buffer, and it is True."""
        array = next(array for array in self.layout.arrays() if array.name == name)
        if written.other and name not in _IDS:
            adopt_shard(self._folder, array, writing.shard, writing.buffers[name], writing.row_chunks)
        files[array.shard_key(writing.shard)] = written.record
        return written.other

    def _summarise(self, buffers: Buffers, row_chunks: int, filled: int) -> RowSums:
        """Fills the shard's norms and returns its sums over the eligible rows."""
        sums = RowSums.zeros(self.layout.n_layers, self.layout.d_model)
        for chunk in range(row_chunks):
            real = min(self.layout.chunk_rows, filled - chunk * self.layout.chunk_rows)
            eligible = eligible_rows(buffers["token_ids"][chunk, 0], buffers["positions"][chunk, 0], self._special_ids)
            eligible[real:] = False
            weight_R = torch.from_numpy(eligible.astype(np.float64))
            in_norms_RL = sum_chunk(
                self._decoded(buffers, "mlp_in", chunk), weight_R, (sums.in_sum_LD, sums.in_square_sum_LD)
            )
            out_norms_RL = sum_chunk(
                self._decoded(buffers, "mlp_out", chunk), weight_R, (sums.out_sum_LD, sums.out_square_sum_LD)
            )
            norms_RL2 = torch.stack([in_norms_RL, out_norms_RL], dim=2).float()
            buffers["norms"][chunk, 0] = norms_RL2.numpy()
            sums.norm_sum_L2 += torch.einsum("r,rlt->lt", weight_R, norms_RL2.double())
            sums.count += int(eligible.sum())
        return sums

    def _decoded(self, buffers: Buffers, name: str, chunk: int) -> Tensor:
        """One chunk of all layers (L, R, D) as a reader will see it; the values themselves where they have no scale."""
        values = from_bits(buffers[name][chunk], self.layout.dtype)
        if self.layout.scale(name) is None:
            return values
        return decode(Encoded(values, torch.from_numpy(buffers[f"{name}_scale"][chunk])))


@dataclass(frozen=True, slots=True)
class _Writing:
    """A shard whose computed values are being written. `sums`, and the norms in `buffers`, are those of the values."""

    shard: int
    row_chunks: int
    filled: int
    buffers: Buffers
    writes: dict[str, Future[ShardWrite]]
    sums: RowSums
