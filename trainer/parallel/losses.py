"""The loss of a step: microbatch after microbatch on this rank, and then that of the global batch.

Every engine computes it here and brings its own backward pass, so that they cannot differ in what they train.

Legend: B tokens, L layers, D d_model, F features of a layer.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from activation_store.batch import ActivationBatch
from trainer.config import Precision, RunConfig
from trainer.loss import LossOutput, StepContext, compute_loss
from trainer.model.clt import CrossLayerTranscoder
from trainer.parallel.engine import BatchLoss
from trainer.parallel.mesh import Axis


class LossModule(nn.Module):
    """The loss as a module's forward, for engines that wrap a module.

    autocast: what the forward pass runs under: `train.precision`; an engine whose library has mixed precision of its
    own puts that in its place.
    """

    def __init__(self, config: RunConfig, model: CrossLayerTranscoder) -> None:
        super().__init__()
        self.model = model
        self._config = config
        self.autocast: Callable[[], AbstractContextManager[Any]] = self._own_autocast

    def forward(self, mlp_in_BLD: Tensor, mlp_out_BLD: Tensor, context: StepContext) -> LossOutput:
        """The loss of one microbatch, under the precision of `train.precision`."""
        with self.autocast():
            return compute_loss(
                self.model,
                mlp_in_BLD,
                mlp_out_BLD,
                context,
                activation=self._config.activation,
                kernels=self._config.kernels,
            )

    def _own_autocast(self) -> torch.autocast:
        mixed = self._config.train.precision is Precision.bf16
        return torch.autocast(self.model.threshold_LF.device.type, dtype=torch.bfloat16, enabled=mixed)


class Microbatch(NamedTuple):
    """What this rank has of a microbatch, on the device; `last` of its step."""

    mlp_in_BLD: Tensor
    mlp_out_BLD: Tensor
    last: bool


def step_loss(
    microbatches: Sequence[ActivationBatch],
    run: Callable[[Microbatch], LossOutput],
    model: CrossLayerTranscoder,
    data: Axis,
    *,
    residual: bool,
) -> BatchLoss:
    """Runs forward and backward (`run`) on each microbatch; the losses of the global batch.

    `data`: the axis along which ranks hold other tokens. Every rank waits here for the others.
    """
    device, count = model.threshold_LF.device, len(microbatches)
    parts = []
    for n, batch in enumerate(microbatches):
        mlp_in_BLD, mlp_out_BLD = (x_BLD.to(device, non_blocking=True) for x_BLD in (batch.mlp_in, batch.mlp_out))
        microbatch = Microbatch(mlp_in_BLD, mlp_out_BLD, last=n == count - 1)
        output = run(microbatch)
        parts.append(_detached(output, _residual(model, output, microbatch.mlp_out_BLD) if residual else None))
    return _merged(parts, data)


@torch.no_grad()
def _residual(model: CrossLayerTranscoder, output: LossOutput, mlp_out_BLD: Tensor) -> Tensor:
    """(L) sum over tokens and d of the squared error in raw units."""
    error_BLD = model.scale_targets(mlp_out_BLD).sub_(output.y_hat_BTD).div_(model.target_scale_LD)
    return model.collectives.sum_columns(error_BLD.square_().sum(dim=2).sum(dim=0))


def _detached(output: LossOutput, residual_L: Tensor | None) -> BatchLoss:
    """What is kept of a microbatch: neither its graph nor its reconstruction."""
    return BatchLoss(
        total=output.total.detach(),
        mse=output.mse,
        penalty=output.penalty,
        auxk=output.auxk,
        pre_act=output.pre_act,
        mse_L=output.mse_L,
        l0_L=output.l0_L,
        fired=output.fired,
        batch_threshold_L=output.batch_threshold_L,
        residual_L=residual_L,
    )


def _merged(parts: list[BatchLoss], data: Axis) -> BatchLoss:
    """Means over microbatches and ranks; `fired` by any, the residual summed."""
    scalars = torch.stack([torch.stack([p.total, p.mse, p.penalty, p.auxk, p.pre_act]) for p in parts])
    means = torch.cat([scalars, torch.stack([torch.cat([p.mse_L, p.l0_L]) for p in parts])], dim=1).mean(dim=0)
    residuals = [part.residual_L for part in parts if part.residual_L is not None]
    residual_L = torch.stack(residuals).sum(dim=0) if residuals else None
    fired_LF = torch.stack([torch.stack(part.fired) for part in parts]).any(dim=0)
    thresholds = [part.batch_threshold_L for part in parts if part.batch_threshold_L is not None]
    threshold_mL = torch.stack(thresholds) if thresholds else None
    if data.group is not None and data.size > 1:
        means, residual_L = _sum_floats(means / data.size, residual_L, data.group)
        fired_LF = _any(fired_LF, data.group)
        threshold_mL = _smallest(threshold_mL, data.group)
    total, mse, penalty, auxk, pre_act = means[:5]
    mse_L, l0_L = means[5:].chunk(2)
    return BatchLoss(
        total=total,
        mse=mse,
        penalty=penalty,
        auxk=auxk,
        pre_act=pre_act,
        mse_L=mse_L,
        l0_L=l0_L,
        fired=list(fired_LF),
        # A microbatch in which nothing was selected has NaN, and no say in the mean.
        batch_threshold_L=None if threshold_mL is None else threshold_mL.nanmean(dim=0),
        residual_L=residual_L,
    )


def _sum_floats(means: Tensor, residual_L: Tensor | None, group: dist.ProcessGroup) -> tuple[Tensor, Tensor | None]:
    """Sums over the group, in one message of float64."""
    both = (means if residual_L is None else torch.cat([means, residual_L])).double()
    dist.all_reduce(both, group=group)
    both = both.to(means.dtype)
    return both[: means.numel()], None if residual_L is None else both[means.numel() :]


def _any(fired_LF: Tensor, group: dist.ProcessGroup) -> Tensor:
    as_bytes_LF = fired_LF.to(torch.uint8)
    dist.all_reduce(as_bytes_LF, dist.ReduceOp.MAX, group=group)
    return as_bytes_LF.bool()


def _smallest(threshold_mL: Tensor | None, group: dist.ProcessGroup) -> Tensor | None:
    """Minimum over the group of what is not NaN; NaN where all are."""
    if threshold_mL is None:
        return None
    smallest_mL = threshold_mL.masked_fill(threshold_mL.isnan(), torch.inf)
    dist.all_reduce(smallest_mL, dist.ReduceOp.MIN, group=group)
    return smallest_mL.masked_fill(smallest_mL.isinf(), torch.nan)
