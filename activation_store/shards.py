"""The bytes of a shard file: zarr's `sharding_indexed` codec, read without zarr-python.

A file is its inner chunks one after another, then an index of (offset, length) as little-endian uint64 for every inner
chunk of the shard in C order (both 2^64 - 1 for a chunk that is not there), then the index's CRC32C. zarr reads what
activation_store.shard_writer writes, and this reads what zarr writes (property tests). Reading it here fills memory
that is there already, each row where it is wanted.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc

from activation_store.config import Compression
from activation_store.errors import UserError
from activation_store.files import Pieces, copy_to_pieces
from activation_store.layout import ArrayLayout
from activation_store.places import Place, open_file
from activation_store.scatter import Block, Scatter

NO_CHUNK = 2**64 - 1
_CRC_BYTES = 4
# Shards that are kept open.
_OPEN_SHARDS = 128
_Offsets = np.ndarray[Any, np.dtype[np.int64]]


def repair(root: Place) -> str:
    """What to do about a damaged file of the store in `root`."""
    store = root.parent if root.name == "held_out" else root
    return (
        f"layerloom store repair {store} harvests what is damaged again (the rows will be the same and runs continue); "
        f"layerloom store verify {store} lists all damage"
    )


class DamagedShardError(UserError):
    """A shard that is missing, cut short or has an impossible index."""

    def __init__(self, root: Place, key: str, reason: str) -> None:
        super().__init__(f"shard {root / key} is damaged ({reason}); {repair(root)}")
        self.key, self.reason = key, reason


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What a commit says about a shard file."""

    bytes: int
    xxh3_64: str


