"""index.json of a checkpoint: where the numbers of every tensor lie.

    {"model": {"layers.0.W_enc": {"dtype": "F32", "shape": [512, 64], "chunks": [
        {"file": "model_00000.safetensors", "begin": 1024, "offsets": [0, 0], "sizes": [256, 64]}, ...]}, ...},
     "optimizer": {"layers.0.W_enc.exp_avg": ...}}

A chunk is a box of the tensor, contiguous in its file from byte `begin` on.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trainer.tensor_file import DTYPE_NAMES, DTYPES

INDEX_FILE = "index.json"
MODEL, OPTIMIZER = "model", "optimizer"
KINDS = (MODEL, OPTIMIZER)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, in a file."""

    file: str
    begin: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A global tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def n_values(self) -> int:
        """Numbers in it."""
        return torch.Size(self.shape).numel()

    @property
    def n_bytes(self) -> int:
        """Bytes of them."""
        return self.n_values * self.dtype.itemsize


# By kind (model, optimizer) and name.
Index = Mapping[str, Mapping[str, TensorEntry]]


def index_to_json(index: Index) -> dict[str, Any]:
    """Plain JSON values."""
    return {kind: {name: _entry_to_json(entry) for name, entry in sorted(index[kind].items())} for kind in KINDS}


def index_from_json(values: Mapping[str, Any]) -> Index:
    """The inverse of `index_to_json`."""
    return {kind: {name: _entry_from_json(entry) for name, entry in values[kind].items()} for kind in KINDS}


def files_of(index: Index, kinds: Iterable[str] = KINDS) -> list[str]:
    """Names of the files that hold tensors of these kinds, sorted."""
    return sorted({chunk.file for kind in kinds for entry in index[kind].values() for chunk in entry.chunks})


def _entry_to_json(entry: TensorEntry) -> dict[str, Any]:
    chunks = [
        {"file": chunk.file, "begin": chunk.begin, "offsets": list(chunk.offsets), "sizes": list(chunk.sizes)}
        for chunk in entry.chunks
    ]
    return {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "chunks": chunks}


def _entry_from_json(values: Mapping[str, Any]) -> TensorEntry:
    chunks = tuple(
        Chunk(str(chunk["file"]), int(chunk["begin"]), tuple(chunk["offsets"]), tuple(chunk["sizes"]))
        for chunk in values["chunks"]
    )
    return TensorEntry(DTYPES[values["dtype"]], tuple(values["shape"]), chunks)
