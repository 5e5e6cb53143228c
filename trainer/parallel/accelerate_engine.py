"""Hugging Face accelerate: its process state, mixed precision, accumulation and tracking around torch's DDP.

`Accelerator.prepare(model)` is not used: it wraps the model in a DDP over all processes, which overwrites the parts of
a model that is partitioned over the feature axis with those of rank 0, without an error. DDP here spans the data axis
alone, and accelerate prepares the optimizer.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from activation_store.batch import ActivationBatch
from trainer.config import Precision, RunConfig, WandbMode
from trainer.loss import LossOutput, StepContext
from trainer.parallel.engine import BatchLoss
from trainer.parallel.losses import LossModule, Microbatch, step_loss
from trainer.parallel.plain import PlainEngine


class _WithUnused(nn.Module):
    """The loss, and a parameter that it does not use: without one, DDP says that it needs not look for any."""

    def __init__(self, loss: LossModule) -> None:
        super().__init__()
        self.loss = loss
        parameter = next(loss.parameters())
        self.unused = nn.Parameter(parameter.new_zeros(1))

    def forward(self, mlp_in_BLD: Tensor, mlp_out_BLD: Tensor, context: StepContext) -> LossOutput:
        """See LossModule."""
        output: LossOutput = self.loss(mlp_in_BLD, mlp_out_BLD, context)
        return output


class AccelerateEngine(PlainEngine):
    """See Engine. Parameters and optimizer are replicated over the data axis."""

    def _prepare(self, config: RunConfig) -> None:
        train = config.train
        # One process may train one run after another, and these are the process's own.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self._accelerator = Accelerator(
            cpu=self.model.threshold_LF.device.type == "cpu",
            mixed_precision="bf16" if train.precision is Precision.bf16 else "no",
            gradient_accumulation_steps=train.batch_size_tokens // (train.microbatch_tokens or train.batch_size_tokens),
            log_with=None if config.log.wandb is WandbMode.disabled else "wandb",
        )
        # Of the processes that the mesh is over: DDP's mean is over the data axis, the tracker's process the first.
        state = (self._accelerator.num_processes, self._accelerator.process_index)
        assert state == (self.mesh.size, self.mesh.rank), state
        self.loss.autocast = self._accelerator.autocast
        self.optimizer.wrap(self._accelerator.prepare_optimizer)
        self._ddp: nn.Module = self.loss
        if self.mesh.data.size > 1:
            with warnings.catch_warnings():
                # torch 2.13 has another name for broadcast_buffers, which older ones do not know.
                warnings.simplefilter("ignore", FutureWarning)
                self._ddp = DistributedDataParallel(
                    _WithUnused(self.loss),
                    process_group=self.mesh.data.group,
                    bucket_cap_mb=config.engine.bucket_bytes / 2**20,
                    broadcast_buffers=False,
                    # Without this, DDP lays its buckets anew after the first step, and a resumed run adds the same
                    # numbers in another order.
                    find_unused_parameters=True,
                )

    def backward(
        self, microbatches: Sequence[ActivationBatch], context: StepContext, *, residual: bool = False
    ) -> BatchLoss:
        """See Engine."""
        self.lr = context.lr
        self.optimizer.zero_grad()

        def run(microbatch: Microbatch) -> LossOutput:
            # Counts for itself which microbatch is the last of a step, and leaves DDP's sum for that one.
            with self._accelerator.accumulate(self._ddp):
                output: LossOutput = self._ddp(microbatch.mlp_in_BLD, microbatch.mlp_out_BLD, context)
                self._accelerator.backward(output.total)
            return output

        return step_loss(microbatches, run, self.model, self.mesh.data, residual=residual)

    def start_wandb(self, project: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """See TracksRuns. Not ended by `Accelerator.end_training`, which would take torch.distributed down too."""
        self._accelerator.init_trackers(project, dict(config), {"wandb": dict(options)})
        return self._accelerator.get_tracker("wandb", unwrap=True)
