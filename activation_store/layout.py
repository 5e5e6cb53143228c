"""Arrays of a store on disk: shapes, dtypes, chunks, file names, and their zarr metadata.

Letters: R rows of an inner chunk, L layers, D d_model.
"""

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCname, BloscCodec, BytesCodec
from zarr.storage import MemoryStore

from activation_store.atomic import fsync_file
from activation_store.codec import NUMPY_DTYPES, has_scale
from activation_store.config import Compression, StoreDtype
from activation_store.errors import UserError
from activation_store.places import Place, write_whole

FORMAT_VERSION = 2
# Of Blosc: fast settings, for 16-bit activations do not shrink more for a higher level.
COMPRESSION_LEVELS = {Compression.lz4: 5, Compression.zstd: 1}


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """One zarr array (rows, *row_shape) in shards of whole rows and inner chunks (R, 1, D), or (R, *row_shape)."""

    name: str
    row_shape: tuple[int, ...]
    # Whether each layer has inner chunks of its own, so that one layer reads its own bytes.
    per_layer: bool
    dtype: np.dtype[Any]
    logical_dtype: str
    fill: int
    chunk_rows: int
    shard_rows: int
    compression: Compression = Compression.none
    # Bytes of one row in one inner chunk.
    row_bytes: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "row_bytes", prod(self.tail_shape) * self.dtype.itemsize)

    @property
    def row_chunks(self) -> int:
        """Inner chunks of a shard along the rows."""
        return self.shard_rows // self.chunk_rows

    @property
    def chunks_abreast(self) -> int:
        """Inner chunks that share their rows: one for each layer, or one."""
        return self.row_shape[0] if self.per_layer else 1

    @property
    def tail_shape(self) -> tuple[int, ...]:
        """What one inner chunk holds of a row: (D,), or all of it."""
        return self.row_shape[1:] if self.per_layer else self.row_shape

    @property
    def zarr_chunk_shape(self) -> tuple[int, ...]:
        """Shape of an inner chunk."""
        return (self.chunk_rows, 1, *self.tail_shape) if self.per_layer else (self.chunk_rows, *self.row_shape)

    @property
    def slots(self) -> int:
        """Inner chunks of a shard, in C order: rows first, then layers."""
        return self.row_chunks * self.chunks_abreast

    @property
    def chunk_bytes(self) -> int:
        """Bytes of an inner chunk before compression."""
        return self.chunk_rows * self.row_bytes

    @property
    def buffer_shape(self) -> tuple[int, ...]:
        """A shard in memory as it lies on disk: (row chunks, chunks abreast, R, *tail)."""
        return (self.row_chunks, self.chunks_abreast, self.chunk_rows, *self.tail_shape)

    def shard_key(self, shard: int) -> str:
        """The file of a shard, relative to the store's folder (zarr's default chunk key)."""
        return "/".join([self.name, "c", str(shard), *("0" for _ in self.row_shape)])


@dataclass(frozen=True, slots=True)
class StoreLayout:
    """Shapes of a store: `mlp_in`, `mlp_out` (rows, L, D), `norms` (rows, L, 2), and four arrays (rows,).

    8-bit dtypes have `mlp_in_scale`, `mlp_out_scale` (rows, L) besides.
    """

    n_layers: int
    d_model: int
    dtype: StoreDtype
    chunk_rows: int
    shard_rows: int
    compression: Compression = Compression.none

    def __post_init__(self) -> None:
        if self.chunk_rows < 1 or self.shard_rows < 1 or self.shard_rows % self.chunk_rows:
            raise UserError(
                f"store.shard_rows={self.shard_rows} is not a multiple of store.chunk_rows={self.chunk_rows}; "
                f"use {max(1, self.shard_rows // max(1, self.chunk_rows)) * max(1, self.chunk_rows)}"
            )

    def activations(self, name: str) -> ArrayLayout:
        """`mlp_in` or `mlp_out`."""
        dtype = np.dtype(NUMPY_DTYPES[self.dtype])
        row_shape = (self.n_layers, self.d_model)
        return ArrayLayout(
            name, row_shape, True, dtype, self.dtype.value, 0, self.chunk_rows, self.shard_rows, self.compression
        )

    def scale(self, name: str) -> ArrayLayout | None:
        """The scales of `mlp_in` or `mlp_out`, for dtypes that have them."""
        if not has_scale(self.dtype):
            return None
        row_shape, stored = (self.n_layers,), np.dtype("<f4")
        return ArrayLayout(f"{name}_scale", row_shape, True, stored, "float32", 0, self.chunk_rows, self.shard_rows)

    def arrays(self) -> list[ArrayLayout]:
        """All arrays, the small ones last."""
        return [
            self.activations("mlp_in"),
            self.activations("mlp_out"),
            *(scale for name in ("mlp_in", "mlp_out") if (scale := self.scale(name)) is not None),
            self._small("norms", (self.n_layers, 2), "float32"),
            self._small("token_ids", (), "int32"),
            self._small("document_ids", (), "int64", fill=-1),
            self._small("pieces", (), "int32"),
            self._small("positions", (), "int32"),
        ]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on disk, all arrays together."""
        return sum(array.row_bytes * array.chunks_abreast for array in self.arrays())

    def shards_of(self, rows: int) -> int:
        """Shards that so many rows of a block take."""
        return -(-rows // self.shard_rows)

    def _small(self, name: str, row_shape: tuple[int, ...], dtype: str, fill: int = 0) -> ArrayLayout:
        stored = np.dtype(dtype).newbyteorder("<")
        return ArrayLayout(name, row_shape, False, stored, dtype, fill, self.chunk_rows, self.shard_rows)


def create_zarr(folder: Place, layout: StoreLayout, rows: int = 0) -> None:
    """Writes the metadata of the group and its arrays of `rows` rows, where they are missing."""
    memory: dict[str, Any] = {}
    target = folder if isinstance(folder, Path) else MemoryStore(memory)
    group = zarr.open_group(target, mode="a", zarr_format=3, attributes={"layerloom_format_version": FORMAT_VERSION})
    for array in layout.arrays():
        if array.name not in group:
            group.create_array(
                array.name,
                shape=(rows, *array.row_shape),
                dtype=array.dtype,
                chunks=array.zarr_chunk_shape,
                shards=(array.shard_rows, *array.row_shape),
                serializer=BytesCodec(),
                compressors=_compressors(array),
                filters=None,
                fill_value=array.fill,
                attributes={"logical_dtype": array.logical_dtype},
                dimension_names=["row", "layer", "dim"][: 1 + len(array.row_shape)],
            )
        if isinstance(folder, Path):
            # zarr renames a file that may not be on disk yet.
            fsync_file(folder / array.name / "zarr.json")
    for key, value in memory.items():
        write_whole(folder / key, value.to_bytes())


def _compressors(array: ArrayLayout) -> list[BloscCodec] | None:
    """zarr's codecs of an array; `activation_store.shards` does the same to the bytes."""
    if array.compression is Compression.none:
        return None
    level = COMPRESSION_LEVELS[array.compression]
    size = array.dtype.itemsize
    cname = BloscCname(array.compression.value)
    return [BloscCodec(typesize=size, cname=cname, clevel=level, shuffle="bitshuffle", blocksize=0)]
