"""Inner loops over contiguous float32 slices. LLVM vectorises them because they are small and take slices."""

import numpy as np

from trainer.kernels.cpu.compiling import fast_helper, helper

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]


@fast_helper
def axpy(y: Vector, a: float, u: Vector) -> None:
    """y += a u."""
    for c in range(y.shape[0]):
        y[c] += a * u[c]


@fast_helper
def axpy4(y: Vector, a: float, u: Vector, b: float, v: Vector, c: float, w: Vector, d: float, x: Vector) -> None:
    """y += a u + b v + c w + d x."""
    for i in range(y.shape[0]):
        y[i] += (a * u[i] + b * v[i]) + (c * w[i] + d * x[i])


@fast_helper
def dot(u: Vector, v: Vector) -> np.float32:
    """u . v."""
    total = np.float32(0)
    for c in range(u.shape[0]):
        total += u[c] * v[c]
    return total


@fast_helper
def dot_axpy(y: Vector, w: Vector, a: float, u: Vector) -> np.float32:
    """y += a u; w . u."""
    total = np.float32(0)
    for c in range(y.shape[0]):
        value = u[c]
        total += value * w[c]
        y[c] += a * value
    return total


@fast_helper
def dot_axpy2(y: Vector, w: Vector, a: float, u: Vector, b: float, v: Vector) -> tuple[np.float32, np.float32]:
    """y += a u + b v; w . u and w . v."""
    total, other = np.float32(0), np.float32(0)
    for c in range(y.shape[0]):
        p, q = u[c], v[c]
        total += p * w[c]
        other += q * w[c]
        y[c] += a * p + b * q
    return total, other


@helper
def squares(u: Vector) -> float:
    """u . u, summed in float32 by pieces of 1024 (some 16 values a lane) and over these in float64."""
    total = 0.0
    for start in range(0, u.shape[0], 1024):
        piece = u[start : min(start + 1024, u.shape[0])]
        total += np.float64(dot(piece, piece))
    return total
