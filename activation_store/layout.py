"""Arrays of a store on disk: shapes, dtypes, chunks, file names, and their zarr metadata.

Letters: R rows of an inner chunk, L layers, D d_model.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import BytesCodec

from activation_store.atomic import fsync_file
from activation_store.config import Dtype
from activation_store.errors import UserError

FORMAT_VERSION = 1
# zarr knows no bfloat16: its bits are stored, and `logical_dtype` in the array's attributes says what they mean.
NUMPY_DTYPES = {Dtype.float32: "<f4", Dtype.float16: "<f2", Dtype.bfloat16: "<u2"}
TORCH_DTYPES = {Dtype.float32: torch.float32, Dtype.float16: torch.float16, Dtype.bfloat16: torch.bfloat16}


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
    def row_bytes(self) -> int:
        """Bytes of one row in one inner chunk."""
        return prod(self.tail_shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
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
    """Shapes of a store: `mlp_in`, `mlp_out` (rows, L, D), `norms` (rows, L, 2), and three arrays (rows,)."""

    n_layers: int
    d_model: int
    dtype: Dtype
    chunk_rows: int
    shard_rows: int

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
        return ArrayLayout(name, row_shape, True, dtype, self.dtype.value, 0, self.chunk_rows, self.shard_rows)

    def arrays(self) -> list[ArrayLayout]:
        """All arrays, the small ones last."""
        return [
            self.activations("mlp_in"),
            self.activations("mlp_out"),
            self._small("norms", (self.n_layers, 2), "float32"),
            self._small("token_ids", (), "int32"),
            self._small("document_ids", (), "int64", fill=-1),
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


def create_zarr(folder: Path, layout: StoreLayout) -> None:
    """Writes the metadata of the group and its empty arrays, where they are missing."""
    group = zarr.open_group(folder, mode="a", zarr_format=3, attributes={"layerloom_format_version": FORMAT_VERSION})
    for array in layout.arrays():
        if array.name in group:
            continue
        group.create_array(
            array.name,
            shape=(0, *array.row_shape),
            dtype=array.dtype,
            chunks=array.zarr_chunk_shape,
            shards=(array.shard_rows, *array.row_shape),
            # Uncompressed: 16-bit activations hardly shrink, and a reader takes the bytes as they are.
            serializer=BytesCodec(),
            compressors=None,
            filters=None,
            fill_value=array.fill,
            attributes={"logical_dtype": array.logical_dtype},
            dimension_names=["row", "layer", "dim"][: 1 + len(array.row_shape)],
        )


def grow_zarr(folder: Path, layout: StoreLayout, rows: int) -> None:
    """Sets the length of every array (metadata only; arrays of that length are left alone)."""
    group = zarr.open_group(folder, mode="r+")
    for array in layout.arrays():
        member = group[array.name]
        assert isinstance(member, zarr.Array)
        if member.shape[0] != rows:
            member.resize((rows, *array.row_shape))
            # zarr renames a file that may not be on disk yet.
            fsync_file(folder / array.name / "zarr.json")


def to_stored(x: Tensor, dtype: Dtype) -> Tensor:
    """`x` in the dtype of the store, on the CPU, contiguous. Values out of range become infinite."""
    return x.to(TORCH_DTYPES[dtype]).cpu().contiguous()


def stored_bits(x: Tensor) -> np.ndarray[Any, Any]:
    """The numpy array that a stored tensor's bytes are (bfloat16 as uint16)."""
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype is torch.bfloat16 else x.numpy()


def from_bits(bits: np.ndarray[Any, Any], dtype: Dtype) -> Tensor:
    """The tensor over the bytes of a stored array; inverse of `stored_bits`, without a copy."""
    if dtype is Dtype.bfloat16:
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(bits)
