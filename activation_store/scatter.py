"""Rows of a chunk to their places in batches, as stored or decoded: compiled where it can be, else by torch and numpy.

Letters: L layers, R rows of the source (from the first one wanted to the last), B rows of a batch, D d_model.
"""

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

from activation_store.codec import Encoded, decode, from_bits
from activation_store.config import StoreDtype
from activation_store.layout import ArrayLayout

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Offsets = np.ndarray[Any, np.dtype[np.int64]]
# (first row of the source, rows, batch, its slot) of rows that stay together, (n, 4), in the order of the source.
Runs = np.ndarray[Any, np.dtype[np.int64]]
# Of a file that are read at a time: they stay in the cache of a processor's core until they are where they belong. A
# layer of a default chunk of 16 bits fits up to a width of 640.
_PIECE_BYTES = 5 << 16
_PAGE_BYTES = 4096
_thread = threading.local()


@dataclass(frozen=True, slots=True)
class Scatter:
    """Where rows of an array go: run i to `columns[batch][layer, slot : slot + rows]`, each (L, B, *tail)."""

    array: ArrayLayout
    runs: Runs
    # Of each batch: arrays of one shape, as stored or, to decode, float32.
    columns: Sequence[np.ndarray[Any, Any]]
    # The store's dtype, where the rows are to be decoded, and their scales (L, R) if it has any.
    decoded: StoreDtype | None = None
    scales: np.ndarray[Any, np.dtype[np.float32]] | None = None

    @property
    def rows(self) -> int:
        """R."""
        return int(self.runs[-1, 0] + self.runs[-1, 1])

    @property
    def source_bytes(self) -> int:
        """Of a layer's R rows."""
        return self.rows * self.array.row_bytes

    def planned(self, descriptor: int, offsets: Offsets, layer: int) -> "Block | None":
        """How to read layers `layer`, `layer + 1`, ... from a file, where each one's R rows begin at its offset.

        For a Plan; None where nothing can be compiled.
        """
        if (native := compiled(self.decoded)) is None:
            return None
        pieces = -(-self.rows // max(1, _PIECE_BYTES // self.array.row_bytes))
        # Of about the same size.
        return self._block(native, descriptor, None, -(-self.rows // pieces), offsets, layer)

    def put(self, data: Bytes, offsets: Offsets, layer: int) -> None:
        """Layers `layer`, `layer + 1`, ... from memory that holds each one's R rows from its offset on."""
        if (native := compiled(self.decoded)) is not None:
            Plan.of([self._block(native, -1, data, 0, offsets, layer)]).run()
            return
        for number, offset in enumerate(offsets.tolist(), layer):
            # A copy: bytes are not writable, as torch wants them, and may lie at any address.
            stored = data[offset : offset + self.source_bytes].copy().view(self.array.dtype)
            self._put_plain(stored.reshape(self.rows, *self.array.tail_shape), number)

    def _put_plain(self, values_RD: np.ndarray[Any, Any], layer: int) -> None:
        if self.decoded is not None:
            scale = None if self.scales is None else torch.from_numpy(self.scales[layer])
            values_RD = decode(Encoded(from_bits(values_RD, self.decoded), scale)).numpy()
        for first, rows, batch, slot in self.runs.tolist():
            self.columns[batch][layer, slot : slot + rows] = values_RD[first : first + rows]

    def _block(
        self, native: ModuleType, descriptor: int, source: Bytes | None, piece_rows: int, offsets: Offsets, layer: int
    ) -> "Block":
        columns, array = self.columns, self.array
        stride, out_bytes = columns[0].strides[:2]
        bases = np.array([_address(column) for column in columns], dtype=np.int64)
        runs = np.empty((len(self.runs), 3), dtype=np.int64)
        runs[:, :2] = self.runs[:, :2]
        runs[:, 2] = bases[self.runs[:, 2]] + self.runs[:, 3] * out_bytes + layer * stride
        scales = 0 if self.scales is None else _address(self.scales[layer:])
        # Of a file, the piece of the thread that will read it.
        address = 0 if source is None else _address(source)
        # In the order of scatter_compiled's DESCRIPTOR, SOURCE, ...
        numbers = [
            descriptor, address, piece_rows, len(offsets), _address(offsets), len(runs), _address(runs),
            stride, array.row_bytes // array.dtype.itemsize, array.row_bytes, out_bytes,
            native.Form[(self.decoded or StoreDtype.float32).value], scales, self.rows,
        ]  # fmt: skip
        return Block(native, numbers, piece_rows * array.row_bytes, (self, source, offsets, runs))


@dataclass(frozen=True, slots=True)
class Block:
    """Numbers for the compiled function, bytes of a piece of a file, and the memory that numbers are addresses of."""

    native: ModuleType
    numbers: list[int]
    piece_bytes: int
    memory: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one call of the compiled function does, in any thread. Takes no memory but one piece for each thread."""

    blocks: Sequence[Block]
    table: Offsets
    piece_bytes: int

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> "Plan":
        """Of one block or more."""
        table = np.array([block.numbers for block in blocks], dtype=np.int64)
        return cls(blocks, table, max(block.piece_bytes for block in blocks))

    def read(self) -> bool:
        """Of files. False if one ends before. Raises OSError."""
        memory = _piece(max(_PIECE_BYTES, self.piece_bytes))
        self.table[:, self.blocks[0].native.SOURCE] = _address(memory)
        while (result := self.run()) < -1:
            # A signal on a network's file system: all is read again, to the same places.
            if (error := ctypes.get_errno()) != errno.EINTR:
                raise OSError(error, os.strerror(error))
        return result == 0

    def run(self) -> int:
        """What the compiled function returns."""
        head = np.array([len(self.blocks), _address(self.table)], dtype=np.int64)
        function: Callable[[int], int] = self.blocks[0].native.scatter()
        return function(_address(head))


def _address(array: np.ndarray[Any, Any]) -> int:
    # Not `ctypes.data`, which makes an object each time.
    address: int = array.__array_interface__["data"][0]
    return address


@lru_cache(maxsize=8)
def compiled(decoded: StoreDtype | None) -> ModuleType | None:
    """The compiled module, where it can be had for what is to be decoded; both ways give the same numbers."""
    try:
        from activation_store import compiling, scatter_compiled
    except ImportError:
        # No numba, or one that does not fit to what else is installed.
        return None

    return scatter_compiled if compiling.widens_half() else None


def _piece(size: int) -> Bytes:
    """This thread's memory for a piece of a file."""
    memory: Bytes | None = getattr(_thread, "memory", None)
    if memory is None or len(memory) < size:
        # The system copies faster to the beginning of a page.
        memory = np.empty(size + _PAGE_BYTES, dtype=np.uint8)
        memory = _thread.memory = memory[-memory.ctypes.data % _PAGE_BYTES :][:size]
    return memory
