"""Weighted sums of table rows, the one primitive behind decoding and the row gradients:

    out[i] (+)= sum_{n in offsets[i]:offsets[i+1]} weights[n] * table[ids[n]]

Each output row is summed by one thread in the order of its entries, so two runs are equal bit for bit.
"""

import warnings

import torch
from torch import Tensor
from torch.nn import functional

# Below this width a bag (whose result is a small temporary) beats the sparse product, whose set-up it outweighs.
_WIDE = 1024


def _sparse_product_available() -> bool:
    """Whether torch multiplies CSR by strided matrices in place through MKL (x86 wheels)."""
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    with warnings.catch_warnings():
        # torch says once per process that sparse CSR is in beta.
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))
    return True


_MKL_CSR = _sparse_product_available()


def csr_matrix(offsets: Tensor, ids_N: Tensor, weights_N: Tensor, n_columns: int) -> Tensor:
    """(rows, n_columns) CSR tensor over the given storage."""
    shape = (offsets.numel() - 1, n_columns)
    return torch.sparse_csr_tensor(offsets, ids_N, weights_N, shape, check_invariants=False)


def add_row_sums(
    out_IC: Tensor, offsets: Tensor, ids_N: Tensor, weights_N: Tensor, table_RC: Tensor, *, accumulate: bool = True
) -> None:
    """Add the sums to `out_IC` (any row stride), or overwrite it.

    With a 16-bit table the weights are rounded to its dtype, and so is each row's sum, once, after summing in fp32.
    """
    if ids_N.numel() == 0:
        if not accumulate:
            out_IC.zero_()
        return
    exact = table_RC.dtype == out_IC.dtype and out_IC.dtype in {torch.float32, torch.float64}
    if _MKL_CSR and exact and out_IC.device.type == "cpu" and out_IC.shape[1] >= _WIDE and out_IC.stride(1) == 1:
        matrix = csr_matrix(offsets, ids_N, weights_N, table_RC.shape[0])
        torch.addmm(out_IC, matrix, table_RC, beta=1.0 if accumulate else 0.0, out=out_IC)
        return
    sums_IC = functional.embedding_bag(
        ids_N,
        table_RC.contiguous(),
        offsets,
        mode="sum",
        per_sample_weights=weights_N.to(table_RC.dtype),
        include_last_offset=True,
    )
    if accumulate:
        out_IC.add_(sums_IC)
    else:
        out_IC.copy_(sums_IC)


def row_sums(offsets: Tensor, ids_N: Tensor, weights_N: Tensor, table_RC: Tensor) -> Tensor:
    """(rows, C) sums as a new tensor in the dtype of the weights."""
    out_IC = weights_N.new_empty(offsets.numel() - 1, table_RC.shape[1])
    add_row_sums(out_IC, offsets, ids_N, weights_N, table_RC, accumulate=False)
    return out_IC
