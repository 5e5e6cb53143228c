"""How the kernels of this folder are compiled: numba functions, and C callbacks kept in a cache on disk.

A kernel takes one pointer to a block of int64: a counter of parts, the number of parts, then sizes, addresses and the
bits of floats. Threads draw the next part from the counter until none is left. What a part is never depends on the
number of threads, and no two parts sum into one element, so neither do the results.
"""

import contextlib
import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numba
from llvmlite import ir
from numba import extending, types

P = ParamSpec("P")
T = TypeVar("T")
# Sums may be reordered (that is what vectorises them) and fused; NaN and infinity keep their meaning.
_FAST = {"contract", "reassoc", "nsz"}
# int64 values in the block that a kernel gets.
BLOCK = 32


def helper(function: Callable[P, T]) -> Callable[P, T]:
    """A function for other compiled functions to call."""
    return numba.njit(nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]


def fast_helper(function: Callable[P, T]) -> Callable[P, T]:
    """The same with sums in any order: the inner loops over contiguous slices."""
    return numba.njit(nogil=True, error_model="numpy", fastmath=_FAST)(function)  # type: ignore[no-any-return]


class Kernel:
    """A function of the argument block, compiled on first use."""

    def __init__(self, body: Callable[[Any], None]) -> None:
        self.body = body

    @cached_property
    def compiled(self) -> Any:
        """The C callback; from the cache on disk where one can be written."""
        signature = types.void(types.CPointer(types.int64))
        with _cache_folder():
            try:
                return numba.cfunc(signature, nopython=True, cache=True, error_model="numpy")(self.body)
            except RuntimeError:
                # numba finds no folder that it may write to.
                return numba.cfunc(signature, nopython=True, error_model="numpy")(self.body)

    @cached_property
    def address(self) -> int:
        """Where the machine code lies."""
        return int(self.compiled.address)

    @cached_property
    def function(self) -> Callable[[int], None]:
        """The machine code as a function that lets go of the interpreter while it runs."""
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)


def kernel(body: Callable[[Any], None]) -> Kernel:
    """Decorator: `body(pointer)` as a kernel."""
    return Kernel(body)


@contextlib.contextmanager
def _cache_folder() -> Iterator[None]:
    """numba's cache in a folder named by the digest of these sources.

    numba's own check sees a change of the file that holds a kernel, not of a helper in another file.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    before = numba.config.CACHE_DIR
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = before or os.environ.get("LAYERLOOM_CACHE") or f"{user_cache}/layerloom"
    numba.config.CACHE_DIR = str(Path(root).expanduser() / f"cpu-kernels-{digest.hexdigest()[:16]}")
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def intrinsic(define: Callable[..., Any]) -> Any:
    """A few instructions for compiled functions. `define` gets numba's typing context and the arguments' types."""
    return extending.intrinsic(define)


@intrinsic
def next_part(_: Any, block: Any) -> Any:
    """Add 1 to block[0] atomically; its value before."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(block), generate


def _pointer_to(value_type: Any) -> Any:
    def cast(_: Any, address: Any) -> Any:
        result = types.CPointer(value_type)

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(result))

        return result(address), generate

    return intrinsic(cast)


_float32_pointer = _pointer_to(types.float32)
_float64_pointer = _pointer_to(types.float64)
_int64_pointer = _pointer_to(types.int64)
_int32_pointer = _pointer_to(types.int32)
_uint16_pointer = _pointer_to(types.uint16)
_bool_pointer = _pointer_to(types.boolean)


def _bit_cast(source: Any, target: Any) -> Any:
    def cast(_: Any, value: Any) -> Any:
        assert value == source, f"{value} where {source} is wanted"

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), generate

    return intrinsic(cast)


float32_bits = _bit_cast(types.float32, types.int32)
float32_of_bits = _bit_cast(types.int32, types.float32)
float64_of_bits = _bit_cast(types.int64, types.float64)


@intrinsic
def bfloat16_to_float32(_: Any, bits: Any) -> Any:
    """The float32 of the same value as the bits of a bfloat16."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def candidate_key(_: Any, pre: Any, score: Any) -> Any:
    """int32 that orders scores >= 0 of entries with pre > 0: above 0, NaN (any sign) largest; 0 where pre <= 0."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word, value = ir.IntType(32), ir.FloatType()
        key = builder.add(builder.bitcast(arguments[1], word), ir.Constant(word, 1))
        is_nan = builder.fcmp_unordered("uno", arguments[1], arguments[1])
        key = builder.select(is_nan, ir.Constant(word, 0x7FFFFFFF), key)
        return builder.select(
            builder.fcmp_ordered("<=", arguments[0], ir.Constant(value, 0.0)), ir.Constant(word, 0), key
        )

    return types.int32(types.float32, types.float32), generate


@intrinsic
def order_key(_: Any, score: Any) -> Any:
    """int32 that orders as the float32 does, NaN (of either sign) above all. Give it no -0.0."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        flip = builder.and_(builder.ashr(bits, ir.Constant(word, 31)), ir.Constant(word, 0x7FFFFFFF))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.select(is_nan, ir.Constant(word, 0x7FFFFFFF), builder.xor(bits, flip))

    return types.int32(types.float32), generate


@helper
def block_of(pointer: Any) -> Any:
    """The argument block."""
    return numba.carray(pointer, (BLOCK,))


@helper
def float32_array(address: int, size: int) -> Any:
    """Memory at an address."""
    return numba.carray(_float32_pointer(address), (size,))


@helper
def float64_array(address: int, size: int) -> Any:
    """Memory at an address."""
    return numba.carray(_float64_pointer(address), (size,))


@helper
def int64_array(address: int, size: int) -> Any:
    """Memory at an address."""
    return numba.carray(_int64_pointer(address), (size,))


@helper
def int32_array(address: int, size: int) -> Any:
    """Memory at an address."""
    return numba.carray(_int32_pointer(address), (size,))


@helper
def uint16_array(address: int, size: int) -> Any:
    """Memory at an address."""
    return numba.carray(_uint16_pointer(address), (size,))


@helper
def bool_array(address: int, size: int) -> Any:
    """Memory at an address."""
    return numba.carray(_bool_pointer(address), (size,))
