"""Where a store's rows are: its row chunks, found by arithmetic from the rows of its windows.

A list of all chunks would grow with the store (4 million of them for a billion tokens); this holds four numbers for
every window.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np


@dataclass(frozen=True, slots=True)
class RowChunk:
    """The rows that share inner chunks: where they are in the files, and their logical rows."""

    shard: int
    # Number of the row chunk within its shard.
    row_chunk: int
    first_row: int
    rows: int


class RowChunks(Sequence[RowChunk]):
    """The row chunks of a store in the order of its logical rows, which skip the holes between windows."""

    def __init__(self, blocks: Sequence[tuple[int, int]], *, chunk_rows: int, shard_rows: int) -> None:
        """`blocks`: first row in the arrays, and rows, of each window."""
        self._chunk_rows, self._shard_rows = chunk_rows, shard_rows
        self._starts = np.array([start for start, _ in blocks], dtype=np.int64)
        self._rows = np.array([rows for _, rows in blocks], dtype=np.int64)
        self._first_rows = np.concatenate([[0], np.cumsum(self._rows)])
        self._first_chunks = np.concatenate([[0], np.cumsum(-(-self._rows // chunk_rows))])

    @property
    def n_rows(self) -> int:
        """Logical rows."""
        return int(self._first_rows[-1])

    def __len__(self) -> int:
        return int(self._first_chunks[-1])

    @overload
    def __getitem__(self, number: int) -> RowChunk: ...
    @overload
    def __getitem__(self, number: slice) -> list[RowChunk]: ...
    def __getitem__(self, number: int | slice) -> RowChunk | list[RowChunk]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(f"chunk {number} of {len(self)}")
        # bisect, which keeps the interpreter: np.searchsorted lets go of it, and waits for other threads then.
        block = bisect_right(self._first_chunks, number) - 1
        offset = (number - int(self._first_chunks[block])) * self._chunk_rows
        shard, row = divmod(int(self._starts[block]) + offset, self._shard_rows)
        rows = min(self._chunk_rows, int(self._rows[block]) - offset)
        return RowChunk(shard, row // self._chunk_rows, int(self._first_rows[block]) + offset, rows)

    def number_of(self, row: int) -> int:
        """The chunk that holds a logical row."""
        block = bisect_right(self._first_rows, row) - 1
        return int(self._first_chunks[block]) + (row - int(self._first_rows[block])) // self._chunk_rows

    def pieces(self, start: int, stop: int) -> Iterator[tuple[RowChunk, int, int]]:
        """(chunk, rows to skip in it, rows to take) that make up the logical rows [start, stop)."""
        number = self.number_of(start) if start < stop else 0
        while start < stop:
            chunk = self[number]
            skip = start - chunk.first_row
            take = min(stop, chunk.first_row + chunk.rows) - start
            yield chunk, skip, take
            start += take
            number += 1
