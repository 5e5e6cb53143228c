"""What the compiled kernels take: float32 on the CPU, rows with any stride."""

import torch
from torch import Tensor

from trainer.kernels.strides import has_dense_columns


def covers(compute_dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    """Whether a kernel of this folder takes these operands (else the reference does)."""
    return compute_dtype == torch.float32 and all(
        t.dtype == torch.float32 and t.device.type == "cpu" and has_dense_columns(t) for t in tensors if t is not None
    )


def rows_of(table_RC: Tensor) -> tuple[int, int, int]:
    """Address, row stride and extent in values of a 2-d tensor."""
    n_rows, n_columns = table_RC.shape
    stride = table_RC.stride(0) if n_rows > 1 else n_columns
    return table_RC.data_ptr(), stride, max(n_rows - 1, 0) * stride + n_columns if n_rows else 0
