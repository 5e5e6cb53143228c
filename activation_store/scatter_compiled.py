"""Rows of inner chunks to their places in batches, compiled: read, widened to float32 and stored in one pass.

A piece of a file comes into memory that stays in the processor's cache, and goes from there to its place with stores
that go round the cache (nontemporal): a batch is used later, and to fetch its lines before they are overwritten would
cost as much as writing them. Imported when first needed: it imports numba.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba import types

from activation_store.compiling import Form, fence, float32_pointer, int64_pointer, mover, native, njit

# What a block holds: a file, or -1 for memory; the memory, or where a piece of the file is read to, and rows of a
# piece. Layers, and where the offsets of their rows in the source are. Runs, where their (first row, rows, address)
# are, in the order of the source, and what the addresses grow by from layer to layer. Of a row: values, bytes as
# stored, and as given. The form; where the scales (layers, rows) are, float32; rows of the source.
DESCRIPTOR, SOURCE, PIECE_ROWS, LAYERS, OFFSETS, RUNS, RUN_TABLE = range(7)
STRIDE, WIDTH, ROW_BYTES, OUT_BYTES, FORM, SCALES, ROWS = range(7, 14)
BLOCK = 14


def _span(form: Form, *, stored_bytes: int, given_bytes: int) -> Any:
    """A function that moves so many values from one address to another."""
    in_line = 64 // given_bytes
    line_bytes = in_line * stored_bytes
    move_line, move_one = mover(form, in_line, round_cache=True), mover(form, 1, round_cache=False)

    def move(target: int, source: int, values: int, scale: float) -> None:
        while values > 0 and target & 63:
            move_one(target, source, scale)
            target += given_bytes
            source += stored_bytes
            values -= 1
        for _ in range(values // in_line):
            move_line(target, source, scale)
            target += 64
            source += line_bytes
        for _ in range(values % in_line):
            move_one(target, source, scale)
            target += given_bytes
            source += stored_bytes

    return njit(move)


_copy = _span(Form.copied, stored_bytes=1, given_bytes=1)
_widen_float16 = _span(Form.float16, stored_bytes=2, given_bytes=4)
_widen_bfloat16 = _span(Form.bfloat16, stored_bytes=2, given_bytes=4)
_widen_int8 = _span(Form.int8, stored_bytes=1, given_bytes=4)
_widen_float8 = _span(Form.float8_e4m3, stored_bytes=1, given_bytes=4)
_pread = types.ExternalFunction("pread", types.int64(types.int32, types.uint64, types.uint64, types.int64))
_COPIED, _FLOAT16, _BFLOAT16, _INT8 = (int(form) for form in list(Form)[:4])
_UNSCALED = np.float32(1)


@njit
def _move_rows(form: int, target: int, source: int, rows: int, width: int, row_bytes: int, scales: int) -> None:
    """Rows that follow one another on both sides; `scales`: the address of the first one's."""
    if form == _COPIED:
        _copy(target, source, rows * row_bytes, _UNSCALED)
    elif form == _FLOAT16:
        _widen_float16(target, source, rows * width, _UNSCALED)
    elif form == _BFLOAT16:
        _widen_bfloat16(target, source, rows * width, _UNSCALED)
    else:
        scale = numba.carray(float32_pointer(scales), (rows,))
        for row in range(rows):
            if form == _INT8:
                _widen_int8(target, source, width, scale[row])
            else:
                _widen_float8(target, source, width, scale[row])
            target += 4 * width
            source += row_bytes


@njit
def _fill(descriptor: int, memory: int, length: int, offset: int) -> Any:
    """0 once so many bytes of a file are there; -1 if it ends before, -2 if reading fails (errno)."""
    done = 0
    while done < length:
        got = _pread(descriptor, memory + done, length - done, offset + done)
        if got <= 0:
            return got - 1
        done += got
    return 0


@njit
def _scatter_block(address: int) -> Any:
    """Of each layer, the runs' rows, a piece of the source at a time. Returns as `_fill`."""
    block = numba.carray(int64_pointer(address), (BLOCK,))
    descriptor, source, piece_rows, rows = block[DESCRIPTOR], block[SOURCE], block[PIECE_ROWS], block[ROWS]
    layers, n_runs, stride, form, scales = block[LAYERS], block[RUNS], block[STRIDE], block[FORM], block[SCALES]
    width, row_bytes, out_bytes = block[WIDTH], block[ROW_BYTES], block[OUT_BYTES]
    offsets = numba.carray(int64_pointer(block[OFFSETS]), (layers,))
    runs = numba.carray(int64_pointer(block[RUN_TABLE]), (n_runs, 3))
    for layer in range(layers):
        run, row = 0, runs[0, 0]
        while run < n_runs:
            stop, first_row = rows, source + offsets[layer]
            if descriptor >= 0:
                stop = min(row + piece_rows, rows)
                first_row = source - row * row_bytes
                failed = _fill(descriptor, source, (stop - row) * row_bytes, offsets[layer] + row * row_bytes)
                if failed:
                    return failed
            while run < n_runs and runs[run, 0] < stop:
                first, end = max(runs[run, 0], row), min(runs[run, 0] + runs[run, 1], stop)
                target = runs[run, 2] + layer * stride + (first - runs[run, 0]) * out_bytes
                scale = scales + 4 * (layer * rows + first)
                _move_rows(form, target, first_row + first * row_bytes, end - first, width, row_bytes, scale)
                if end < runs[run, 0] + runs[run, 1]:
                    break
                run += 1
            if run < n_runs:
                row = max(stop, runs[run, 0])
    return 0


def _scatter(pointer: Any) -> Any:
    """Block after block: the first number says how many, the second is the first one's address. Returns as `_fill`."""
    number, address = numba.carray(pointer, (2,))
    for _ in range(number):
        failed = _scatter_block(address)
        if failed:
            return failed
        address += 8 * BLOCK
    fence()
    return 0


@lru_cache(maxsize=1)
def scatter() -> Callable[[int], int]:
    """The compiled function: takes the address of what `_scatter` says, returns 0, -1 or -2 (see `_fill`)."""
    return native(_scatter)
