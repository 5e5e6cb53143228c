"""Reads an activation store: `ActivationStore.open(path)[i:j]`.

Letters: n rows, L layers, D d_model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_store.chunks import RowChunk, RowChunks
from activation_store.codec import Encoded, decode, from_bits
from activation_store.config import StoreDtype
from activation_store.errors import UserError
from activation_store.layout import ArrayLayout
from activation_store.manifest import COMPLETE, HELD_OUT, MANIFEST, StoreManifest, read_commits
from activation_store.places import Place, place
from activation_store.progress import counted, human_bytes, layer_range
from activation_store.shards import read_pieces
from activation_store.statistics import (
    BoolRows,
    RowSums,
    ScalingStatistics,
    eligible_rows,
    finish,
    norm_means,
    outlier_rows,
    sum_rows,
)
from activation_store.used import UsedRows

# Rows whose norms are looked at together.
_SCAN_ROWS = 65_536
# Outlier rows that are read together.
_OUTLIER_ROWS = 1_024


@dataclass(frozen=True, slots=True)
class ActivationRows:
    """Consecutive rows: activations (n, L, D) float32; token id, document index and position of each, (n,) int64."""

    mlp_in: Tensor
    mlp_out: Tensor
    token_ids: Tensor
    document_ids: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)


class ActivationStore:
    """The rows of a store in block order, 0 to `n_rows`; holes between blocks are not counted."""

    def __init__(self, path: Place, manifest: StoreManifest, blocks: Sequence[tuple[int, int]]) -> None:
        """`blocks`: first row in the arrays, and rows, of each block. Use `open`."""
        self.path, self.manifest = path, manifest
        self.layout = manifest.layout
        self.chunks = RowChunks(blocks, chunk_rows=self.layout.chunk_rows, shard_rows=self.layout.shard_rows)
        self.n_rows = self.chunks.n_rows

    @classmethod
    def open(cls, path: Place | str, *, allow_incomplete: bool = False) -> "ActivationStore":
        """Opens a store in a folder or at a URL.

        Raises UserError if it is none, or half written (unless `allow_incomplete`: its commits).
        """
        folder = place(path)
        manifest = StoreManifest.load(folder)
        if manifest.status == COMPLETE:
            return cls(folder, manifest, [(start, rows) for start, rows in manifest.blocks])
        blocks = [(commit.start_row, commit.rows) for commit in read_commits(folder)]
        if not allow_incomplete:
            raise UserError(
                f"store {folder} is half written ({sum(rows for _, rows in blocks)} rows so far); finish it by running "
                f"its harvest again: layerloom harvest store.path={folder} ..."
            )
        return cls(folder, manifest, blocks)

    @property
    def n_layers(self) -> int:
        return len(self.manifest.layers)

    @property
    def layers(self) -> tuple[int, ...]:
        """The subject's layers, in the order of the second axis."""
        return tuple(self.manifest.layers)

    @property
    def d_model(self) -> int:
        return self.manifest.d_model

    @property
    def dtype(self) -> StoreDtype:
        """Dtype on disk; reads give float32."""
        return self.manifest.dtype

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, rows: slice) -> ActivationRows:
        start, stop, step = rows.indices(self.n_rows)
        if step != 1:
            raise ValueError(f"a store is read in consecutive rows: got step {step}, wanted 1; slice the result")
        return self.read_rows(start, stop)

    def __repr__(self) -> str:
        m = self.manifest
        size = human_bytes(self.n_rows * self.layout.row_bytes)
        rows, layers = counted(self.n_rows, "row"), layer_range(m.layers)
        return (
            f"ActivationStore({str(self.path)!r}: {m.status}, {rows} of {m.subject['path']}, {layers}, "
            f"d_model {m.d_model}, {m.input_hook} -> mlp_out, {m.dtype.value}, {size})"
        )

    def read_rows(self, start: int, stop: int, *, layers: Sequence[int] | None = None) -> ActivationRows:
        """Rows [start, stop), of some of `self.layers` if named; only their bytes are read.

        Raises UserError for a layer that the store does not have, or a damaged shard (DamagedShardError).
        """
        columns = self.columns(layers)
        stop = max(start, stop)
        if start < 0 or stop > self.n_rows:
            raise IndexError(f"rows [{start}, {stop}) are not all in a store of {self.n_rows} rows")
        shape = (stop - start, len(columns), self.d_model)
        mlp_in, mlp_out = torch.empty(shape), torch.empty(shape)
        for name, out in (("mlp_in", mlp_in), ("mlp_out", mlp_out)):
            for chunk, skip, take in self.chunks.pieces(start, stop):
                at = chunk.first_row + skip - start
                self._read_encoded(name, chunk, columns, skip, out[at : at + take].transpose(0, 1))
        ids = {name: self.read_small(name, start, stop).astype(np.int64) for name in _ROW_IDS}
        return ActivationRows(mlp_in, mlp_out, *(torch.from_numpy(ids[name]) for name in _ROW_IDS))

    def _read_encoded(
        self, name: str, chunk: RowChunk, columns: Sequence[int], skip_rows: int, out_LND: Tensor
    ) -> None:
        """Rows of one chunk from `skip_rows` on, decoded."""
        array, scales = self.layout.activations(name), self.layout.scale(name)
        shape = out_LND.shape
        bits = np.empty(shape, dtype=array.dtype)
        self.read_chunk(array, chunk, list(bits), columns=columns, skip_rows=skip_rows)
        scale = None
        if scales is not None:
            scale = torch.empty(shape[:2])
            self.read_chunk(scales, chunk, list(scale.numpy()), columns=columns, skip_rows=skip_rows)
        decode(Encoded(from_bits(bits, self.dtype), scale), out_LND)

    def read_small(self, name: str, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows [start, stop) of `norms` (n, L, 2), or `token_ids`, `document_ids` or `positions` (n,), as stored."""
        array = next(array for array in self.layout.arrays() if array.name == name)
        out = np.empty((stop - start, *array.row_shape), dtype=array.dtype)
        for chunk, skip, take in self.chunks.pieces(start, stop):
            at = chunk.first_row + skip - start
            self.read_chunk(array, chunk, [out[at : at + take]], columns=range(1), skip_rows=skip)
        return out

    def read_chunk(
        self,
        array: ArrayLayout,
        chunk: RowChunk,
        buffers: Sequence[np.ndarray[Any, Any]],
        *,
        columns: Sequence[int],
        skip_rows: int = 0,
    ) -> None:
        """Fills each contiguous buffer, of at most the chunk's rows, with a column (a layer's index in the store)."""
        bases = [chunk.row_chunk * array.chunks_abreast + column for column in columns]
        start = 0
        # Columns that follow one another are read in one call.
        for i in range(1, len(bases) + 1):
            if i == len(bases) or bases[i] != bases[i - 1] + 1:
                views = [buffer.reshape(-1).view(np.uint8).data for buffer in buffers[start:i]]
                read_pieces(
                    self.path,
                    array,
                    chunk.shard,
                    views,
                    first_slot=bases[start],
                    byte_start=skip_rows * array.row_bytes,
                )
                start = i

    def used_rows(self, start: int = 0, stop: int | None = None) -> BoolRows:
        """Which of the logical rows [start, stop) training uses: not position 0, no special token, no outlier."""
        stop = self.n_rows if stop is None else stop
        parts = [
            self.used.mask(self.chunks.number_of(chunk.first_row), chunk.rows)[skip : skip + take]
            for chunk, skip, take in self.chunks.pieces(start, stop)
        ]
        return np.concatenate([np.empty(0, dtype=np.bool_), *parts])

    @cached_property
    def used(self) -> UsedRows:
        """Which rows training uses, by chunk: as saved when the store was completed, else found by scanning it."""
        statistics, chunk_rows = self.manifest.statistics, self.layout.chunk_rows
        if statistics is not None:
            n_chunks = len(self.chunks)
            saved = UsedRows.load(self.path, chunks=n_chunks, chunk_rows=chunk_rows, count=statistics.count)
            if saved is not None:
                return saved
        return self.find_used_rows(self._norm_means)

    def find_used_rows(self, norm_means_L2: np.ndarray[Any, Any]) -> UsedRows:
        """Scans the store for the rows that training uses, given the mean norms that tell outliers."""
        return UsedRows.of(self._used_masks(norm_means_L2), len(self.chunks), self.layout.chunk_rows)

    def statistics(self) -> ScalingStatistics:
        """Scaling statistics of the used rows: from the manifest, or (half-written store) computed from the commits."""
        return self.manifest.statistics or self.compute_statistics()[0]

    def compute_statistics(self) -> tuple[ScalingStatistics, int]:
        """The statistics from the commits' sums and the outlier rows, which are read; and the number of outliers."""
        sums = self._committed_sums()
        groups = self._scan(norm_means(sums).numpy())
        found = [start + np.flatnonzero(eligible & outliers) for start, eligible, outliers in groups]
        rows = np.concatenate([np.empty(0, dtype=np.int64), *found])
        out_sums = RowSums.zeros(self.n_layers, self.d_model)
        for start in range(0, len(rows), _OUTLIER_ROWS):
            group = [self.read_rows(int(row), int(row) + 1) for row in rows[start : start + _OUTLIER_ROWS]]
            out_sums.add(sum_rows(torch.cat([row.mlp_in for row in group]), torch.cat([row.mlp_out for row in group])))
        return finish(sums, out_sums), len(rows)

    def held_out(self) -> "ActivationStore | None":
        """The store of the held-out documents, or None if none was harvested."""
        folder = self.path / HELD_OUT
        return ActivationStore.open(folder) if (folder / MANIFEST).exists() else None

    @property
    def _norm_means(self) -> np.ndarray[Any, Any]:
        statistics = self.manifest.statistics
        if statistics is None:
            return norm_means(self._committed_sums()).numpy()
        return torch.stack([statistics.input_norm_mean_L, statistics.output_norm_mean_L], dim=1).numpy()

    def _committed_sums(self) -> RowSums:
        sums = RowSums.zeros(self.n_layers, self.d_model)
        for commit in read_commits(self.path):
            sums.add(commit.sums)
        return sums

    def _scan(self, norm_means_L2: np.ndarray[Any, Any]) -> Iterator[tuple[int, BoolRows, BoolRows]]:
        """First row, eligible rows and outliers of groups of whole chunks, in order."""
        step = max(1, _SCAN_ROWS // self.layout.chunk_rows)
        for first in range(0, len(self.chunks), step):
            last = self.chunks[min(first + step, len(self.chunks)) - 1]
            start, stop = self.chunks[first].first_row, last.first_row + last.rows
            token_ids, positions = self.read_small("token_ids", start, stop), self.read_small("positions", start, stop)
            eligible = eligible_rows(token_ids, positions, self.manifest.special_token_ids)
            norms_NL2 = self.read_small("norms", start, stop)
            yield start, eligible, outlier_rows(norms_NL2, norm_means_L2, self.manifest.outlier_factor)

    def _used_masks(self, norm_means_L2: np.ndarray[Any, Any]) -> Iterator[BoolRows]:
        """The used rows of every chunk."""
        for start, eligible, outliers in self._scan(norm_means_L2):
            used = eligible & ~outliers
            for chunk, _, _ in self.chunks.pieces(start, start + len(used)):
                yield used[chunk.first_row - start : chunk.first_row - start + chunk.rows]

    def columns(self, layers: Sequence[int] | None) -> Sequence[int]:
        if layers is None:
            return range(self.n_layers)
        if missing := [layer for layer in layers if layer not in self.manifest.layers]:
            raise UserError(f"store {self.path} has layers {list(self.layers)}, not {missing}; ask for some of its own")
        return [self.manifest.layers.index(layer) for layer in layers]


_ROW_IDS = ("token_ids", "document_ids", "positions")
