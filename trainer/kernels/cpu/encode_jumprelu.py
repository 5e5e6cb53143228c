"""encode_jumprelu, compiled: see above.py.

Legend: B tokens, D d_model, F features, N selected entries.
"""

import torch
from torch import Tensor

from trainer.kernels import encode_jumprelu as reference
from trainer.kernels.cpu.above import Bound, entries_above
from trainer.kernels.cpu.support import covers
from trainer.kernels.encode_topk import Selection


def encode_jumprelu(
    x_BD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor,
    theta_F: Tensor | float,
    bandwidth: float,
    compute_dtype: torch.dtype,
    max_density: float = 1.0,
) -> Selection | None:
    """See the reference; other dtypes than float32 go to it. Stops as soon as `max_density` is passed."""
    theta = torch.full_like(bias_F, theta_F) if isinstance(theta_F, float) else theta_F.contiguous()
    if not covers(compute_dtype, x_BD, weight_FD, bias_F, theta) or 0 in (*x_BD.shape, weight_FD.shape[0]):
        return reference.encode_jumprelu(x_BD, weight_FD, bias_F, theta_F, bandwidth, compute_dtype, max_density)
    shift = -bandwidth / 2 if bandwidth > 0 else 0.0
    # The subtraction in the kernel rounds; what it keeps reaches this value less a slack.
    screen_F = theta + shift - (theta.abs() - shift) * 2.0**-21
    bound = Bound(theta_F=theta, shift=shift, screen_F=screen_F)
    limit = max_density * x_BD.shape[0] * weight_FD.shape[0] if max_density < 1 else float("inf")
    found, total = [], 0
    for entries in entries_above(x_BD, weight_FD, bias_F.contiguous(), bound):
        total += entries.ids.numel()
        if total > limit:
            return None
        found.append(entries)
    offsets = torch.zeros(x_BD.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(torch.cat([entries.counts for entries in found]), dim=0, out=offsets[1:])
    ids_N, values_N = torch.cat([entries.ids for entries in found]), torch.cat([entries.values for entries in found])
    return Selection(offsets, ids_N, values_N)
