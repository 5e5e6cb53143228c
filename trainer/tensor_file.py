"""safetensors files written piece by piece and hashed on the way, on a disk or an object store.

`safetensors.torch.save_file` cannot hash what it writes nor tell ENOSPC from other failures, and checkpoints are as
large as memory allows, so nothing here holds a second copy of more than one tensor (on a CPU, of none). The format: 8
bytes little-endian header length, JSON header `{name: {dtype, shape, data_offsets}}` padded with spaces to a multiple
of 8, then the tensors' bytes in the header's order, widest dtypes first so that each is aligned.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from activation_store.files import OpenFile
from activation_store.places import Place, RemotePath, open_file

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """Size and xxh3-64 (hex) of a file's bytes."""

    n_bytes: int
    xxh3_64: str


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file before its numbers: what it begins with, and at which byte each tensor does, in the order of the file."""

    head: bytes
    begins: Mapping[str, int]


def file_layout(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> FileLayout:
    """The layout of a file of tensors of these dtypes and shapes. metadata: further strings for the header."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1][0].itemsize)
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name, (dtype, shape) in ordered:
        offsets[name], end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    head = len(header).to_bytes(8, "little") + header
    return FileLayout(head, {name: len(head) + offset for name, offset in offsets.items()})


def bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in pieces that fit a cache; views of its memory when it is contiguous on a CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs for 3.11 lack Buffer
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def write_pieces(file: Place, pieces: Callable[[], Iterator[bytes | memoryview]]) -> WrittenFile:
    """Writes what `pieces()` yields and syncs it to disk. An object store may ask for the pieces again.

    Raises OSError (a full disk: ENOSPC; StorageError).
    """
    hashed = _Hashed(pieces)
    if isinstance(file, RemotePath):
        file.storage.put_stream(file.key, hashed)
        return hashed.written()
    with file.open("wb") as opened:
        # Hash and write alternate in pieces that fit the cache: memory is read once.
        for piece in hashed:
            opened.write(piece)
        opened.flush()
        os.fsync(opened.fileno())
    return hashed.written()


def write_tensors(file: Place, tensors: Mapping[str, Tensor]) -> WrittenFile:
    """Writes `tensors` in safetensors format, synced. Raises OSError."""
    layout = file_layout({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})

    def pieces() -> Iterator[bytes | memoryview]:
        yield layout.head
        for name in layout.begins:
            yield from bytes_of(tensors[name])

    return write_pieces(file, pieces)


def hash_file(file: Place, advance: Callable[[int], None] | None = None) -> WrittenFile:
    """Size and xxh3-64 of a file. advance: told of the bytes read as they are. Raises OSError."""
    digest, opened, offset = xxhash.xxh3_64(), open_file(file), 0
    buffer = bytearray(min(CHUNK_BYTES, opened.size))
    address = np.frombuffer(buffer, dtype=np.uint8).ctypes.data
    while offset < opened.size:
        piece = memoryview(buffer)[: opened.size - offset]
        read_whole(opened, offset, address, len(piece))
        digest.update(piece)
        offset += len(piece)
        if advance is not None:
            advance(len(piece))
    return WrittenFile(offset, digest.hexdigest())


def read_whole(file: OpenFile, offset: int, address: int, n_bytes: int) -> None:
    """Reads so many bytes into memory that is there. Raises OSError, for a file that ends before too."""
    if n_bytes and not file.read_pieces(np.array([[address, n_bytes]], dtype=np.uint64), offset):
        raise OSError(errno.EIO, "a file ends before its last tensor does")


class _Hashed:
    """Pieces that are hashed and counted as they go by; iterating again starts again."""

    def __init__(self, pieces: Callable[[], Iterator[bytes | memoryview]]) -> None:
        self._pieces = pieces
        self._digest, self._n_bytes = xxhash.xxh3_64(), 0

    def __iter__(self) -> Iterator[bytes | memoryview]:
        self._digest, self._n_bytes = xxhash.xxh3_64(), 0
        for piece in self._pieces():
            self._digest.update(piece)
            self._n_bytes += len(piece)
            yield piece

    def written(self) -> WrittenFile:
        return WrittenFile(self._n_bytes, self._digest.hexdigest())
