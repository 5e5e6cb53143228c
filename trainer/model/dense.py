"""The dense path of relu and jumprelu, for layers whose active share is too high for sparse codes.

It computes what EncodeValues, DecodeInto and TanhPenalty compute together, one block of features at a time, and
computes pre-activations anew in the backward pass: at most a fraction of a [B, F] buffer is alive at any time.

Legend: B tokens, D d_model, F features of the source layer, f features of a block, T target layers, C = span * D.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from trainer.kernels.encode_topk import pre_activations
from trainer.model.collectives import Collectives
from trainer.model.functions import (
    add_bias_and_skip,
    bias_and_skip_gradients,
    columns,
)
from trainer.model.runtime import Runtime, empty_gradient, gradient_target


class DenseOutput(NamedTuple):
    """y (B, T, D) after the layer's contribution; number of active entries; sum of tanh(c norm a); fired (F) bool."""

    y_BTD: Tensor
    active_count: Tensor
    tanh_sum: Tensor
    fired_F: Tensor


def feature_blocks(n_features: int) -> list[slice]:
    """Blocks of a quarter of the features, within 256..2048: a block's temporaries stay below two [B, F] buffers."""
    size = min(2048, max(256, -(-n_features // 4)))
    return [slice(start, min(start + size, n_features)) for start in range(0, n_features, size)]


class DenseLayer(Function):
    """One source layer, dense: arguments as in EncodeValues and DecodeInto; `norm_F`, `c` as in TanhPenalty.

    relu is the case of theta = 0 without log_threshold. Outputs: see DenseOutput. Where decoders are split by columns,
    a block's activations go to all devices, in the forward and again in the backward pass, and a gradient for each
    comes back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_BTD: Tensor,
        x_BD: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        log_threshold_F: Tensor | None,
        W_dec: Tensor,
        b_dec: Tensor | None,
        W_skip: Tensor | None,
        norm_F: Tensor | None,
        c: float,
        targets: range,
        bandwidth: float,
        collectives: Collectives,
        runtime: Runtime,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y_BC, rows_FC, dtype = columns(y_BTD, targets), W_dec.flatten(1), runtime.compute_dtype
        fired_F = torch.zeros(W_enc.shape[0], dtype=torch.bool, device=x_BD.device)
        count, tanh_sum = x_BD.new_zeros(()), x_BD.new_zeros(())
        theta_F = log_threshold_F.exp() if log_threshold_F is not None else torch.zeros_like(b_enc)
        for f in feature_blocks(W_enc.shape[0]):
            a_Bf = pre_activations(x_BD, W_enc[f], b_enc[f], dtype)
            active_Bf = ~(a_Bf <= theta_F[f])
            fired_F[f] = active_Bf.any(dim=0)
            count += active_Bf.sum()
            a_Bf.mul_(active_Bf)
            if norm_F is not None:
                tanh_sum += torch.tanh(c * norm_F[f] * a_Bf).sum()
            for owner, part_Bf in enumerate(collectives.gather_block(a_Bf.to(dtype))):
                y_BC += part_Bf @ rows_FC[owned(f, owner, W_enc)].to(dtype)
        add_bias_and_skip(y_BTD[:, targets.start], b_dec, W_skip, x_BD, dtype)
        ctx.save_for_backward(x_BD, W_enc, b_enc, theta_F, norm_F)
        ctx.weight, ctx.targets, ctx.runtime, ctx.bandwidth, ctx.c = W_dec, targets, runtime, bandwidth, c
        ctx.collectives = collectives
        ctx.has_bias, ctx.has_skip, ctx.has_theta = b_dec is not None, W_skip is not None, log_threshold_F is not None
        ctx.mark_dirty(y_BTD)
        ctx.mark_non_differentiable(fired_F)
        return y_BTD, count, tanh_sum, fired_F

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_BTD, grad_count, grad_tanh, _ = grads
        x_BD, W_enc, b_enc, theta_F, norm_F = ctx.saved_tensors
        runtime: Runtime = ctx.runtime
        dtype = runtime.compute_dtype
        grad_BC = columns(grad_BTD, ctx.targets).to(dtype)
        runtime.done_with_gradient(ctx.targets)
        rows_FC = ctx.weight.detach().flatten(1)
        grad_W_dec, accumulate = gradient_target(ctx.weight, runtime)
        grad_W_enc, grad_b_enc = empty_gradient(W_enc), torch.empty_like(b_enc)
        grad_log_theta = torch.empty_like(b_enc) if ctx.has_theta else None
        grad_norm = torch.empty_like(norm_F) if norm_F is not None else None
        for f in feature_blocks(W_enc.shape[0]):
            pre_Bf = pre_activations(x_BD, W_enc[f], b_enc[f], dtype)
            active_Bf = ~(pre_Bf <= theta_F[f])
            band_Bf = (pre_Bf - theta_F[f]).abs() < ctx.bandwidth / 2
            a_Bf = pre_Bf.mul_(active_Bf)
            parts = []
            for owner, part_Bf in enumerate(ctx.collectives.gather_block(a_Bf.to(dtype))):
                rows = owned(f, owner, W_enc)
                parts.append((grad_BC @ rows_FC[rows].to(dtype).t()).to(x_BD.dtype))
                product = (part_Bf.t() @ grad_BC).to(x_BD.dtype)
                if accumulate:
                    grad_W_dec.flatten(1)[rows] += product
                else:
                    grad_W_dec.flatten(1)[rows] = product
            grad_Bf = ctx.collectives.sum_block(parts)
            if norm_F is not None and grad_norm is not None:
                slope_Bf = torch.tanh(a_Bf * (ctx.c * norm_F[f])).square_().neg_().add_(1).mul_(grad_tanh * ctx.c)
                grad_norm[f] = (slope_Bf * a_Bf).sum(dim=0)
                grad_Bf.addcmul_(slope_Bf, norm_F[f])
            if grad_log_theta is not None:
                slope_Bf = (theta_F[f] * grad_Bf).add_(grad_count).mul_(theta_F[f] / -ctx.bandwidth)
                grad_log_theta[f] = slope_Bf.mul_(band_Bf).sum(dim=0)
            grad_Bf.mul_(active_Bf)
            grad_b_enc[f] = grad_Bf.sum(dim=0)
            grad_W_enc[f] = (grad_Bf.to(dtype).t() @ x_BD.to(dtype)).to(x_BD.dtype)
        grad_b, grad_skip = bias_and_skip_gradients(grad_BTD[:, ctx.targets.start], ctx, x_BD)
        written = None if runtime.buffers.enabled else grad_W_dec
        head = (grad_BTD, None, grad_W_enc, grad_b_enc, grad_log_theta, written, grad_b, grad_skip, grad_norm)
        return (*head, None, None, None, None, None)


def owned(features: slice, owner: int, W_enc: Tensor) -> slice:
    """Where the features of a block of device `owner` stand in the rows of a decoder that holds those of all."""
    start = owner * W_enc.shape[0]
    return slice(start + features.start, start + features.stop)
