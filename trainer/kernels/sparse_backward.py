"""sparse_backward: gradients of the active values, of decoder and encoder rows, and of biases.

    decoder:  d a_n = grad[token_n] . W_dec[feature_n];   d W_dec[f] = sum_n a_n grad[token_n]
    encoder:  d W_enc[f] = sum_n (d a_n) x[token_n];      d b_enc[f] = sum_n d a_n

Legend: B tokens, F features, C columns of a row, N entries.
"""

import torch
from torch import Tensor

from trainer.kernels.build_csc import FeatureIndex
from trainer.kernels.row_sums import add_row_sums, csr_matrix
from trainer.kernels.strides import check_written

# Values of the gradient in one block of dots: 4 MiB of fp32, which stays in cache.
_BLOCK_VALUES = 2**20


def decoder_backward(
    grad_BC: Tensor,
    rows_FC: Tensor,
    offsets: Tensor,
    feature_ids_N: Tensor,
    tokens_N: Tensor,
    index: FeatureIndex,
    values_N: Tensor,
    compute_dtype: torch.dtype,
    *,
    out_FC: Tensor | None,
    accumulate: bool,
    dots: bool,
) -> Tensor | None:
    """Both gradients of a decoding.

    Returns (N) the gradient of every value, in token-major order (with `dots`, else None). With `out_FC` the rows'
    gradients are written there, or added with `accumulate`; rows without entries get zero, or stay.
    """
    check_written(out_FC=out_FC)
    grad_N = value_gradients(grad_BC, rows_FC, offsets, feature_ids_N, tokens_N, compute_dtype) if dots else None
    if out_FC is not None:
        row_gradients(index, values_N, grad_BC, compute_dtype, out_FC=out_FC, accumulate=accumulate)
    return grad_N


def value_gradients(
    grad_BC: Tensor,
    rows_FC: Tensor,
    offsets: Tensor,
    feature_ids_N: Tensor,
    tokens_N: Tensor,
    compute_dtype: torch.dtype,
) -> Tensor:
    """(N): grad[token] . row[feature] for every entry, without an (N, C) temporary."""
    if feature_ids_N.numel() == 0:
        return grad_BC.new_zeros(0)
    grad, rows_FC = grad_BC.to(compute_dtype), rows_FC.to(compute_dtype)
    if grad.device.type == "cpu" and compute_dtype in {torch.float32, torch.float64}:
        return _sampled_products(grad, rows_FC, offsets, feature_ids_N)
    return entry_dots(grad, rows_FC, feature_ids_N, offsets, tokens_N).to(grad_BC.dtype)


def entry_dots(left_RC: Tensor, right_SC: Tensor, right_ids_N: Tensor, offsets: Tensor, left_ids_N: Tensor) -> Tensor:
    """(N) left[left id] . right[right id] of entries in order of their left ids, which `offsets` (R+1) cuts.

    What autograd of embedding_bag calls; sampled products exist neither in 16 bit nor on every device.
    """
    if left_RC.device.type == "cuda" and left_RC.dtype == torch.bfloat16:
        # There for other dtypes only.
        left_RC, right_SC = left_RC.float(), right_SC.float()
    # On CUDA it reads integers as if they lay side by side.
    codes = (right_ids_N.contiguous(), offsets[:-1].contiguous(), left_ids_N.contiguous())
    dots_N: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(left_RC, right_SC, *codes, 0)
    return dots_N


def _sampled_products(grad_BC: Tensor, rows_FC: Tensor, offsets: Tensor, feature_ids_N: Tensor) -> Tensor:
    """(grad rows^T) at the entries of a CSR pattern, a few MiB of gradients at a time.

    The product wants contiguous gradients; copying all of a strided view at once would cost more than the dots.
    """
    step = max(1, _BLOCK_VALUES // grad_BC.shape[1])
    starts = [*range(0, grad_BC.shape[0], step), grad_BC.shape[0]]
    entries = offsets[torch.tensor(starts)].tolist()
    dots_N = grad_BC.new_zeros(feature_ids_N.numel())
    for block in range(len(starts) - 1):
        tokens, part = slice(starts[block], starts[block + 1]), slice(entries[block], entries[block + 1])
        if part.start == part.stop:
            continue
        block_offsets = offsets[tokens.start : tokens.stop + 1] - part.start
        pattern = csr_matrix(block_offsets, feature_ids_N[part], dots_N[part], rows_FC.shape[0])
        sampled: Tensor = torch.sparse.sampled_addmm(pattern, grad_BC[tokens].contiguous(), rows_FC.t(), beta=0.0)
        dots_N[part] = sampled.values()
    return dots_N


def row_gradients(
    index: FeatureIndex,
    weights_N: Tensor,
    tokens_BC: Tensor,
    compute_dtype: torch.dtype,
    *,
    out_FC: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """(F, C): sum over the tokens of each feature of weight * tokens[token]; weights in token-major order.

    With `out_FC` the sums are written there (or added, with `accumulate`).
    """
    if out_FC is None:
        out_FC = tokens_BC.new_empty(index.offsets.numel() - 1, tokens_BC.shape[1])
    check_written(out_FC=out_FC)
    weights_N = weights_N[index.order_N]
    add_row_sums(out_FC, index.offsets, index.tokens_N, weights_N, tokens_BC.to(compute_dtype), accumulate=accumulate)
    return out_FC


def feature_sums(index: FeatureIndex, weights_N: Tensor) -> Tensor:
    """(F): sum of the weights of each feature, in order of tokens (biases, thresholds, norms)."""
    if weights_N.numel() == 0:
        return weights_N.new_zeros(index.offsets.numel() - 1)
    return torch.segment_reduce(weights_N[index.order_N], "sum", offsets=index.offsets, initial=0)
