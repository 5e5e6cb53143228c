"""Writes windows of activation rows: whole shards first, in the window's shuffled order, the commit last.

Letters: N rows, C inner chunks of a shard, R rows of one, L layers, D d_model.
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
from activation_store.layout import ArrayLayout, StoreLayout
from activation_store.manifest import Commit, CommittedDocument, StoreManifest
from activation_store.places import Place
from activation_store.progress import human_bytes
from activation_store.shard_writer import ShardWrite, adopt_shard, write_shard
from activation_store.shards import ShardRecord
from activation_store.statistics import RowSums, compiled_sums, eligible_rows, sum_chunk
from activation_store.storage import Storage
from activation_store.windows import WindowRecord

IntRows = np.ndarray[Any, np.dtype[np.int64]]
_IDS = ("token_ids", "document_ids", "pieces", "positions")
Buffers = dict[str, np.ndarray[Any, Any]]
# Shards in memory at once, and threads that gather, sum and write them: two of them mostly wait for the disk.
_SHARDS, _THREADS = 2, 4


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
        # Before threads ask for it: they would all compile it.
        compiled_sums(torch.float32)
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
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="store-shards") as pool:
            for number in range(self.layout.shards_of(len(order))):
                start = number * self.layout.shard_rows
                taken = order[start : start + self.layout.shard_rows]
                begun = self._begin_shard(rows, taken, first + number, pool)
                if writing is not None:
                    sums.add(self._end_shard(writing, files, pool))
                writing = begun
            if writing is not None:
                sums.add(self._end_shard(writing, files, pool))
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
        """Gathers a shard's rows, begins to write them, and sums them up meanwhile."""
        buffers = self._buffers[shard % _SHARDS]
        arrays = [array for array in self.layout.arrays() if array.name != "norms"]
        gathered = [
            pool.submit(self._gather, array, rows.columns[array.name], taken, buffers[array.name]) for array in arrays
        ]
        for array_gathered in gathered:
            array_gathered.result()
        row_chunks = -(-len(taken) // self.layout.chunk_rows)
        writes = {
            array.name: pool.submit(write_shard, self._storage, array, shard, buffers[array.name], row_chunks)
            for array in arrays
        }
        sums = self._summarise(buffers, row_chunks, len(taken), pool)
        return _Writing(shard, row_chunks, len(taken), buffers, writes, sums)

    def _gather(
        self, array: ArrayLayout, column: np.ndarray[Any, Any], taken: IntRows, buffer: np.ndarray[Any, Any]
    ) -> None:
        """Copies rows into the shard's buffer; what follows the last one in its chunk is made fill values."""
        chunk_rows = self.layout.chunk_rows
        memory = np.empty((chunk_rows, *column.shape[1:]), dtype=column.dtype)
        for chunk, start in enumerate(range(0, len(taken), chunk_rows)):
            wanted = taken[start : start + chunk_rows]
            # Into memory that is there: "clip" does not check first, and all rows exist.
            values = np.take(column, wanted, axis=0, out=memory[: len(wanted)], mode="clip")
            if array.per_layer:
                # A chunk holds the rows of one layer together.
                buffer[chunk, :, : len(values)] = values.swapaxes(0, 1)
            else:
                buffer[chunk, 0, : len(values)] = values
            buffer[chunk, :, len(values) :] = array.fill

    def _end_shard(self, writing: "_Writing", files: dict[str, ShardRecord], pool: Executor) -> RowSums:
        """Waits for what is being written, writes the norms, adds all to `files`, and returns the rows' sums."""
        shard, row_chunks, sums = writing.shard, writing.row_chunks, writing.sums
        arrays = {array.name: array for array in self.layout.arrays()}
        others = [name for name, write in writing.writes.items() if self._settled(name, write.result(), writing, files)]
        if others:
            if (name := next((name for name in others if name in _IDS), None)) is not None:
                raise UserError(
                    f"store {self._folder}: {arrays[name].shard_key(shard)} holds rows of another text or config; give "
                    "another store.path, or delete this store"
                )
            sums = self._summarise(writing.buffers, row_chunks, writing.filled, pool)
        # Function of the values that were settled; where another machine rounded another way, its norms stay.
        written = write_shard(self._storage, arrays["norms"], shard, writing.buffers["norms"], row_chunks)
        self._settled("norms", written, writing, files)
        return sums

    def _settled(self, name: str, written: ShardWrite, writing: "_Writing", files: dict[str, ShardRecord]) -> bool:
        """Adds a shard to `files`; if other values were there before, they go into the buffer, and it is True."""
        array = next(array for array in self.layout.arrays() if array.name == name)
        if written.other and name not in _IDS:
            adopt_shard(self._folder, array, writing.shard, writing.buffers[name], writing.row_chunks)
        files[array.shard_key(writing.shard)] = written.record
        return written.other

    def _summarise(self, buffers: Buffers, row_chunks: int, filled: int, pool: Executor) -> RowSums:
        """Fills the shard's norms and returns its sums over the eligible rows."""
        eligible = eligible_rows(
            buffers["token_ids"][:row_chunks, 0], buffers["positions"][:row_chunks, 0], self._special_ids
        )
        eligible.reshape(-1)[filled:] = False
        weight_CR = torch.from_numpy(eligible.astype(np.float64))
        sums = RowSums.zeros(self.layout.n_layers, self.layout.d_model)
        totals = ((sums.in_sum_LD, sums.in_square_sum_LD), (sums.out_sum_LD, sums.out_square_sum_LD))
        begun = [
            pool.submit(self._sum_chunks, buffers, name, weight_CR, total)
            for name, total in zip(("mlp_in", "mlp_out"), totals, strict=True)
        ]
        in_norms_CRL, out_norms_CRL = (part.result() for part in begun)
        norms_CRL2 = torch.stack([in_norms_CRL, out_norms_CRL], dim=3).float()
        buffers["norms"][:row_chunks, 0] = norms_CRL2.numpy()
        for chunk in range(row_chunks):
            sums.norm_sum_L2 += torch.einsum("r,rlt->lt", weight_CR[chunk], norms_CRL2[chunk].double())
        sums.count = int(eligible.sum())
        return sums

    def _sum_chunks(self, buffers: Buffers, name: str, weight_CR: Tensor, total: tuple[Tensor, Tensor]) -> Tensor:
        """`sum_chunk` of the shard's chunks; returns the norms (C, R, L), float64."""
        chunks = enumerate(weight_CR)
        return torch.stack([sum_chunk(self._decoded(buffers, name, c), weight_R, total) for c, weight_R in chunks])

    def _decoded(self, buffers: Buffers, name: str, chunk: int) -> Tensor:
        """One chunk of all layers (L, R, D) as a reader will see it; the values themselves where they have no scale."""
        values = from_bits(buffers[name][chunk], self.layout.dtype)
        if self.layout.scale(name) is None:
            return values
        return decode(Encoded(values, torch.from_numpy(buffers[f"{name}_scale"][chunk])))


@dataclass(frozen=True, slots=True)
class _Writing:
    """A shard that is being written. `sums`, and the norms in `buffers`, are those of the values."""

    shard: int
    row_chunks: int
    filled: int
    buffers: Buffers
    writes: dict[str, Future[ShardWrite]]
    sums: RowSums
