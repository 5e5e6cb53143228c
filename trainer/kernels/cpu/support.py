"""What the compiled kernels take: float32 on the CPU, rows with any stride."""

import torch
from torch import Tensor


def covers(compute_dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    """Whether a kernel of this folder takes these operands (else the reference does)."""
    return compute_dtype == torch.float32 and all(
        t.dtype == torch.float32
        and t.device.type == "cpu"
        and (t.numel() == 0 or t.stride(-1) == 1 or t.shape[-1] == 1)
        for t in tensors
        if t is not None
    )


def rows_of(table_RC: Tensor) -> tuple[int, int, int]:
    """Address, row stride and extent in values of a 2-d tensor."""
    n_rows, n_columns = table_RC.shape
    stride = table_RC.stride(0) if n_rows > 1 else n_columns
    return table_RC.data_ptr(), stride, max(n_rows - 1, 0) * stride + n_columns if n_rows else 0
