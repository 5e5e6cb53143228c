"""What compressing activations would save, and cost: ratio, write and read rates, as a markdown table.

    python -m benchmarks.compression STORE            chunks of a harvested store, such as runs/demo/store
    python -m benchmarks.compression STORE --dtype int8 --rows 8192

Inner chunks of the store (rows of one layer), re-encoded to `--dtype`, are compressed and decompressed one by one in
one thread, as the writer and the reader do. The first row is `none`: a copy. `store.compression` offers the rows marked
with its names; the others are what else zarr v3 has (zstd without bitshuffle, higher levels).
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numcodecs
import numpy as np
import torch

from activation_store.codec import encode, stored_bits
from activation_store.config import StoreDtype
from activation_store.layout import COMPRESSION_LEVELS
from activation_store.store import ActivationStore

Bytes = np.ndarray


@dataclass(frozen=True)
class Codec:
    """`numcodecs` codec, or None for a copy."""

    name: str
    codec: numcodecs.abc.Codec | None


def blosc(cname: str, level: int, shuffle: int = numcodecs.Blosc.BITSHUFFLE) -> numcodecs.Blosc:
    return numcodecs.Blosc(cname=cname, clevel=level, shuffle=shuffle, blocksize=0)


CODECS = [
    Codec("none", None),
    *(
        Codec(f"**{kind.value}** (bitshuffle, level {level})", blosc(kind.value, level))
        for kind, level in COMPRESSION_LEVELS.items()
    ),
    Codec("lz4, byte shuffle, level 5", blosc("lz4", 5, numcodecs.Blosc.SHUFFLE)),
    Codec("zstd, bitshuffle, level 5", blosc("zstd", 5)),
    Codec("zstd, no shuffle, level 1", numcodecs.Zstd(level=1)),
]


def chunks_of(store: ActivationStore, dtype: StoreDtype, rows: int) -> dict[str, list[Bytes]]:
    """Inner chunks as they would be stored, of consecutive rows from evenly spread places."""
    size, found = store.layout.chunk_rows, {"mlp_in": [], "mlp_out": []}
    starts = np.linspace(0, max(0, store.n_rows - size), max(1, min(rows, store.n_rows) // size)).astype(int)
    for start in starts:
        read = store[int(start) : int(start) + size]
        for name, chunks in found.items():
            encoded = encode(getattr(read, name).transpose(0, 1).contiguous(), dtype)
            chunks += [stored_bits(layer.contiguous()) for layer in encoded.values]
    return found


def measured(codec: Codec, chunks: list[Bytes]) -> tuple[float, float, float]:
    """(compressed / raw size, raw bytes per second compressed, and decompressed); the better of two passes."""
    raw = sum(chunk.nbytes for chunk in chunks)
    out = np.empty_like(chunks[0])
    if codec.codec is None:
        rate = max(_rate(raw, lambda: [np.copyto(out, chunk) for chunk in chunks]) for _ in range(2))
        return 1.0, rate, rate
    compressed: list[bytes] = []

    def compress() -> None:
        compressed[:] = [codec.codec.encode(chunk) for chunk in chunks]

    write = max(_rate(raw, compress) for _ in range(2))
    read = max(_rate(raw, lambda: [codec.codec.decode(data, out) for data in compressed]) for _ in range(2))
    return sum(len(data) for data in compressed) / raw, write, read


def _rate(size: int, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return size / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="folder of a harvested store")
    parser.add_argument(
        "--dtype", type=StoreDtype, action="append", help="repeatable; default: float16, bfloat16, int8"
    )
    parser.add_argument("--rows", type=int, default=4_096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # As in the reader's and the writer's threads.
    numcodecs.blosc.use_threads = False
    store = ActivationStore.open(arguments.store)
    print(f"{store!r}\n")
    print("| dtype | compression | mlp_in | mlp_out | write GB/s | read GB/s |")
    print("|---|---|---|---|---|---|")
    for dtype in arguments.dtype or [StoreDtype.float16, StoreDtype.bfloat16, StoreDtype.int8]:
        arrays = chunks_of(store, dtype, arguments.rows)
        for codec in CODECS:
            sizes = [measured(codec, chunks)[0] for chunks in arrays.values()]
            _, write, read = measured(codec, [chunk for chunks in arrays.values() for chunk in chunks])
            shown = " | ".join(f"{size:.3f}" for size in sizes)
            print(f"| {dtype.value} | {codec.name} | {shown} | {write / 1e9:.2f} | {read / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
