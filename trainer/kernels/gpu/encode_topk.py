"""encode_topk in Triton: a block's product by cuBLAS, then two passes of which the second reads little.

    group marks            the whole product, once            (groups.py)
    best of a token        its marks, 1/32 of its bytes, and about 1.1 k groups; ties: the first   (best_of_token.py)

The host waits once a call, to learn whether all tokens have k entries. `begin_topk` queues all that comes before, so
that the next layer's work can be queued before that wait too.

Legend: B tokens, D d_model, F features, N selected entries.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from trainer.kernels import encode_topk as reference
from trainer.kernels.encode_topk import Selection
from trainer.kernels.gpu.best_of_token import new_scratch, scratch_row_bytes, select
from trainer.kernels.gpu.groups import NORM, PLAIN, Rule, group_size, mark_groups, new_groups, scratch_bytes
from trainer.kernels.gpu.later import Later
from trainer.kernels.gpu.products import block_tokens, has_encoder, token_blocks


def encode_topk(
    x_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, norm_F: Tensor | None, compute_dtype: torch.dtype
) -> Selection:
    """The k best entries of every token, compared in float32. norm_F is not negative. float64: the reference."""
    return begin_topk(x_BD, weight_FD, bias_F, k, norm_F, compute_dtype)()


def begin_topk(
    x_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, k: int, norm_F: Tensor | None, compute_dtype: torch.dtype
) -> Callable[[], Selection]:
    """Queues the work of encode_topk; what it returns waits for that, and gives the result."""
    if not has_encoder(weight_FD, bias_F, compute_dtype):
        found = reference.encode_topk(x_BD, weight_FD, bias_F, k, norm_F, compute_dtype)
        return lambda: found
    n_tokens, n_features = x_BD.shape[0], bias_F.numel()
    k = min(k, n_features)
    rule = Rule(kind=PLAIN) if norm_F is None else Rule(kind=NORM, aux_F=norm_F.contiguous())
    size = group_size(n_features, k)
    row_bytes = n_features * compute_dtype.itemsize + scratch_bytes(n_features, size)
    row_bytes += scratch_row_bytes(n_features, size, k)
    tokens = block_tokens(n_tokens, row_bytes, x_BD.device)
    groups = new_groups(tokens, n_features, size, x_BD.device)
    scratch = new_scratch(tokens, n_features, size, k, x_BD.device)
    ids_BK = torch.empty(n_tokens, k, dtype=torch.int64, device=x_BD.device)
    values_BK = torch.empty(n_tokens, k, dtype=torch.float32, device=x_BD.device)
    counts_B = torch.empty(n_tokens, dtype=torch.int32, device=x_BD.device)
    for block in token_blocks(x_BD, weight_FD, bias_F, compute_dtype, tokens):
        mark_groups(block, rule, groups)
        span = slice(block.first, block.first + block.n_tokens)
        select(block, rule, groups, k, scratch, (ids_BK[span], values_BK[span], counts_B[span]))
    offsets = functional.pad(counts_B.cumsum(0, dtype=torch.int64), (1, 0))
    return partial(_packed, ids_BK, values_BK.to(bias_F.dtype), counts_B, offsets, Later(offsets[-1]))


def _packed(ids_BK: Tensor, values_BK: Tensor, counts_B: Tensor, offsets: Tensor, total: Later) -> Selection:
    """The first counts_B entries of every row, `total` in all."""
    ids, values, n = ids_BK.view(-1), values_BK.view(-1), int(total)
    if n == ids.numel():
        return Selection(offsets, ids, values)
    filled_BK = torch.arange(ids_BK.shape[1], device=ids.device) < counts_B[:, None]
    places = filled_BK.view(-1).nonzero_static(size=n)[:, 0]
    return Selection(offsets, ids[places], values[places])