class ShardFile:
    """An open shard file and its index. Any number of threads may read; it is closed when nobody refers to it."""

    def __init__(self, root: Place, array: ArrayLayout, shard: int) -> None:
        """Raises DamagedShardError for a file that is missing, cut short or whose index is damaged."""
        self._root, self._array, self._key = root, array, array.shard_key(shard)
        try:
            self._file = open_file(root / self._key)
        except FileNotFoundError:
            raise self._damaged("missing") from None
        self._index = self._read_index()
        plain = array.compression is Compression.none
        wrong = self._index[:, 1] != array.chunk_bytes if plain else self._index[:, 1] == NO_CHUNK
        # Inner chunks that no committed row can be in; None: there are none, as there are in a full shard.
        self._wrong = wrong if wrong.any() else None
        # Of a chunk that is not there: -1.
        self._offsets = self._index[:, 0].view(np.int64)

    def read(self, first_slot: int, pieces: Sequence[Pieces], *, byte_start: int = 0) -> None:
        """Fills `pieces[i]` with the bytes of inner chunk `first_slot + i` from its byte `byte_start` on.

        The pieces of all chunks have equally many bytes. Raises DamagedShardError.
        """
        wanted_slots = self._slots(first_slot, len(pieces))
        if self._array.compression is not Compression.none:
            for entry, wanted in zip(self._index[wanted_slots], pieces, strict=True):
                copy_to_pieces(self._decompressed(int(entry[0]), int(entry[1])), byte_start, wanted)
            return
        offsets = self._offsets[wanted_slots] + byte_start
        for start, stop in _contiguous(offsets, int(pieces[0][:, 1].sum())):
            wanted = np.ascontiguousarray(np.concatenate(pieces[start:stop]))
            if not self._file.read_pieces(wanted, int(offsets[start])):
                raise self._damaged("cut short")

    def scatter(self, first_slot: int, slots: int, first_row: int, target: Scatter, layer: int) -> None:
        """Puts rows of `slots` inner chunks, from their row `first_row` on, where `target` says; the first is `layer`.

        Raises DamagedShardError.
        """
        wanted_slots = self._slots(first_slot, slots)
        start = first_row * self._array.row_bytes
        if self._array.compression is not Compression.none:
            for number, entry in enumerate(self._index[wanted_slots], layer):
                target.put(self._decompressed(int(entry[0]), int(entry[1])), np.array([start]), number)
            return
        offsets = self._offsets[wanted_slots] + start
        for first, last in _contiguous(offsets, target.source_bytes):
            length = (last - first) * target.source_bytes
            data = self._file.read(int(offsets[first]), length)
            if len(data) < length:
                raise self._damaged("cut short")
            target.put(np.frombuffer(data, np.uint8), offsets[first:last] - offsets[first], layer + first)

    def planned(self, first_slot: int, slots: int, first_row: int, target: Scatter, layer: int) -> Block | None:
        """What `scatter` does, to be done with more of it in one call; None where it must do it, as for a URL.

        Raises DamagedShardError.
        """
        if self._file.descriptor is None or self._array.compression is not Compression.none:
            return None
        offsets = self._offsets[self._slots(first_slot, slots)] + first_row * self._array.row_bytes
        return target.planned(self._file.descriptor, offsets, layer)

    def _slots(self, first_slot: int, slots: int) -> slice:
        """Where inner chunks are in the index, which has them. Raises DamagedShardError."""
        wanted = slice(first_slot, first_slot + slots)
        if wanted.stop > len(self._index) or (self._wrong is not None and self._wrong[wanted].any()):
            raise self._damaged("a chunk of committed rows is not in its index")
        return wanted

    def hint(self, first_slot: int, slots: int) -> None:
        """Asks the system to bring inner chunks into the page cache, unless the first one is there."""
        if first_slot < len(self._offsets) and (first := self._offsets[first_slot]) >= 0 and self._file.at_hand(first):
            return
        index = self._index[first_slot : first_slot + slots]
        index = index[index[:, 1] != NO_CHUNK]
        if len(index):
            start, stop = int(index[:, 0].min()), int(index.sum(1, dtype=np.uint64).max())
            self._file.hint(start, stop - start)

    def _read_index(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """(offset, length) of every inner chunk, (slots, 2), checked against its checksum and the file's size."""
        slots = self._array.slots
        payload_bytes = self._file.size - slots * 16 - _CRC_BYTES
        if payload_bytes < 0:
            raise self._damaged("cut short")
        tail = self._file.read(payload_bytes, slots * 16 + _CRC_BYTES)
        if google_crc32c.value(tail[: slots * 16]) != int.from_bytes(tail[slots * 16 :], "little"):
            raise self._damaged("the checksum of its index differs")
        index = np.frombuffer(tail, dtype="<u8", count=slots * 2).reshape(slots, 2)
        there = index[index[:, 1] != NO_CHUNK]
        if np.any(there.sum(1, dtype=np.uint64) > payload_bytes):
            raise self._damaged("cut short")
        return index

    def _decompressed(self, offset: int, length: int) -> np.ndarray[Any, Any]:
        """One inner chunk."""
        data = self._file.read(offset, length)
        if len(data) < length:
            raise self._damaged("cut short")
        out = np.empty(self._array.chunk_bytes, dtype=np.uint8)
        try:
            # A header that lies about the size would write past the end.
            if length < _BLOSC_HEADER or int.from_bytes(data[4:8], "little") != out.nbytes:
                raise RuntimeError
            blosc.decompress(data, out)
        except RuntimeError:
            raise self._damaged("a chunk cannot be decompressed") from None
        return out

    def _damaged(self, reason: str) -> DamagedShardError:
        return DamagedShardError(self._root, self._key, reason)


class OpenShards:
    """The shards below `root` that were read last, open."""

    def __init__(self, root: Place) -> None:
        self._root, self._lock = root, threading.Lock()
        self._files: OrderedDict[tuple[str, int], ShardFile] = OrderedDict()

    def get(self, array: ArrayLayout, shard: int) -> ShardFile:
        """Opens a shard, or gives the open one. Raises DamagedShardError."""
        key = (array.name, shard)
        with self._lock:
            if key in self._files:
                self._files.move_to_end(key)
                return self._files[key]
        file = ShardFile(self._root, array, shard)
        with self._lock:
            self._files[key] = file
            while len(self._files) > _OPEN_SHARDS:
                self._files.popitem(last=False)
        return file

    def forget(self, shard: int) -> None:
        """Closes those before `shard`, once nobody reads from them."""
        with self._lock:
            for key in [key for key in self._files if key[1] < shard]:
                del self._files[key]


# Bytes of Blosc's header; bytes 4 to 8 of it are the size when decompressed.
_BLOSC_HEADER = 16


def read_pieces(
    root: Place, array: ArrayLayout, shard: int, buffers: Sequence[memoryview], *, first_slot: int, byte_start: int = 0
) -> None:
    """Fills `buffers[i]` (contiguous bytes, equally many) from byte `byte_start` of inner chunk `first_slot + i` on.

    Raises DamagedShardError for a file that is missing, short, or whose index is damaged.
    """
    views = [np.frombuffer(buffer, dtype=np.uint8) for buffer in buffers]
    pieces = [np.array([[view.ctypes.data, view.nbytes]], dtype=np.uint64) for view in views]
    ShardFile(root, array, shard).read(first_slot, pieces, byte_start=byte_start)


def _contiguous(offsets: _Offsets, size: int) -> list[tuple[int, int]]:
    """Runs of chunks of which `size` bytes each follow one another in the file."""
    cuts = np.flatnonzero(np.diff(offsets) != size) + 1
    edges = [0, *cuts.tolist(), len(offsets)]
    return list(pairwise(edges))
