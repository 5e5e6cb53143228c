"""The bytes of a shard file: zarr's `sharding_indexed` codec with uncompressed inner chunks.

A file is its inner chunks one after another, then an index of (offset, length) as little-endian uint64 for every inner
chunk of the shard in C order (both 2^64 - 1 for a chunk that is not there), then the index's CRC32C. zarr reads what
this writes, and the other way round (property tests); writing it here gives checksum and order of the chunks in one
pass, and reading it here fills buffers that are there already.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from activation_store.errors import UserError
from activation_store.layout import ArrayLayout

NO_CHUNK = 2**64 - 1
_CRC_BYTES = 4
# preadv takes at most so many buffers on Linux.
_IOV_MAX = 1024


def repair(root: Path) -> str:
    """What to do about a damaged file of the store in `root`."""
    store = root.parent if root.name == "held_out" else root
    return (
        f"to repair, delete {store} and harvest it again with the same config (the rows will be the same and runs "
        f"continue); layerloom store verify {store} lists all damage"
    )


class DamagedShardError(UserError):
    """A shard that is missing, cut short or has an impossible index."""

    def __init__(self, root: Path, key: str, reason: str) -> None:
        super().__init__(f"shard {root / key} is damaged ({reason}); {repair(root)}")
        self.key, self.reason = key, reason


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What a commit says about a shard file."""

    bytes: int
    xxh3_64: str


def read_pieces(
    root: Path, array: ArrayLayout, shard: int, buffers: Sequence[memoryview], *, first_slot: int, byte_start: int = 0
) -> None:
    """Fills `buffers[i]` (contiguous bytes) from byte `byte_start` of inner chunk `first_slot + i` on.

    Raises DamagedShardError for a file that is missing, short, or whose index is damaged.
    """
    key = array.shard_key(shard)
    try:
        descriptor = os.open(root / key, os.O_RDONLY)
    except FileNotFoundError:
        raise DamagedShardError(root, key, "missing") from None
    try:
        index = _read_index(descriptor, root, array, shard)[first_slot : first_slot + len(buffers)]
        if len(index) < len(buffers) or np.any(index[:, 1] != array.chunk_bytes):
            raise DamagedShardError(root, key, "a chunk of committed rows is not in its index")
        offsets = index[:, 0].astype(np.int64) + byte_start
        for start, stop in _contiguous(offsets, [buffer.nbytes for buffer in buffers]):
            if not _read_all(descriptor, buffers[start:stop], int(offsets[start])):
                raise DamagedShardError(root, key, "cut short")
    finally:
        os.close(descriptor)


def _read_index(descriptor: int, root: Path, array: ArrayLayout, shard: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """(offset, length) of every inner chunk, (slots, 2), checked against its checksum and the file's size."""
    key = array.shard_key(shard)
    index_bytes = array.slots * 16
    payload_bytes = os.fstat(descriptor).st_size - index_bytes - _CRC_BYTES
    if payload_bytes < 0:
        raise DamagedShardError(root, key, "cut short")
    tail = os.pread(descriptor, index_bytes + _CRC_BYTES, payload_bytes)
    if google_crc32c.value(tail[:index_bytes]) != int.from_bytes(tail[index_bytes:], "little"):
        raise DamagedShardError(root, key, "the checksum of its index differs")
    index = np.frombuffer(tail, dtype="<u8", count=array.slots * 2).reshape(array.slots, 2)
    there = index[index[:, 1] != NO_CHUNK]
    if np.any(there.sum(1, dtype=np.uint64) > payload_bytes):
        raise DamagedShardError(root, key, "cut short")
    return index


def _contiguous(offsets: np.ndarray[Any, np.dtype[np.int64]], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of buffers whose bytes follow one another in the file."""
    runs: list[tuple[int, int]] = []
    start = 0
    for i in range(1, len(sizes) + 1):
        if i == len(sizes) or offsets[i] != offsets[i - 1] + sizes[i - 1] or i - start == _IOV_MAX:
            runs.append((start, i))
            start = i
    return runs


def _read_all(descriptor: int, buffers: Sequence[memoryview], offset: int) -> bool:
    """Fills the buffers from `offset` on; False if the file ends before."""
    wanted = sum(buffer.nbytes for buffer in buffers)
    got = os.preadv(descriptor, buffers, offset)
    if got == wanted:
        return True
    # A short read that is not the end of the file (a limit of the system): the rest buffer by buffer.
    start = 0
    for view in buffers:
        done = min(max(got - start, 0), len(view))
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + start + done)
            if count == 0:
                return False
            done += count
        start += len(view)
    return True


def hint_next(root: Path, array: ArrayLayout, shard: int, row_chunk: int) -> None:
    """Asks the system to bring one row chunk (all layers) into the page cache; a missing file is for the reader."""
    try:
        descriptor = os.open(root / array.shard_key(shard), os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        size = array.chunk_bytes * array.chunks_abreast
        os.posix_fadvise(descriptor, row_chunk * size, size, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
