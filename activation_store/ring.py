"""Rows in shared memory: harvesters write them, training reads them, and their number is fixed.

The ring belongs to its harvesters in equal parts, so that a slow one always finds room for the rows that training waits
for. Two queues of row numbers, in the same memory, go round in each part: of free rows to the harvester, of filled ones
to training. Each queue has one writer and one reader, who tell each other how many numbers they added by a message
(`activation_store.harvesters`): a system call, after which the other process sees what was written before.

Letters: R rows of the ring, n some of them, L layers, D d_model.
"""

import mmap
import os
import tempfile
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from activation_store.layout import ArrayLayout, StoreLayout

IntRows = np.ndarray[Any, np.dtype[np.int64]]
_ID, _INDEX = np.dtype(np.int64), np.dtype(np.int32)


@dataclass(frozen=True, slots=True)
class RingLayout:
    """What lies where: `rows` of the ring, in `parts` equal parts."""

    store: StoreLayout
    rows: int
    parts: int

    @classmethod
    def within(cls, store: StoreLayout, ring_bytes: int, parts: int) -> "RingLayout":
        """As many rows as `ring_bytes` hold, the same number in each part."""
        return cls(store, ring_bytes // row_bytes(store) // parts * parts, parts)

    @property
    def part_rows(self) -> int:
        return self.rows // self.parts

    def arrays(self) -> list[ArrayLayout]:
        """The activations and their scales."""
        return activation_arrays(self.store)

    @property
    def bytes(self) -> int:
        """Of the whole memory."""
        return self.rows * row_bytes(self.store)


def activation_arrays(store: StoreLayout) -> list[ArrayLayout]:
    """`mlp_in`, `mlp_out`, and the scales of the dtypes that have them."""
    scales = [scale for name in ("mlp_in", "mlp_out") if (scale := store.scale(name)) is not None]
    return [store.activations("mlp_in"), store.activations("mlp_out"), *scales]


def row_bytes(store: StoreLayout) -> int:
    """Bytes of the ring that a row takes: its values, where it is from, and its place in both queues."""
    values = sum(prod(array.row_shape) * array.dtype.itemsize for array in activation_arrays(store))
    return values + _ID.itemsize + 2 * _INDEX.itemsize


class Ring:
    """The memory of a ring: of this process (`create`), or of the process that made it (`attach`)."""

    def __init__(self, layout: RingLayout, descriptor: int) -> None:
        """Maps the file `descriptor`, which stays the caller's."""
        self.layout, self.descriptor = layout, descriptor
        self._memory = mmap.mmap(descriptor, layout.bytes)
        whole, offset = np.frombuffer(self._memory, dtype=np.uint8), 0
        self.columns: dict[str, np.ndarray[Any, Any]] = {}

        def take(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
            nonlocal offset
            size = prod(shape) * dtype.itemsize
            offset += size
            return whole[offset - size : offset].view(dtype).reshape(shape)

        # The widest items first: each array is aligned then.
        self.origins: IntRows = take((layout.rows,), _ID)
        for array in sorted(layout.arrays(), key=lambda array: -array.dtype.itemsize):
            if array.dtype.itemsize >= _INDEX.itemsize:
                self.columns[array.name] = take((layout.rows, *array.row_shape), array.dtype)
        queues = take((2, layout.parts, layout.part_rows), _INDEX)
        self.free, self.filled = queues
        for array in layout.arrays():
            if array.name not in self.columns:
                self.columns[array.name] = take((layout.rows, *array.row_shape), array.dtype)

    @classmethod
    def create(cls, layout: RingLayout) -> "Ring":
        """Memory without a name: it is gone with the processes that hold it, however they end."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("layerloom-ring")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.truncate(descriptor, layout.bytes)
        ring = cls(layout, descriptor)
        for part in range(layout.parts):
            ring.free[part] = np.arange(layout.part_rows) + part * layout.part_rows
        return ring

    def close(self) -> None:
        """Gives the memory back, once no array over it is left."""
        self.columns.clear()
        del self.origins, self.free, self.filled
        os.close(self.descriptor)


@dataclass(slots=True)
class RowQueue:
    """One end of a queue of row numbers, (part_rows,) of a ring's memory: it never overflows."""

    memory: np.ndarray[Any, np.dtype[np.int32]]
    at: int = 0

    def put(self, rows: IntRows) -> None:
        """The writer's end: adds numbers."""
        self.memory[self._places(len(rows))] = rows

    def take(self, count: int) -> IntRows:
        """The reader's end: takes numbers that are known to be there."""
        return self.memory[self._places(count)].astype(np.int64)

    def _places(self, count: int) -> IntRows:
        places = (self.at + np.arange(count)) % len(self.memory)
        self.at += count
        return places
