"""One source layer for the benchmark of kernels: its inputs, and how to call each op and what that must move.

Legend: B tokens, D d_model, F features, C columns of a decoder row, K active features per token, N entries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.kernels.batch_threshold import Candidates
from trainer.kernels.build_csc import FeatureIndex
from trainer.kernels.dispatch import REFERENCE, Kernels
from trainer.kernels.encode_topk import Selection, pre_activations
from trainer.kernels.fused_adam_rows import AdamHyper

HYPER = AdamHyper(1e-6, 0.9, 0.999, 1e-8, 0.1, 0.001)
# Tokens from whose pre-activations theta and bandwidth of JumpReLU are set.
_SAMPLE = 256


class LayerShape(NamedTuple):
    """B, D, F, C, K."""

    n_tokens: int
    d_model: int
    n_features: int
    n_columns: int
    k: int

    def __str__(self) -> str:
        return ", ".join(f"{name} = {size}" for name, size in zip("BDFCK", self, strict=True))

    @property
    def bytes_needed(self) -> int:
        """Of a comparison: parameters, moments, gradients and outputs, twice, and a few tables of pre-activations."""
        rows = self.n_features * self.n_columns
        return 4 * (10 * rows + 6 * self.n_tokens * self.n_columns + 4 * self.n_tokens * self.n_features)


@dataclass(kw_only=True, slots=True)
class Inputs:
    """One layer: parameters, a batch, and its codes as the reference selects them."""

    shape: LayerShape
    compute: torch.dtype
    x_BD: Tensor
    W_FD: Tensor
    b_F: Tensor
    rows_FC: Tensor
    moments: tuple[Tensor, Tensor]
    grad_BC: Tensor
    found: Selection
    tokens_N: Tensor
    index: FeatureIndex
    candidates: list[Candidates]
    theta: float
    bandwidth: float


def make_inputs(shape: LayerShape, device: torch.device, parameters: torch.dtype, compute: torch.dtype) -> Inputs:
    """Random ones, and what follows from them."""
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    n_tokens, d_model, n_features, n_columns, k = shape
    x_BD, b_F = random(n_tokens, d_model), random(n_features) * 0.01
    W_FD = (random(n_features, d_model) / n_features**0.5).to(parameters)
    found = REFERENCE.encode_topk(x_BD, W_FD, b_F, k, None, compute)
    tokens_B = torch.arange(n_tokens, device=device)
    tokens_N = tokens_B.repeat_interleave(found.offsets.diff(), output_size=found.feature_ids.numel())
    best = pre_activations(x_BD[:_SAMPLE], W_FD, b_F, compute).view(-1).sort(descending=True).values
    theta, lower = (float(best[times * k * min(_SAMPLE, n_tokens)]) for times in (1, 2))
    return Inputs(
        shape=shape,
        compute=compute,
        x_BD=x_BD,
        W_FD=W_FD,
        b_F=b_F,
        rows_FC=random(n_features, n_columns).to(parameters),
        moments=(random(n_features, n_columns), random(n_features, n_columns).square_()),
        grad_BC=random(n_tokens, n_columns),
        found=found,
        tokens_N=tokens_N,
        index=REFERENCE.build_csc(found.feature_ids, tokens_N, n_features),
        candidates=[
            REFERENCE.encode_candidates(x, W_FD, b_F, k * n_tokens, float("-inf"), None, compute)
            for x in (x_BD, x_BD.flip(1))
        ],
        theta=theta,
        bandwidth=2 * (theta - lower),
    )


class Op(NamedTuple):
    """call(kernels, inputs, scratch) -> results to compare, None for what an op leaves in `scratch` alone.

    scratch: what the op writes into, from `scratch(inputs)`. gathered: values of rows gathered, and streamed: bytes
    otherwise read and written, both functions of the inputs; encodes: its floor is the encoder's product.
    """

    call: Callable[[Kernels, Inputs, list[Tensor]], list[Tensor]]
    gathered: Callable[[Inputs], int] = lambda _: 0
    streamed: Callable[[Inputs], int] = lambda _: 0
    scratch: Callable[[Inputs], list[Tensor]] = lambda _: []
    encodes: bool = False


def positions(found: Selection | None, inputs: Inputs) -> list[Tensor]:
    """token * F + feature of a selection, and its values."""
    assert found is not None
    tokens_B = torch.arange(inputs.shape.n_tokens, device=found.offsets.device)
    tokens_N = tokens_B.repeat_interleave(found.offsets.diff())
    return [tokens_N * inputs.shape.n_features + found.feature_ids, found.values]


def _encode_topk(ops: Kernels, i: Inputs, _: list[Tensor]) -> list[Tensor]:
    return list(ops.encode_topk(i.x_BD, i.W_FD, i.b_F, i.shape.k, None, i.compute))


def _encode_jumprelu(ops: Kernels, i: Inputs, _: list[Tensor]) -> list[Tensor]:
    found = ops.encode_jumprelu(i.x_BD, i.W_FD, i.b_F, i.theta, i.bandwidth, i.compute)
    assert found is not None
    return list(found)


def _encode_candidates(ops: Kernels, i: Inputs, _: list[Tensor]) -> list[Tensor]:
    n = i.shape.k * i.shape.n_tokens
    found = ops.encode_candidates(i.x_BD, i.W_FD, i.b_F, n, float("-inf"), None, i.compute)
    return [found.positions, found.values]


def _decoder_backward(ops: Kernels, i: Inputs, scratch: list[Tensor]) -> list[Tensor]:
    codes = (i.found.offsets, i.found.feature_ids, i.tokens_N, i.index, i.found.values)
    grad_N = ops.decoder_backward(
        i.grad_BC, i.rows_FC, *codes, i.compute, out_FC=scratch[0], accumulate=False, dots=True
    )
    assert grad_N is not None
    return [grad_N, scratch[0]]


def _row_gradients(ops: Kernels, i: Inputs, scratch: list[Tensor]) -> list[Tensor]:
    return [ops.row_gradients(i.index, i.found.values, i.x_BD, i.compute, out_FC=scratch[0])]


def _sparse_decode(ops: Kernels, i: Inputs, scratch: list[Tensor]) -> list[Tensor]:
    ops.sparse_decode(scratch[0], i.found.offsets, i.found.feature_ids, i.found.values, i.rows_FC, i.compute)
    return [scratch[0]]


def _fused_adam_rows(ops: Kernels, i: Inputs, scratch: list[Tensor]) -> list[Tensor]:
    rows_FC, exp_avg, exp_avg_sq, low_BC = scratch
    squares, dots_N = ops.fused_adam_rows(
        rows_FC, exp_avg, exp_avg_sq, i.index, i.found.values, low_BC, HYPER, dots=True
    )
    assert dots_N is not None
    return [squares, dots_N, exp_avg, exp_avg_sq, rows_FC]


def _entries(i: Inputs) -> int:
    return i.found.values.numel()


OPS = {
    "encode_topk": Op(_encode_topk, encodes=True),
    "encode_jumprelu": Op(_encode_jumprelu, encodes=True),
    "encode_candidates": Op(_encode_candidates, encodes=True),
    "batch_threshold": Op(
        lambda ops, i, _: ops.batch_threshold(i.candidates, i.shape.k * i.shape.n_tokens, i.shape.n_features),
        streamed=lambda i: sum(found.scores.numel() * (8 + 4 + 1) for found in i.candidates),
    ),
    "build_csc": Op(
        lambda ops, i, _: list(ops.build_csc(i.found.feature_ids, i.tokens_N, i.shape.n_features)),
        streamed=lambda i: 8 * (4 * _entries(i) + i.shape.n_features),
    ),
    "sparse_decode": Op(
        _sparse_decode,
        gathered=lambda i: _entries(i) * i.shape.n_columns * i.rows_FC.element_size(),
        streamed=lambda i: 2 * 4 * i.grad_BC.numel(),
        scratch=lambda i: [i.grad_BC.clone()],
    ),
    "decoder_backward": Op(
        _decoder_backward,
        gathered=lambda i: _entries(i) * i.shape.n_columns * i.compute.itemsize,
        # Rows that are active, for the dots, and the gradient of every row.
        streamed=lambda i: i.rows_FC.numel() * (i.rows_FC.element_size() + 4),
        scratch=lambda i: [torch.empty_like(i.moments[0])],
    ),
    "row_gradients": Op(
        _row_gradients,
        gathered=lambda i: _entries(i) * i.shape.d_model * i.compute.itemsize,
        streamed=lambda i: i.W_FD.numel() * 4,
        scratch=lambda i: [torch.empty(i.W_FD.shape, device=i.W_FD.device)],
    ),
    "feature_sums": Op(
        lambda ops, i, _: [ops.feature_sums(i.index, i.found.values)],
        streamed=lambda i: 12 * _entries(i) + 12 * i.shape.n_features,
    ),
    "fused_adam_rows": Op(
        _fused_adam_rows,
        gathered=lambda i: _entries(i) * i.shape.n_columns * i.compute.itemsize,
        # Rows and moments, in and out, always in fp32: the fused update has no other.
        streamed=lambda i: 2 * 12 * i.rows_FC.numel(),
        scratch=lambda i: [i.rows_FC.float().clone(), *(m.clone() for m in i.moments), i.grad_BC.to(i.compute)],
    ),
}
