"""sparse_decode: all target layers of a source at once.

    y[token, targets] += sum_f a[token, f] * W_dec[f]

W_dec[f] holds the vectors of all targets in one row, aligned with the suffix of y that it is added to.
Legend: B tokens, F features, C = span * d_model columns, N entries.
"""

import torch
from torch import Tensor

from trainer.kernels.row_sums import add_row_sums
from trainer.kernels.strides import check_written


def sparse_decode(
    y_BC: Tensor, offsets: Tensor, feature_ids_N: Tensor, values_N: Tensor, rows_FC: Tensor, compute_dtype: torch.dtype
) -> None:
    """Add the active rows to `y_BC`, a view whose rows may be strided. Rounding: see add_row_sums."""
    check_written(y_BC=y_BC)
    add_row_sums(y_BC, offsets, feature_ids_N, values_N, rows_FC.to(compute_dtype))
