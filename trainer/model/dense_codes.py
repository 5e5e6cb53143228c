"""The dense path of topk and batchtopk, for layers that select so many entries that a matrix product beats the gathers.

It computes what EncodeValues and DecodeInto compute together. The codes stay sparse; the activations of a block of
tokens are rebuilt from them, in the forward and again in the backward pass, so that at most two [B, F] buffers live.

Legend: B tokens, b tokens of a block, D d_model, F features of the source layer, T target layers, C = span * D.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from trainer.model.features import LayerCodes
from trainer.model.functions import add_bias_and_skip, bias_and_skip_gradients, columns
from trainer.model.runtime import Runtime, empty_gradient, gradient_target

# Fewer tokens than this leave a processor's matrix product waiting for the weights.
_MIN_BLOCK = 512


class Block(NamedTuple):
    """Tokens that are worked on together, and their entries in the codes."""

    tokens: slice
    entries: slice


def token_blocks(codes: LayerCodes) -> list[Block]:
    """Blocks of a quarter of the tokens, but not below 512."""
    size = max(_MIN_BLOCK, -(-codes.n_tokens // 4))
    starts = [*range(0, codes.n_tokens, size), codes.n_tokens]
    bounds = codes.offsets[starts].tolist()
    return [Block(slice(*starts[i : i + 2]), slice(*bounds[i : i + 2])) for i in range(len(starts) - 1)]


class DenseCodes(Function):
    """One source layer's contribution to y, dense: arguments as in EncodeValues and DecodeInto.

    Gradients flow to the parameters; y's passes through unchanged.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_BTD: Tensor,
        x_BD: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        W_skip: Tensor | None,
        codes: LayerCodes,
        targets: range,
        runtime: Runtime,
    ) -> Tensor:
        y_BC, dtype = columns(y_BTD, targets), runtime.compute_dtype
        rows_FC = W_dec.flatten(1).to(dtype)
        for block in token_blocks(codes):
            _multiply(y_BC[block.tokens], _activations(codes, block, dtype), rows_FC, accumulate=True)
        add_bias_and_skip(y_BTD[:, targets.start], b_dec, W_skip, x_BD, dtype)
        ctx.save_for_backward(x_BD, W_enc, b_enc)
        ctx.weight, ctx.codes, ctx.targets, ctx.runtime = W_dec, codes, targets, runtime
        ctx.has_bias, ctx.has_skip = b_dec is not None, W_skip is not None
        ctx.mark_dirty(y_BTD)
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTD,) = grads
        x_BD, W_enc, b_enc = ctx.saved_tensors
        runtime: Runtime = ctx.runtime
        dtype = runtime.compute_dtype
        grad_BC = columns(grad_BTD, ctx.targets).to(dtype)
        runtime.done_with_gradient(ctx.targets)
        rows_FC = ctx.weight.detach().flatten(1).to(dtype)
        grad_W_dec, accumulate = gradient_target(ctx.weight, runtime)
        grad_W_enc, grad_b_enc = empty_gradient(W_enc).zero_(), empty_gradient(b_enc).zero_()
        for block in token_blocks(ctx.codes):
            b = block.tokens
            a_bF = _activations(ctx.codes, block, dtype)
            _multiply(grad_W_dec.flatten(1), a_bF.t(), grad_BC[b], accumulate=accumulate or b.start > 0)
            grad_bF = grad_BC[b] @ rows_FC.t()
            # Selected entries are positive (or NaN), so this masks by the selection, without a further buffer.
            grad_bF.mul_(a_bF.ne_(0))
            del a_bF
            grad_b_enc += grad_bF.sum(dim=0, dtype=grad_b_enc.dtype)
            _multiply(grad_W_enc, grad_bF.t(), x_BD[b].to(dtype), accumulate=True)
            del grad_bF
        grad_b, grad_skip = bias_and_skip_gradients(grad_BTD[:, ctx.targets.start], ctx, x_BD)
        written = None if runtime.buffers.enabled else grad_W_dec
        return grad_BTD, None, grad_W_enc, grad_b_enc, written, grad_b, grad_skip, None, None, None


