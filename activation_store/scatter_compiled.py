"""Rows of inner chunks to their places in batches, compiled: read, widened to float32 and stored in one pass.

A piece of a file comes into memory that stays in the processor's cache, and goes from there to its place with stores
that go round the cache (nontemporal): a batch is used later, and to fetch its lines before they are overwritten would
cost as much as writing them. Imported when first needed: it imports numba.
"""

import contextlib
import ctypes
import platform
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import xxhash
from llvmlite import ir
from numba import extending, types

from activation_store.cache import cache_root


class Form(IntEnum):
    """What is done to values on their way; float32 is copied, as bytes of any dtype are."""

    copied = 0
    float32 = 0
    float16 = 1
    bfloat16 = 2
    int8 = 3
    float8_e4m3 = 4


# What the block holds: a file, or -1 for memory; the memory, or where a piece of the file is read to, and rows of a
# piece. Layers, and where the offsets of their rows in the source are. Runs, where their (first row, rows, address)
# are, in the order of the source, and what the addresses grow by from layer to layer. Of a row: values, bytes as
# stored, and as given. The form; where the scales (layers, rows) are, float32; rows of the source.
DESCRIPTOR, SOURCE, PIECE_ROWS, LAYERS, OFFSETS, RUNS, RUN_TABLE = range(7)
STRIDE, WIDTH, ROW_BYTES, OUT_BYTES, FORM, SCALES, ROWS = range(7, 14)
BLOCK = 14


def _intrinsic(define: Callable[..., Any]) -> Any:
    """A few instructions for compiled functions. `define` gets numba's typing context and the arguments' types."""
    return extending.intrinsic(define)


def _values(builder: Any, form: Form, source: Any, count: int, scale: Any) -> Any:
    """`count` float32 from the stored values at a pointer to bytes."""
    f32, i32, i16 = (ir.VectorType(kind, count) for kind in (ir.FloatType(), ir.IntType(32), ir.IntType(16)))

    def load(kind: Any) -> Any:
        vector = ir.VectorType(kind, count)
        return builder.load(builder.bitcast(source, vector.as_pointer()), align=1)

    def splat(vector: Any, value: Any) -> Any:
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(i32, [0] * count))

    if form is Form.float16:
        return builder.fpext(load(ir.HalfType()), f32)
    if form is Form.bfloat16:
        wide = builder.zext(load(ir.IntType(16)), i32)
        return builder.bitcast(builder.shl(wide, ir.Constant(i32, [16] * count)), f32)
    if form is Form.int8:
        return builder.fmul(builder.sitofp(load(ir.IntType(8)), f32), splat(f32, scale))
    # As `codec.decode`: the float16 of 2^-8 times the number has the same bits, moved; the sign is in two places.
    moved = builder.shl(builder.sext(load(ir.IntType(8)), i16), ir.Constant(i16, [7] * count))
    bits = builder.and_(moved, ir.Constant(i16, [~(1 << 14)] * count))
    half = builder.bitcast(bits, ir.VectorType(ir.HalfType(), count))
    wide = builder.fmul(builder.fpext(half, f32), ir.Constant(f32, [256.0] * count))
    return builder.fmul(wide, splat(f32, scale))


def _mover(form: Form, count: int, *, whole_line: bool) -> Any:
    """Stores `count` values (bytes, if copied); for a whole line, at a multiple of its 64 bytes, round the cache."""

    def move(_: Any, target: Any, source: Any, scale: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            to, at = (builder.inttoptr(address, ir.IntType(8).as_pointer()) for address in arguments[:2])
            if form is Form.copied:
                vector = ir.VectorType(ir.IntType(8), count)
                value = builder.load(builder.bitcast(at, vector.as_pointer()), align=1)
            else:
                value = _values(builder, form, at, count, arguments[2])
            stored = builder.store(value, builder.bitcast(to, value.type.as_pointer()), align=64 if whole_line else 1)
            if whole_line:
                stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32), generate

    return _intrinsic(move)


