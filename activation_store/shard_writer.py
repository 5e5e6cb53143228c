"""Creates shard files: zarr's `sharding_indexed` codec, as activation_store.shards describes and reads it."""

from dataclasses import dataclass
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import xxhash

from activation_store.config import Compression
from activation_store.layout import COMPRESSION_LEVELS, ArrayLayout
from activation_store.places import Place
from activation_store.shards import NO_CHUNK, ShardRecord, read_pieces
from activation_store.storage import Bytes, Storage


@dataclass(frozen=True, slots=True)
class ShardWrite:
    """`record` is of the file that is there now: the one written, or (`other`) one of other bytes that was there."""

    record: ShardRecord
    other: bool


def write_shard(
    storage: Storage, array: ArrayLayout, shard: int, buffer: np.ndarray[Any, Any], row_chunks: int
) -> ShardWrite:
    """Creates a shard file of the first `row_chunks` row chunks of `buffer` (of `array.buffer_shape`), durably.

    A file that is there stays: no checksum that somebody took of it is ever made wrong. Raises OSError (ENOSPC, ...).
    """
    pieces = shard_pieces(array, buffer, row_chunks)
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    record = ShardRecord(sum(len(piece) for piece in pieces), digest.hexdigest())
    key = array.shard_key(shard)
    if storage.put_if_absent(key, pieces):
        return ShardWrite(record, other=False)
    data = storage.get(key)
    there = ShardRecord(len(data), xxhash.xxh3_64_hexdigest(data))
    return ShardWrite(there, other=there != record)


def shard_pieces(array: ArrayLayout, buffer: np.ndarray[Any, Any], row_chunks: int) -> list[Bytes]:
    """The bytes of a shard file, in order: its chunks, and the index with its checksum."""
    used = row_chunks * array.chunks_abreast
    payload = buffer[:row_chunks].reshape(-1).view(np.uint8)
    chunks: list[Bytes] = [payload.data]
    sizes = np.full(used, array.chunk_bytes)
    if array.compression is not Compression.none:
        chunks = _compressed(array, payload.reshape(used, array.chunk_bytes))
        sizes = np.array([len(chunk) for chunk in chunks])
    index = np.full((array.slots, 2), NO_CHUNK, dtype="<u8")
    index[:used, 0] = np.cumsum(sizes) - sizes
    index[:used, 1] = sizes
    index_bytes = index.tobytes()
    return [*chunks, index_bytes + google_crc32c.value(index_bytes).to_bytes(4, "little")]


def _compressed(array: ArrayLayout, chunks: np.ndarray[Any, Any]) -> list[Bytes]:
    """Each chunk as zarr's Blosc codec compresses it."""
    blosc = numcodecs.Blosc(
        cname=array.compression.value,
        clevel=COMPRESSION_LEVELS[array.compression],
        shuffle=numcodecs.Blosc.BITSHUFFLE,
        blocksize=0,
    )
    return [blosc.encode(chunk.view(array.dtype)) for chunk in chunks]


def adopt_shard(root: Place, array: ArrayLayout, shard: int, buffer: np.ndarray[Any, Any], row_chunks: int) -> None:
    """Fills the first `row_chunks` row chunks of `buffer` with the shard that `write_shard` found in its place.

    Raises DamagedShardError for a file that does not hold as much.
    """
    chunks = buffer[:row_chunks].reshape(-1).view(np.uint8).reshape(-1, array.chunk_bytes)
    read_pieces(root, array, shard, [chunk.data for chunk in chunks], first_slot=0)
