"""Which rows training uses, a bit each, and how many come before each chunk: `used_bits.npy`, `used_ends.npy`.

Made when a store is complete, for then the norms that tell outliers need not be read again by every reader; both are
mapped, not read, so that a reader's memory does not grow with the store. A store without them, or half written, is
scanned.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from activation_store.places import Place, write_whole
from activation_store.statistics import BoolRows

BITS, ENDS = "used_bits.npy", "used_ends.npy"
IntRows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class UsedRows:
    """`bits`: (chunks, bytes of a chunk's rows), little end first. `ends`: used rows before each chunk, and all."""

    bits: np.ndarray[Any, np.dtype[np.uint8]]
    ends: IntRows

    @property
    def count(self) -> int:
        """Used rows of the store."""
        return int(self.ends[-1])

    def mask(self, chunk: int, rows: int) -> BoolRows:
        """Which of the first `rows` rows of a chunk are used."""
        return np.unpackbits(self.bits[chunk], count=rows, bitorder="little").view(np.bool_)

    @classmethod
    def of(cls, masks: Iterable[BoolRows], chunks: int, chunk_rows: int) -> "UsedRows":
        """From the masks of all chunks, in order."""
        bits = np.zeros((chunks, -(-chunk_rows // 8)), dtype=np.uint8)
        ends = np.zeros(chunks + 1, dtype=np.int64)
        for chunk, mask in enumerate(masks):
            packed = np.packbits(mask, bitorder="little")
            bits[chunk, : len(packed)] = packed
            ends[chunk + 1] = np.count_nonzero(mask)
        return cls(bits, np.cumsum(ends))

    def save(self, folder: Place) -> None:
        """Writes both files into the folder of a store."""
        for name, values in ((BITS, self.bits), (ENDS, self.ends)):
            file = BytesIO()
            np.save(file, values)
            write_whole(folder / name, file.getvalue())

    @classmethod
    def load(cls, folder: Place, *, chunks: int, chunk_rows: int, count: int) -> "UsedRows | None":
        """Maps the files of a store with so many chunks and used rows; None if they are not there or not of it."""
        try:
            found = cls(_array(folder / BITS), _array(folder / ENDS))
        except (FileNotFoundError, ValueError):
            return None
        if found.bits.shape != (chunks, -(-chunk_rows // 8)) or found.ends.shape != (chunks + 1,):
            return None
        return found if found.count == count else None


def _array(path: Place) -> np.ndarray[Any, Any]:
    """An array that is mapped where it lies on disk, and read where it does not."""
    if isinstance(path, Path):
        return np.asarray(np.load(path, mmap_mode="r"))
    return np.asarray(np.load(BytesIO(path.read_bytes())))
