"""Sums of rows and of their squares in float64, compiled: widened, squared and added in one pass over the values.

Imported when first needed: it imports numba.
"""

from collections.abc import Callable
from functools import lru_cache
from math import sqrt
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from activation_store.compiling import Form, float32_pointer, float64_pointer, mover, native, njit

# Dtypes that can be summed.
FORMS = {torch.float32: Form.float32, torch.float16: Form.float16, torch.bfloat16: Form.bfloat16}
# What the block holds: layers, rows, values of a row; where the first one is, and what the address grows by from layer
# to layer and from row to row; the form; memory for a row in float32; weights (rows); the sums (layers, values) and
# those of squares; norms (rows, layers). float64.
LAYERS, ROWS, WIDTH, SOURCE, LAYER_BYTES, ROW_BYTES, FORM, ROW, WEIGHTS, SUMS, SQUARES, NORMS = range(12)
BLOCK = 12


def add(x_LND: Tensor, weight_N: Tensor, sums: tuple[Tensor, Tensor], norms_NL: Tensor) -> None:
    """As `statistics.sum_chunk`. All but `x_LND`, whose rows lie in one piece, are contiguous and float64."""
    written = (weight_N, *sums, norms_NL)
    assert x_LND.device.type == "cpu" and all(t.is_contiguous() and t.dtype is torch.float64 for t in written)  # noqa: PT018
    n_layers, n_rows, width = x_LND.shape
    row = torch.empty(width)
    size = x_LND.dtype.itemsize
    block = np.array(
        [
            n_layers, n_rows, width, x_LND.data_ptr(), x_LND.stride(0) * size, x_LND.stride(1) * size,
            FORMS[x_LND.dtype], row.data_ptr(), weight_N.data_ptr(), *(total.data_ptr() for total in sums),
            norms_NL.data_ptr(),
        ],
        dtype=np.int64,
    )  # fmt: skip
    compiled()(block.ctypes.data)


@lru_cache(maxsize=1)
def compiled() -> Callable[[int], int]:
    """The compiled function. Threads that ask at the same time would all compile it."""
    return native(_sum)


def _widener(form: Form) -> Any:
    """A function that writes so many values from one address to another, in float32."""
    lanes = 16
    move_lanes, move_one = mover(form, lanes, round_cache=False), mover(form, 1, round_cache=False)

    def widen(target: int, source: int, values: int) -> None:
        for _ in range(values // lanes):
            move_lanes(target, source, _UNSCALED)
            target += 4 * lanes
            source += 2 * lanes
        for _ in range(values % lanes):
            move_one(target, source, _UNSCALED)
            target += 4
            source += 2

    return njit(widen)


_UNSCALED = np.float32(1)
_widen_float16, _widen_bfloat16 = _widener(Form.float16), _widener(Form.bfloat16)
_FLOAT16, _BFLOAT16 = int(Form.float16), int(Form.bfloat16)


# Sums may be reordered, which is what vectorises them, and fused; NaN and infinity keep their meaning.
@numba.njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})  # type: ignore[untyped-decorator]
def _add_row(row: Any, weight: float, sums: Any, squares: Any) -> Any:
    norm = 0.0
    for d in range(len(row)):
        value = np.float64(row[d])
        square = value * value
        sums[d] += weight * value
        squares[d] += weight * square
        norm += square
    return norm


def _sum(pointer: Any) -> Any:
    """Of each layer, row by row."""
    block = numba.carray(pointer, (BLOCK,))
    layers, rows, width, form = block[LAYERS], block[ROWS], block[WIDTH], block[FORM]
    weights = numba.carray(float64_pointer(block[WEIGHTS]), (rows,))
    norms = numba.carray(float64_pointer(block[NORMS]), (rows, layers))
    for layer in range(layers):
        sums = numba.carray(float64_pointer(block[SUMS] + 8 * layer * width), (width,))
        squares = numba.carray(float64_pointer(block[SQUARES] + 8 * layer * width), (width,))
        for n in range(rows):
            source = block[SOURCE] + layer * block[LAYER_BYTES] + n * block[ROW_BYTES]
            at = block[ROW]
            if form == _FLOAT16:
                _widen_float16(at, source, width)
            elif form == _BFLOAT16:
                _widen_bfloat16(at, source, width)
            else:
                at = source
            row = numba.carray(float32_pointer(at), (width,))
            norms[n, layer] = sqrt(_add_row(row, weights[n], sums, squares))
    return 0
