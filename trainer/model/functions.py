"""The autograd of the sparse path: selection has no gradient, these functions attach it to what was selected.

Legend: B tokens, D d_model, F features of the source layer, C = span * d_model columns of a decoder row, T target
layers, N selected entries.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from trainer.kernels.dispatch import Kernels
from trainer.model.features import LayerCodes
from trainer.model.runtime import Runtime, gradient_dtype, gradient_target

# Values of 16-bit rows in one block of norms.
_NORM_BLOCK_VALUES = 2**20


class EncodeValues(Function):
    """Selected pre-activations -> activations, with the gradients of W_enc, b_enc and theta.

        a = pre * H(pre - theta);  count = sum H(pre - theta)
        d a / d pre = H;  d a / d theta = -(theta / eps) 1[|pre - theta| < eps / 2]
        d count / d theta = -(1 / eps) 1[|pre - theta| < eps / 2];  theta = exp(log_threshold)

    Without log_threshold every entry is active. Outputs: values (N) and the number of active entries (0-dim, float).
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight_FD: Tensor,
        bias_F: Tensor,
        log_threshold_F: Tensor | None,
        x_BD: Tensor,
        codes: LayerCodes,
        bandwidth: float,
        runtime: Runtime,
    ) -> tuple[Tensor, Tensor]:
        pre_N = codes.values
        ctx.weight, ctx.codes, ctx.bandwidth, ctx.runtime = weight_FD, codes, bandwidth, runtime
        if log_threshold_F is None:
            ctx.save_for_backward(x_BD)
            return pre_N.clone(), pre_N.new_full((), pre_N.numel())
        theta_N = log_threshold_F.exp()[codes.feature_ids]
        active_N = ~(pre_N <= theta_N)
        band_N = (pre_N - theta_N).abs() < bandwidth / 2
        ctx.save_for_backward(x_BD, theta_N, active_N, band_N)
        return torch.where(active_N, pre_N, 0.0), active_N.sum().to(pre_N.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_N, grad_count = grads
        runtime: Runtime = ctx.runtime
        index = ctx.codes.index(runtime.kernels)
        x_BD, *gate = ctx.saved_tensors
        grad_log_threshold_F = None
        if gate:
            theta_N, active_N, band_N = gate
            slope_N = torch.where(band_N, theta_N * (theta_N * grad_N + grad_count) / -ctx.bandwidth, 0.0)
            grad_log_threshold_F = runtime.kernels.feature_sums(index, slope_N)
            grad_N = torch.where(active_N, grad_N, 0.0)
        grad_b_F = runtime.kernels.feature_sums(index, grad_N)
        grad_W_FD = None
        if runtime.fused.takes(ctx.weight):
            runtime.fused.update(ctx.weight, index, grad_N, x_BD, runtime, dots=False)
        else:
            grad_W_FD = runtime.kernels.row_gradients(index, grad_N, x_BD, runtime.compute_dtype)
        # Nothing asks for this layer's index after its encoder; it would wait for the other layers to be done.
        ctx.codes.forget_index()
        return grad_W_FD, grad_b_F, grad_log_threshold_F, None, None, None, None


class DecodeInto(Function):
    """y[:, targets] += sum_f a_f W_dec[f], and y[:, source] += b_dec + x W_skip^T, in place.

    b_dec, W_skip may be None. `targets` is (first, last + 1). The gradient of y passes through unchanged.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_BTD: Tensor,
        values_N: Tensor,
        weight_FsD: Tensor,
        bias_D: Tensor | None,
        skip_DD: Tensor | None,
        x_BD: Tensor | None,
        codes: LayerCodes,
        targets: range,
        runtime: Runtime,
    ) -> Tensor:
        rows_FC = weight_FsD.flatten(1)
        runtime.kernels.sparse_decode(
            columns(y_BTD, targets), codes.offsets, codes.feature_ids, values_N, rows_FC, runtime.compute_dtype
        )
        add_bias_and_skip(y_BTD[:, targets.start], bias_D, skip_DD, x_BD, runtime.compute_dtype)
        ctx.save_for_backward(values_N, x_BD)
        ctx.weight, ctx.codes, ctx.targets, ctx.runtime = weight_FsD, codes, targets, runtime
        ctx.has_bias, ctx.has_skip = bias_D is not None, skip_DD is not None
        ctx.mark_dirty(y_BTD)
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_BTD = grads[0]
        runtime: Runtime = ctx.runtime
        codes: LayerCodes = ctx.codes
        values_N, x_BD = ctx.saved_tensors
        grad_BC, dots = columns(runtime.gathered(grad_BTD), ctx.targets), ctx.needs_input_grad[1]
        grad_W = None
        if ctx.needs_input_grad[2] and runtime.fused.takes(ctx.weight):
            grad_N = runtime.fused.update(
                ctx.weight, codes.index(runtime.kernels), values_N, grad_BC, runtime, dots=dots
            )
        else:
            out, accumulate = gradient_target(ctx.weight, runtime) if ctx.needs_input_grad[2] else (None, False)
            grad_N = runtime.kernels.decoder_backward(
                grad_BC,
                ctx.weight.detach().flatten(1),
                codes.offsets,
                codes.feature_ids,
                codes.tokens,
                codes.index(runtime.kernels),
                values_N,
                runtime.compute_dtype,
                out_FC=out.flatten(1) if out is not None else None,
                accumulate=accumulate,
                dots=dots,
            )
            grad_W = None if runtime.buffers.enabled else out
        runtime.done_with_gradient(ctx.targets)
        grad_b, grad_skip = bias_and_skip_gradients(grad_BTD[:, ctx.targets.start], ctx, x_BD)
        return grad_BTD, grad_N, grad_W, grad_b, grad_skip, None, None, None, None


class AddBias(Function):
    """y[:, target] += b_dec + x W_skip^T, in place; W_skip may be None. The gradient of y passes through unchanged."""

    @staticmethod
    def forward(
        ctx: Any,
        y_BTD: Tensor,
        bias_D: Tensor,
        skip_DD: Tensor | None,
        x_BD: Tensor | None,
        target: int,
        runtime: Runtime,
    ) -> Tensor:
        add_bias_and_skip(y_BTD[:, target], bias_D, skip_DD, x_BD, runtime.compute_dtype)
        ctx.save_for_backward(x_BD)
        ctx.target, ctx.runtime, ctx.has_bias, ctx.has_skip = target, runtime, True, skip_DD is not None
        ctx.mark_dirty(y_BTD)
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_BD,) = ctx.saved_tensors
        grad_b, grad_skip = bias_and_skip_gradients(grads[0][:, ctx.target], ctx, x_BD)
        return grads[0], grad_b, grad_skip, None, None, None


def columns(y_BTD: Tensor, targets: range) -> Tensor:
    """(B, span * D) view of the target layers of a contiguous (B, T, D) tensor."""
    return y_BTD.flatten(1)[:, targets.start * y_BTD.shape[2] : targets.stop * y_BTD.shape[2]]


def add_bias_and_skip(
    y_BD: Tensor, bias_D: Tensor | None, skip_DD: Tensor | None, x_BD: Tensor | None, compute_dtype: torch.dtype
) -> None:
    """y += b_dec + x W_skip^T, in place."""
    if bias_D is not None:
        y_BD += bias_D
    if skip_DD is not None and x_BD is not None:
        y_BD += x_BD.to(compute_dtype) @ skip_DD.to(compute_dtype).t()


def bias_and_skip_gradients(
    grad_BD: Tensor, ctx: FunctionCtx, x_BD: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of b_dec and W_skip, where the node has them."""
    grad_b = grad_BD.sum(dim=0) if ctx.has_bias else None  # type: ignore[attr-defined]
    if not ctx.has_skip or x_BD is None:  # type: ignore[attr-defined]
        return grad_b, None
    dtype = ctx.runtime.compute_dtype  # type: ignore[attr-defined]
    return grad_b, (grad_BD.to(dtype).t() @ x_BD.to(dtype)).to(grad_BD.dtype)


class SquaredNorms(Function):
    """||row||^2 of every feature over all targets: (F, span, D) -> (F), without a temporary of the weight's size."""

    @staticmethod
    def forward(ctx: Any, weight_FsD: Tensor, runtime: Runtime) -> Tensor:
        ctx.weight, ctx.runtime = weight_FsD, runtime
        return row_norms(weight_FsD.flatten(1)).square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        weight, slope_F11 = ctx.weight.detach(), 2 * grads[0][:, None, None]
        if not ctx.runtime.buffers.enabled:
            return weight * slope_F11, None
        out, accumulate = ctx.runtime.buffers.take(ctx.weight)
        if accumulate:
            out.addcmul_(weight, slope_F11)
        else:
            torch.mul(weight, slope_F11, out=out)
        return None, None


def row_norms(rows_FC: Tensor) -> Tensor:
    """(F) L2 norms; of 16-bit rows in float32, a block at a time, for the sum makes a float32 copy of what it reads."""
    dtype = gradient_dtype(rows_FC)
    block = rows_FC.shape[0] if rows_FC.dtype == dtype else max(1, _NORM_BLOCK_VALUES // rows_FC.shape[1])
    return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=dtype) for part in torch.split(rows_FC, block)])