class DenseDecode(Function):
    """As DecodeInto, by matrix products: arguments and gradients are the same."""

    @staticmethod
    def forward(
        ctx: Any,
        y_BTD: Tensor,
        values_N: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        W_skip: Tensor | None,
        x_BD: Tensor | None,
        codes: LayerCodes,
        targets: range,
        runtime: Runtime,
    ) -> Tensor:
        y_BC, dtype = columns(y_BTD, targets), runtime.compute_dtype
        codes, rows_FC = codes.detach(), W_dec.flatten(1).to(dtype)
        for block in token_blocks(codes):
            _multiply(y_BC[block.tokens], _activations(codes, block, dtype), rows_FC, accumulate=True)
        add_bias_and_skip(y_BTD[:, targets.start], b_dec, W_skip, x_BD, dtype)
        ctx.save_for_backward(x_BD)
        ctx.weight, ctx.codes, ctx.targets, ctx.runtime = W_dec, codes, targets, runtime
        ctx.has_bias, ctx.has_skip = b_dec is not None, W_skip is not None
        ctx.mark_dirty(y_BTD)
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BTD,) = grads
        (x_BD,) = ctx.saved_tensors
        codes: LayerCodes = ctx.codes
        dtype = ctx.runtime.compute_dtype
        grad_BC = columns(grad_BTD, ctx.targets).to(dtype)
        ctx.runtime.done_with_gradient(ctx.targets)
        rows_FC = ctx.weight.detach().flatten(1).to(dtype)
        grad_W_dec, accumulate = gradient_target(ctx.weight, ctx.runtime)
        grad_N = torch.empty_like(codes.values)
        for block in token_blocks(codes):
            b = block.tokens
            a_bF = _activations(codes, block, dtype)
            _multiply(grad_W_dec.flatten(1), a_bF.t(), grad_BC[b], accumulate=accumulate or b.start > 0)
            torch.mm(grad_BC[b], rows_FC.t(), out=a_bF)
            grad_N[block.entries] = a_bF.view(-1)[_places(codes, block)].to(grad_N.dtype)
        grad_b, grad_skip = bias_and_skip_gradients(grad_BTD[:, ctx.targets.start], ctx, x_BD)
        written = None if ctx.runtime.buffers.enabled else grad_W_dec
        return grad_BTD, grad_N, written, grad_b, grad_skip, None, None, None, None


def _places(codes: LayerCodes, block: Block) -> Tensor:
    """(n) places of a block's entries in its flat (b, F) activations."""
    n_tokens, n_entries = block.tokens.stop - block.tokens.start, block.entries.stop - block.entries.start
    counts_b = codes.offsets[block.tokens.start : block.tokens.stop + 1].diff()
    row_starts_b = torch.arange(n_tokens, device=counts_b.device) * codes.n_features
    places_n = row_starts_b.repeat_interleave(counts_b, output_size=n_entries)
    return places_n.add_(codes.feature_ids[block.entries])


def _activations(codes: LayerCodes, block: Block, dtype: torch.dtype) -> Tensor:
    """(b, F) activations of the tokens of a block."""
    a_bF = codes.values.new_zeros(block.tokens.stop - block.tokens.start, codes.n_features, dtype=dtype)
    a_bF.view(-1)[_places(codes, block)] = codes.values[block.entries].to(dtype)
    return a_bF


def _multiply(out: Tensor, left: Tensor, right: Tensor, *, accumulate: bool) -> None:
    """out = left @ right, or added to what is there; rounded once when the product is of 16 bits."""
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, beta=1.0 if accumulate else 0.0, out=out)
    elif accumulate:
        out += left @ right
    else:
        out.copy_(left @ right)
