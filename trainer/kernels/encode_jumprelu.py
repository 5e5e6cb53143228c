"""encode_jumprelu: pre-activations of one source layer, and those above a threshold or in the band around it.

    active: pre > theta;   band: |pre - theta| < eps / 2 (carries the gradient of theta; active or not)

Legend: B tokens, D d_model, F features, N selected entries.
"""

import torch
from torch import Tensor
from torch.nn import functional

from trainer.kernels.encode_topk import Selection, pre_activations


def encode_jumprelu(
    x_BD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor,
    theta_F: Tensor | float,
    bandwidth: float,
    compute_dtype: torch.dtype,
    max_density: float = 1.0,
) -> Selection | None:
    """Active and band entries with their pre-activations; bandwidth 0: the active ones alone.

    None when their share of all B * F entries exceeds `max_density` (the caller goes dense).
    """
    pre_BF = pre_activations(x_BD, weight_FD, bias_F, compute_dtype)
    # `not <=` keeps NaN, so that a broken encoder shows in the loss.
    if bandwidth > 0:
        kept_BF = ((pre_BF - theta_F) <= -bandwidth / 2).logical_not_()
    else:
        kept_BF = (pre_BF <= theta_F).logical_not_()
    counts_B = kept_BF.sum(dim=1)
    if max_density < 1 and int(counts_B.sum()) > max_density * kept_BF.numel():
        return None
    position_N = kept_BF.view(-1).nonzero()[:, 0]
    offsets = functional.pad(counts_B.cumsum(0), (1, 0))
    return Selection(offsets, position_N % pre_BF.shape[1], pre_BF.view(-1)[position_N])