class TanhPenalty(Function):
    """sum_n tanh(c * norm[feature_n] * a_n) over the entries of one layer; gradients to values and norms."""

    @staticmethod
    def forward(ctx: Any, values_N: Tensor, norm_F: Tensor, c: float, codes: LayerCodes, kernels: Kernels) -> Tensor:
        norm_N = norm_F[codes.feature_ids]
        tanh_N = torch.tanh(c * norm_N * values_N)
        ctx.save_for_backward(values_N, norm_N, tanh_N)
        ctx.c, ctx.codes, ctx.kernels = c, codes, kernels
        return tanh_N.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values_N, norm_N, tanh_N = ctx.saved_tensors
        slope_N = grads[0] * ctx.c * (1 - tanh_N.square())
        grad_norm_F = None
        if ctx.needs_input_grad[1]:
            grad_norm_F = ctx.kernels.feature_sums(ctx.codes.index(ctx.kernels), slope_N * values_N)
        return slope_N * norm_N, grad_norm_F, None, None, None


def tanh_penalty(values_N: Tensor, norm_F: Tensor, c: float, codes: LayerCodes, kernels: Kernels) -> Tensor:
    """0-dim: see TanhPenalty."""
    total: Tensor = TanhPenalty.apply(values_N, norm_F, c, codes, kernels)  # type: ignore[no-untyped-call]
    return total


class SquaredError(Function):
    """(T) sum over tokens and d of error^2 by target layer, without a temporary of the error's size."""

    @staticmethod
    def forward(ctx: Any, y_hat_BTD: Tensor, target_BTD: Tensor) -> tuple[Tensor, Tensor]:
        error_BTD = y_hat_BTD - target_BTD
        ctx.save_for_backward(error_BTD)
        ctx.mark_non_differentiable(error_BTD)
        # Rows first: one float32 norm over tokens and d at once is off by 2e-4 at 1,024 x 576.
        norm_BT: Tensor = torch.linalg.vector_norm(error_BTD, dim=2)
        return norm_BT.square_().sum(dim=0), error_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (error_BTD,) = ctx.saved_tensors
        return error_BTD * (2 * grads[0])[:, None], None


def squared_error(y_hat_BTD: Tensor, target_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error by target layer (T), and the error y_hat - target, detached."""
    squares_T, error_BTD = SquaredError.apply(y_hat_BTD, target_BTD)  # type: ignore[no-untyped-call]
    return squares_T, error_BTD