@_intrinsic
def _fence(_: Any) -> Any:
    """Stores that went round the cache are seen before what follows."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _pointer_to(value_type: Any) -> Any:
    def cast(_: Any, address: Any) -> Any:
        result = types.CPointer(value_type)

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(result))

        return result(address), generate

    return _intrinsic(cast)


_int64_pointer = _pointer_to(types.int64)
_float32_pointer = _pointer_to(types.float32)


def _njit(function: Callable[..., Any]) -> Any:
    return numba.njit(nogil=True, error_model="numpy")(function)


def _span(form: Form, *, stored_bytes: int, given_bytes: int) -> Any:
    """A function that moves so many values from one address to another."""
    in_line = 64 // given_bytes
    line_bytes = in_line * stored_bytes
    move_line, move_one = _mover(form, in_line, whole_line=True), _mover(form, 1, whole_line=False)

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

    return _njit(move)


_copy = _span(Form.copied, stored_bytes=1, given_bytes=1)
_widen_float16 = _span(Form.float16, stored_bytes=2, given_bytes=4)
_widen_bfloat16 = _span(Form.bfloat16, stored_bytes=2, given_bytes=4)
_widen_int8 = _span(Form.int8, stored_bytes=1, given_bytes=4)
_widen_float8 = _span(Form.float8_e4m3, stored_bytes=1, given_bytes=4)
_pread = types.ExternalFunction("pread", types.int64(types.int32, types.uint64, types.uint64, types.int64))
_COPIED, _FLOAT16, _BFLOAT16, _INT8 = (int(form) for form in list(Form)[:4])
_UNSCALED = np.float32(1)


@_njit
def _move_rows(form: int, target: int, source: int, rows: int, width: int, row_bytes: int, scales: int) -> None:
    """Rows that follow one another on both sides; `scales`: the address of the first one's."""
    if form == _COPIED:
        _copy(target, source, rows * row_bytes, _UNSCALED)
    elif form == _FLOAT16:
        _widen_float16(target, source, rows * width, _UNSCALED)
    elif form == _BFLOAT16:
        _widen_bfloat16(target, source, rows * width, _UNSCALED)
    else:
        scale = numba.carray(_float32_pointer(scales), (rows,))
        for row in range(rows):
            if form == _INT8:
                _widen_int8(target, source, width, scale[row])
            else:
                _widen_float8(target, source, width, scale[row])
            target += 4 * width
            source += row_bytes


@_njit
def _fill(descriptor: int, memory: int, length: int, offset: int) -> Any:
    """0 once so many bytes of a file are there; -1 if it ends before, -2 if reading fails (errno)."""
    done = 0
    while done < length:
        got = _pread(descriptor, memory + done, length - done, offset + done)
        if got <= 0:
            return got - 1
        done += got
    return 0


def _scatter(pointer: Any) -> Any:
    """Of each layer, the runs' rows, a piece of the source at a time. Returns as `_fill`."""
    block = numba.carray(pointer, (BLOCK,))
    descriptor, source, piece_rows, rows = block[DESCRIPTOR], block[SOURCE], block[PIECE_ROWS], block[ROWS]
    layers, n_runs, stride, form, scales = block[LAYERS], block[RUNS], block[STRIDE], block[FORM], block[SCALES]
    width, row_bytes, out_bytes = block[WIDTH], block[ROW_BYTES], block[OUT_BYTES]
    offsets = numba.carray(_int64_pointer(block[OFFSETS]), (layers,))
    runs = numba.carray(_int64_pointer(block[RUN_TABLE]), (n_runs, 3))
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
    _fence()
    return 0


@lru_cache(maxsize=1)
def scatter() -> Callable[[int], int]:
    """The compiled function: takes a block's address, lets go of the interpreter, returns 0, -1 or -2 (see `_fill`).

    ctypes.get_errno() then says why. From the cache on disk where one can be written.
    """
    signature = types.int64(types.CPointer(types.int64))
    with _cache_folder():
        try:
            compiled = numba.cfunc(signature, nopython=True, cache=True, error_model="numpy")(_scatter)
        except RuntimeError:
            # numba finds no folder that it may write to.
            compiled = numba.cfunc(signature, nopython=True, error_model="numpy")(_scatter)
    function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, use_errno=True)(compiled.address)
    # The machine code lives as long as what numba made.
    function.compiled = compiled  # type: ignore[attr-defined]
    return function


@lru_cache(maxsize=1)
def widens_half() -> bool:
    """Whether the processor converts float16 to float32 itself: where not, LLVM calls what may not be there."""
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(llvmlite.binding.get_host_cpu_features().get("f16c"))
    return platform.machine() in ("aarch64", "arm64")


@contextlib.contextmanager
def _cache_folder() -> Iterator[None]:
    """numba's cache in a folder named by the digest of this file, beside those of the compiled kernels."""
    before = numba.config.CACHE_DIR
    digest = xxhash.xxh3_64_hexdigest(Path(__file__).read_bytes())
    numba.config.CACHE_DIR = str(cache_root(before) / f"store-reader-{digest}")
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
