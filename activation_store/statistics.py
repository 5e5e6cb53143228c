"""Scaling statistics of the rows that training uses: float64 sums per block while harvesting, finished when complete.

Used rows: not the first token of a piece (position 0), no special token, and no norm above `outlier_factor` times its
layer's mean norm. The mean norm needs the whole store, so blocks sum over all rows but those of the first two kinds,
and the outliers, few, are read again and subtracted at the end. Everything is computed from the values as stored.

Letters: N rows, n rows of a piece, L layers, D d_model.
"""

import base64
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_store.errors import UserError

# torch splits an operation over threads from one element more on.
SERIAL_ELEMENTS = 32_767
BoolRows = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(slots=True)
class RowSums:
    """Sums over rows: of x and x^2 (L, D) for inputs and outputs, and of their norms (L, 2; inputs first). float64."""

    count: int
    in_sum_LD: Tensor
    in_square_sum_LD: Tensor
    out_sum_LD: Tensor
    out_square_sum_LD: Tensor
    norm_sum_L2: Tensor

    @classmethod
    def zeros(cls, n_layers: int, d_model: int) -> "RowSums":
        """Sums over no rows."""
        shapes = [(n_layers, d_model)] * 4 + [(n_layers, 2)]
        return cls(0, *(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, other: "RowSums", sign: int = 1) -> None:
        """Adds (or with sign -1 subtracts) the sums over other rows."""
        self.count += sign * other.count
        for name in _SUMS:
            getattr(self, name).add_(getattr(other, name), alpha=sign)

    def to_dict(self) -> dict[str, Any]:
        return {"count": self.count} | {name: encode_array(getattr(self, name)) for name in _SUMS}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RowSums":
        return cls(data["count"], *(decode_array(data[name]) for name in _SUMS))


_SUMS = [field.name for field in fields(RowSums) if field.name != "count"]


@dataclass(frozen=True, slots=True)
class ScalingStatistics:
    """Means over the used rows, of inputs and outputs and their squares, (L, D) float64.

    `input_norm_mean_L`, `output_norm_mean_L` are the mean norms that define outliers: over the rows that are neither
    position 0 nor special tokens, outliers included.
    """

    count: int
    in_mean_LD: Tensor
    in_mean_square_LD: Tensor
    out_mean_LD: Tensor
    out_mean_square_LD: Tensor
    input_norm_mean_L: Tensor
    output_norm_mean_L: Tensor

    def to_dict(self) -> dict[str, Any]:
        return {"count": self.count} | {name: encode_array(getattr(self, name)) for name in _MEANS}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ScalingStatistics":
        return cls(data["count"], *(decode_array(data[name]) for name in _MEANS))


_MEANS = [field.name for field in fields(ScalingStatistics) if field.name != "count"]


def sum_chunk(x_LND: Tensor, weight_N: Tensor, sums: tuple[Tensor, Tensor]) -> Tensor:
    """Adds weight-summed x and x^2 of the rows of a chunk to `sums` (L, D); returns the rows' norms (N, L), float64."""
    norms_NL = torch.empty(x_LND.shape[1], x_LND.shape[0], dtype=torch.float64)
    if (native := compiled_sums(x_LND.dtype)) is not None and x_LND.stride(2) == 1:
        native.add(x_LND, weight_N, sums, norms_NL)
    else:
        _sum_plain(x_LND, weight_N, sums, norms_NL)
    return norms_NL


@lru_cache(maxsize=8)
def compiled_sums(dtype: torch.dtype) -> ModuleType | None:
    """The compiled module, where it can be had for this dtype: six times as fast. One thread has to ask first."""
    try:
        from activation_store import compiling, sums_compiled
    except ImportError:
        # No numba, or one that does not fit to what else is installed.
        return None

    if dtype not in sums_compiled.FORMS or not compiling.widens_half():
        return None
    sums_compiled.compiled()
    return sums_compiled


def _sum_plain(x_LND: Tensor, weight_N: Tensor, sums: tuple[Tensor, Tensor], norms_NL: Tensor) -> None:
    """`sum_chunk` by torch, in pieces whose float64 copy stays in the processor's cache and that torch does not split
    over threads: on busy cores waiting for threads took ten times the work, and so the sums do not depend on their
    number.
    """
    _, n_rows, d_model = x_LND.shape
    step = max(1, SERIAL_ELEMENTS // d_model)
    for layer, x_ND in enumerate(x_LND):
        for start in range(0, n_rows, step):
            rows = slice(start, start + step)
            wide_nD = x_ND[rows].double()
            sums[0][layer] += weight_N[rows] @ wide_nD
            wide_nD.square_()
            sums[1][layer] += weight_N[rows] @ wide_nD
            norms_NL[rows, layer] = wide_nD.sum(1).sqrt_()


def sum_rows(mlp_in_NLD: Tensor, mlp_out_NLD: Tensor) -> RowSums:
    """Sums over all the given rows."""
    n_rows, n_layers, d_model = mlp_in_NLD.shape
    sums = RowSums.zeros(n_layers, d_model)
    ones_N = torch.ones(n_rows, dtype=torch.float64)
    in_norms_NL = sum_chunk(mlp_in_NLD.transpose(0, 1), ones_N, (sums.in_sum_LD, sums.in_square_sum_LD))
    out_norms_NL = sum_chunk(mlp_out_NLD.transpose(0, 1), ones_N, (sums.out_sum_LD, sums.out_square_sum_LD))
    sums.count = n_rows
    # Rounded to float32 as they are in the array `norms`.
    sums.norm_sum_L2 += torch.stack([in_norms_NL, out_norms_NL], dim=2).float().double().sum(0)
    return sums


def eligible_rows(
    token_ids: np.ndarray[Any, Any], positions: np.ndarray[Any, Any], special_token_ids: Iterable[int]
) -> BoolRows:
    """Rows that are neither the first token of a piece nor a special token."""
    special = np.isin(token_ids, np.fromiter(special_token_ids, dtype=np.int64))
    rows: BoolRows = (positions > 0) & ~special
    return rows


def outlier_rows(norms_NL2: np.ndarray[Any, Any], norm_mean_L2: np.ndarray[Any, Any], factor: float) -> BoolRows:
    """Rows with a norm, of an input or output of any layer, above `factor` times its mean."""
    return np.asarray((norms_NL2 > factor * norm_mean_L2).any(axis=(1, 2)))


def norm_means(sums: RowSums) -> Tensor:
    """Mean norms (L, 2), inputs first. Raises UserError if no row is left."""
    if sums.count == 0:
        raise UserError(
            "the store has no row to train on: all are first tokens, special tokens or outliers; give more text"
        )
    return sums.norm_sum_L2 / sums.count


def finish(eligible: RowSums, outliers: RowSums) -> ScalingStatistics:
    """The statistics of the eligible rows without the outliers."""
    means_L2 = norm_means(eligible)
    used = RowSums.from_dict(eligible.to_dict())
    used.add(outliers, sign=-1)
    norm_means(used)
    return ScalingStatistics(
        count=used.count,
        in_mean_LD=used.in_sum_LD / used.count,
        in_mean_square_LD=used.in_square_sum_LD / used.count,
        out_mean_LD=used.out_sum_LD / used.count,
        out_mean_square_LD=used.out_square_sum_LD / used.count,
        input_norm_mean_L=means_L2[:, 0].clone(),
        output_norm_mean_L=means_L2[:, 1].clone(),
    )


def encode_array(x: Tensor) -> dict[str, Any]:
    """A float64 tensor as JSON: shape and base64 of its little-endian bytes (exact, and half the size of digits)."""
    data = x.contiguous().numpy().astype("<f8").tobytes()
    return {"dtype": "float64", "shape": list(x.shape), "base64": base64.b64encode(data).decode()}


def decode_array(data: dict[str, Any]) -> Tensor:
    """Inverse of `encode_array`."""
    values = np.frombuffer(base64.b64decode(data["base64"]), dtype="<f8").reshape(data["shape"])
    return torch.from_numpy(values.astype(np.float64))
