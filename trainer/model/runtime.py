"""What the ops of the model need beside their operands: the kernels, and where the large gradients go.

A gradient of the encoder's or decoder's rows is handed to autograd, or written into a buffer that lives on
(GradientBuffers), or used up by the optimizer's update as it is made (FusedUpdates).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.kernels.build_csc import FeatureIndex
from trainer.kernels.dispatch import Kernels
from trainer.kernels.fused_adam_rows import AdamHyper


@dataclass(slots=True)
class GradientBuffers:
    """Large gradients written straight into memory that lives on from step to step.

    A fresh buffer of many MiB costs a page fault every 4 KiB at every step. When enabled, the backward pass
    writes (or, when a gradient is there already, adds) decoder gradients into `param.grad` itself and hands autograd
    nothing for them; `zero_grad(set_to_none=True)` between steps is right and cheap. Off by default, because hooks on
    gradients (DDP, FSDP, DeepSpeed) and torch.autograd.grad see nothing of it.
    """

    enabled: bool = False
    _kept: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, parameter: Tensor, buffer: Tensor) -> None:
        """Use this memory for the gradient of `parameter` from now on; of its shape, device and gradient's dtype."""
        self._kept[id(parameter)] = buffer

    def take(self, parameter: Tensor) -> tuple[Tensor, bool]:
        """The gradient of `parameter`, and whether to add to it (else its contents are void)."""
        if parameter.grad is not None:
            return parameter.grad, True
        buffer = self._kept.get(id(parameter))
        like = (parameter.shape, parameter.device, gradient_dtype(parameter))
        if buffer is None or (buffer.shape, buffer.device, buffer.dtype) != like:
            buffer = empty_gradient(parameter)
        self._kept[id(parameter)] = buffer
        parameter.grad = buffer
        return buffer, False


@dataclass(slots=True)
class FusedUpdates:
    """Adam's update of W_enc and W_dec inside the backward pass, so that their gradients never exist.

    An optimizer registers the moments of a parameter and gives the constants of each step before its backward pass.
    `begin` must precede every backward pass whose gradients are to be used up; a loss in which a parameter has a second
    gradient (AuxK, penalties on decoder norms) calls `withdraw`, and this step's gradients are written as usual.
    """

    _moments: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _hyper: AdamHyper | None = None
    _updated: dict[int, Tensor] = field(default_factory=dict)

    def register(self, parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Let `parameter` (F, ...) be updated, with these moments, in place."""
        self._moments[id(parameter)] = (exp_avg, exp_avg_sq)

    def begin(self, hyper: AdamHyper) -> None:
        """The next backward pass updates what is registered."""
        self._hyper, self._updated = hyper, {}

    def withdraw(self) -> None:
        """No update until the next `begin`."""
        self._hyper = None

    def takes(self, parameter: Tensor) -> bool:
        """Whether the gradient of `parameter` is used up."""
        return self._hyper is not None and id(parameter) in self._moments

    def updated(self, parameter: Tensor) -> bool:
        """Whether the pass since `begin` has updated it."""
        return id(parameter) in self._updated

    def squares(self) -> list[Tensor]:
        """Sums of squares of the gradients that the pass used up, each 0-dim float64."""
        return list(self._updated.values())

    def update(
        self,
        parameter: Tensor,
        index: FeatureIndex,
        weights_N: Tensor,
        tokens_BC: Tensor,
        runtime: "Runtime",
        *,
        dots: bool,
    ) -> Tensor | None:
        """Gradient rows sum_n weights[n] tokens[token_n], and the update with them; the dots if asked for.

        Raises:
            RuntimeError: a second gradient of a parameter in one pass.
        """
        assert self._hyper is not None
        if id(parameter) in self._updated:
            raise RuntimeError("a parameter has two gradients in a pass of fused updates; withdraw() before backward")
        exp_avg, exp_avg_sq = (moment.flatten(1) for moment in self._moments[id(parameter)])
        rows_FC, tokens_BC = parameter.detach().flatten(1), tokens_BC.to(runtime.compute_dtype)
        squares, dots_N = runtime.kernels.fused_adam_rows(
            rows_FC, exp_avg, exp_avg_sq, index, weights_N, tokens_BC, self._hyper, dots=dots
        )
        self._updated[id(parameter)] = squares
        return dots_N


@dataclass(slots=True)
class Runtime:
    """How the ops run: backend, dtype of the products, and where large gradients go."""

    kernels: Kernels
    buffers: GradientBuffers
    fused: FusedUpdates
    compute_dtype: torch.dtype = torch.float32
    _rounded: tuple[Tensor, Tensor] | None = None

    def gathered(self, grad_BTD: Tensor) -> Tensor:
        """The gradient of y as the layers' backward passes gather it: one rounded copy for all of them on `triton`,
        which would round the columns of each layer anew; elsewhere itself."""
        if self.kernels.name != "triton" or self.compute_dtype != torch.bfloat16:
            return grad_BTD
        if self._rounded is None or self._rounded[0] is not grad_BTD:
            # The old copy goes before the new one comes.
            self._rounded = None
            self._rounded = grad_BTD, grad_BTD.to(self.compute_dtype)
        return self._rounded[1]

    def done_with_gradient(self, targets: range) -> None:
        """A layer's backward pass has what it needs of the gradient; the first layer's turn comes last."""
        if targets.start == 0:
            self._rounded = None


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Gradients of 16-bit parameters are float32: sums over microbatches and losses are rounded once, in the update."""
    return torch.promote_types(parameter.dtype, torch.float32)


def empty_gradient(parameter: Tensor) -> Tensor:
    """Room for the gradient of `parameter`."""
    return torch.empty_like(parameter, dtype=gradient_dtype(parameter), requires_grad=False)


def gradient_target(parameter: Tensor, runtime: Runtime) -> tuple[Tensor, bool]:
    """Where a large gradient is written, and whether it is added to what is there."""
    if runtime.buffers.enabled:
        return runtime.buffers.take(parameter)
    return empty_gradient(parameter), False
