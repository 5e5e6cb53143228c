"""What the store's compiled functions are made of, and how they are compiled: numba, and machine code kept on disk.

Imported when first needed: it imports numba.
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


def intrinsic(define: Callable[..., Any]) -> Any:
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


def mover(form: Form, count: int, *, round_cache: bool) -> Any:
    """Stores `count` values (bytes, if copied); round the cache, a whole line at a multiple of its 64 bytes."""

    def move(_: Any, target: Any, source: Any, scale: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            to, at = (builder.inttoptr(address, ir.IntType(8).as_pointer()) for address in arguments[:2])
            if form is Form.copied:
                vector = ir.VectorType(ir.IntType(8), count)
                value = builder.load(builder.bitcast(at, vector.as_pointer()), align=1)
            else:
                value = _values(builder, form, at, count, arguments[2])
            stored = builder.store(value, builder.bitcast(to, value.type.as_pointer()), align=64 if round_cache else 1)
            if round_cache:
                stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32), generate

    return intrinsic(move)


@intrinsic
def fence(_: Any) -> Any:
    """Stores that went round the cache are seen before what follows."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def pointer_to(value_type: Any) -> Any:
    def cast(_: Any, address: Any) -> Any:
        result = types.CPointer(value_type)

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(result))

        return result(address), generate

    return intrinsic(cast)


int64_pointer = pointer_to(types.int64)
float32_pointer = pointer_to(types.float32)
float64_pointer = pointer_to(types.float64)


def njit(function: Callable[..., Any]) -> Any:
    """A function for other compiled functions to call."""
    return numba.njit(nogil=True, error_model="numpy")(function)


def native(function: Callable[[Any], Any]) -> Callable[[int], int]:
    """A compiled function of a block of int64: takes its address and lets go of the interpreter.

    ctypes.get_errno() is that of its last call. From the cache on disk where one can be written.
    """
    signature = types.int64(types.CPointer(types.int64))
    with _cache_folder(Path(function.__code__.co_filename)):
        try:
            compiled = numba.cfunc(signature, nopython=True, cache=True, error_model="numpy")(function)
        except (RuntimeError, OSError):
            # numba finds no folder that it may write to, or no room there.
            compiled = numba.cfunc(signature, nopython=True, error_model="numpy")(function)
    made = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, use_errno=True)(compiled.address)
    # The machine code lives as long as what numba made.
    made.compiled = compiled  # type: ignore[attr-defined]
    return made


@lru_cache(maxsize=1)
def widens_half() -> bool:
    """Whether the processor that numba compiles for converts float16 to float32 itself.

    Where not, LLVM calls what may not be there, and ends the process: no function may so much as mention float16.
    """
    name, features = numba.config.CPU_NAME, numba.config.CPU_FEATURES
    if name not in (None, "host") or features:
        return "+f16c" in (features or "")
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(llvmlite.binding.get_host_cpu_features().get("f16c"))
    return platform.machine() in ("aarch64", "arm64")


@contextlib.contextmanager
def _cache_folder(file: Path) -> Iterator[None]:
    """numba's cache in a folder named by the digest of `file` and this one, beside those of the compiled kernels."""
    before = numba.config.CACHE_DIR
    digest = xxhash.xxh3_64_hexdigest(Path(__file__).read_bytes() + file.read_bytes())
    numba.config.CACHE_DIR = str(cache_root(before) / f"store-{file.stem}-{digest}")
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
