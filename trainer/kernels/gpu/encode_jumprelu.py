"""encode_jumprelu in Triton: per block one pass counts the kept entries of each group, one writes them in order.

The host waits once a block of tokens, for the size of the result; that is also where it gives up above `max_density`.

Legend: B tokens, D d_model, F features, N selected entries.
"""

import torch
from torch import Tensor
from torch.nn import functional

from trainer.kernels import encode_jumprelu as reference
from trainer.kernels.encode_topk import Selection
from trainer.kernels.gpu.entries import write_entries
from trainer.kernels.gpu.groups import (
    ABOVE,
    BAND,
    Rule,
    group_size,
    list_groups,
    mark_groups,
    new_groups,
    scratch_bytes,
)
from trainer.kernels.gpu.products import block_tokens, has_encoder, token_blocks


def encode_jumprelu(
    x_BD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor,
    theta_F: Tensor | float,
    bandwidth: float,
    compute_dtype: torch.dtype,
    max_density: float = 1.0,
) -> Selection | None:
    """Active and band entries, compared in float32. float64: the reference."""
    if not has_encoder(weight_FD, bias_F, compute_dtype):
        return reference.encode_jumprelu(x_BD, weight_FD, bias_F, theta_F, bandwidth, compute_dtype, max_density)
    n_tokens, n_features = x_BD.shape[0], bias_F.numel()
    limit = max_density * n_tokens * n_features if max_density < 1 else float("inf")
    rule = _rule(theta_F, bandwidth, bias_F)
    size = group_size(n_features, 0)
    row_bytes = n_features * compute_dtype.itemsize + scratch_bytes(n_features, size)
    tokens = block_tokens(n_tokens, row_bytes, x_BD.device)
    groups = new_groups(tokens, n_features, size, x_BD.device)
    one = torch.ones(1, dtype=torch.int32, device=x_BD.device)
    offsets = torch.zeros(n_tokens + 1, dtype=torch.int64, device=x_BD.device)
    ids, values, total = [offsets[:0]], [bias_F[:0]], 0
    for block in token_blocks(x_BD, weight_FD, bias_F, compute_dtype, tokens):
        ends = mark_groups(block, rule, groups).sum(dim=1).cumsum(0)
        found = int(ends[-1])
        if total + found > limit:
            return None
        list_groups(groups, one, block.n_tokens)
        starts = functional.pad(ends[:-1], (1, 0))
        entries = write_entries(block, rule, groups, one, starts, found, row_step=0)
        offsets[block.first + 1 : block.first + 1 + block.n_tokens] = ends + total
        ids.append(entries.places)
        values.append(entries.values.to(bias_F.dtype))
        total += found
    return Selection(offsets, *(parts[-1] if len(parts) == 2 else torch.cat(parts) for parts in (ids, values)))


def _rule(theta_F: Tensor | float, bandwidth: float, bias_F: Tensor) -> Rule:
    if not isinstance(theta_F, Tensor):
        theta_F = torch.full((bias_F.numel(),), theta_F, dtype=torch.float32, device=bias_F.device)
    if bandwidth > 0:
        return Rule(kind=BAND, aux_F=theta_F.contiguous(), low=-bandwidth / 2)
    return Rule(kind=ABOVE, aux_F=theta_F.contiguous())
