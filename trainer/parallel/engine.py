"""The engine: who owns backward, the gradients' norm, clipping and the update.

The loop in `trainer.train` calls an engine and nothing below it, so that engines that spread the work over devices can
take its place.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from activation_store.batch import ActivationBatch
from trainer.config import Precision, RunConfig
from trainer.loss import LossOutput, StepContext, compute_loss
from trainer.model.clt import CrossLayerTranscoder
from trainer.optimizer import NamedAdam, gradient_norm


@dataclass(slots=True)
class BatchLoss:
    """A batch's losses, means over its microbatches, detached.

    total, mse, penalty, auxk, pre_act: 0-dim, as in LossOutput. mse_L, l0_L: by layer. fired: per layer (F) bool, on
    any microbatch. batch_threshold_L: batchtopk, mean of the smallest selected scores of the microbatches that selected
    anything. residual_L: if asked for, the sum over the batch's tokens and d of the squared error in raw units.
    """

    total: Tensor
    mse: Tensor
    penalty: Tensor
    auxk: Tensor
    pre_act: Tensor
    mse_L: Tensor
    l0_L: Tensor
    fired: list[Tensor]
    batch_threshold_L: Tensor | None
    residual_L: Tensor | None


class Engine(Protocol):
    """What the training loop asks for, in this order, at every step."""

    def backward(
        self, microbatches: Sequence[ActivationBatch], context: StepContext, *, residual: bool = False
    ) -> BatchLoss:
        """Gradients of the mean loss of a step's microbatches (those of the step before are dropped), and what the loss
        was. Each microbatch is what this rank has of it.
        """

    def gradient_norm(self) -> Tensor:
        """The exact global norm of the gradients, 0-dim float64."""

    def update(self, norm: float) -> None:
        """Clips to `optim.clip_norm` given the gradients' norm, and updates the parameters with the context's `lr`."""

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by name: what a checkpoint holds, and where one is loaded into."""

    def master_weights(self) -> AbstractContextManager[None]:
        """While it lasts, the model's parameters are in the best precision there is: to measure, save and load."""


class PlainEngine:
    """One device, plain torch."""

    def __init__(self, config: RunConfig, model: CrossLayerTranscoder) -> None:
        self._config, self._model = config, model
        self._clip_norm = config.optim.clip_norm
        self._device = model.threshold_LF.device
        self._parameters = dict(model.named_parameters())
        self._optimizer = NamedAdam(self._parameters, config.optim, seed=config.model.seed)
        self._lr = 0.0
        # No hook looks at gradients here, so the large ones may be written into memory that lives on.
        model.gradient_buffers.enabled = True
        self._fused = config.optim.fused_update
        if self._fused:
            self._optimizer.register_fused(model.fused_updates)

    def backward(
        self, microbatches: Sequence[ActivationBatch], context: StepContext, *, residual: bool = False
    ) -> BatchLoss:
        """See Engine. Microbatches follow one another and their gradients add up."""
        self._lr = context.lr
        self._optimizer.zero_grad()
        if self._fused:
            self._optimizer.begin_fused(self._lr)
        count = len(microbatches)
        merged: BatchLoss | None = None
        thresholds: list[Tensor] = []
        for microbatch in microbatches:
            mlp_in_BLD, mlp_out_BLD = (
                rows_BLD.to(self._device, non_blocking=True) for rows_BLD in (microbatch.mlp_in, microbatch.mlp_out)
            )
            output = self._loss(mlp_in_BLD, mlp_out_BLD, context)
            (output.total / count).backward()  # type: ignore[no-untyped-call]
            residual_L = self._residual(output, mlp_out_BLD) if residual else None
            merged = _merge(merged, output, residual_L, count)
            if output.batch_threshold_L is not None:
                thresholds.append(output.batch_threshold_L)
        assert merged is not None
        if thresholds:
            # A microbatch in which nothing was selected has NaN, and no say in the mean.
            merged.batch_threshold_L = torch.stack(thresholds).nanmean(dim=0)
        return merged

    def gradient_norm(self) -> Tensor:
        """See Engine."""
        return gradient_norm(self._parameters, self._model.fused_updates.squares())

    def update(self, norm: float) -> None:
        """See Engine."""
        clip = 0 < self._clip_norm < norm
        self._optimizer.step(self._lr, divide_gradients_by=norm / self._clip_norm if clip else 1.0)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """See Engine."""
        return self._optimizer.tensors()

    def master_weights(self) -> AbstractContextManager[None]:
        """See Engine."""
        return self._optimizer.master_weights()

    def _loss(self, mlp_in_BLD: Tensor, mlp_out_BLD: Tensor, context: StepContext) -> LossOutput:
        mixed = self._config.train.precision is Precision.bf16
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=mixed):
            return compute_loss(
                self._model,
                mlp_in_BLD,
                mlp_out_BLD,
                context,
                activation=self._config.activation,
                kernels=self._config.kernels,
            )

    @torch.no_grad()
    def _residual(self, output: LossOutput, mlp_out_BLD: Tensor) -> Tensor:
        """(L) sum over tokens and d of the squared error in raw units."""
        error_BLD = self._model.scale_targets(mlp_out_BLD).sub_(output.y_hat_BTD).div_(self._model.target_scale_LD)
        return error_BLD.square_().sum(dim=2).sum(dim=0)


def build_engine(config: RunConfig, model: CrossLayerTranscoder) -> Engine:
    """The engine that `engine.kind` names, for a model that is on its device."""
    return PlainEngine(config, model)


def _merge(so_far: BatchLoss | None, output: LossOutput, residual_L: Tensor | None, count: int) -> BatchLoss:
    """Adds one of `count` microbatches to the batch's means (all but the threshold's)."""
    part = BatchLoss(
        total=output.total.detach() / count,
        mse=output.mse / count,
        penalty=output.penalty / count,
        auxk=output.auxk / count,
        pre_act=output.pre_act / count,
        mse_L=output.mse_L / count,
        l0_L=output.l0_L / count,
        fired=output.fired,
        batch_threshold_L=None,
        residual_L=residual_L,
    )
    if so_far is None:
        return part
    return BatchLoss(
        total=so_far.total + part.total,
        mse=so_far.mse + part.mse,
        penalty=so_far.penalty + part.penalty,
        auxk=so_far.auxk + part.auxk,
        pre_act=so_far.pre_act + part.pre_act,
        mse_L=so_far.mse_L + part.mse_L,
        l0_L=so_far.l0_L + part.l0_L,
        fired=[before | now for before, now in zip(so_far.fired, part.fired, strict=True)],
        batch_threshold_L=None,
        residual_L=_add(so_far.residual_L, part.residual_L),
    )


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a + b
