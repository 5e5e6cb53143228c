"""Hugging Face accelerate: its process state, mixed precision and accumulation around torch's DDP.

`Accelerator.prepare(model)` is not used: it wraps the model in a DDP over all processes, which overwrites the parts of
a model that is partitioned over the feature axis with those of rank 0, without an error. DDP here spans the data axis
alone, and accelerate prepares the optimizer.
"""

import warnings
from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from activation_store.batch import ActivationBatch
from trainer.config import Precision, RunConfig
from trainer.loss import LossOutput, StepContext
from trainer.parallel.engine import BatchLoss
from trainer.parallel.losses import Microbatch, step_loss
from trainer.parallel.plain import PlainEngine


class AccelerateEngine(PlainEngine):
    """See Engine. Parameters and optimizer are replicated over the data axis."""

    def _prepare(self, config: RunConfig) -> None:
        train = config.train
        # One process may train one run after another, and these are the process's own.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        self._accelerator = Accelerator(
            cpu=self.model.threshold_LF.device.type == "cpu",
            mixed_precision="bf16" if train.precision is Precision.bf16 else "no",
            gradient_accumulation_steps=train.batch_size_tokens // (train.microbatch_tokens or train.batch_size_tokens),
        )
        self.optimizer.wrap(self._accelerator.prepare_optimizer)
        self._ddp: nn.Module = self.loss
        if self.mesh.data.size > 1:
            with warnings.catch_warnings():
                # torch 2.13 has another name for broadcast_buffers, which older ones do not know.
                warnings.simplefilter("ignore", FutureWarning)
                self._ddp = DistributedDataParallel(
                    self.loss,
                    process_group=self.mesh.data.group,
                    bucket_cap_mb=config.engine.bucket_bytes / 2**20,
                    broadcast_buffers=False,
                    # Every parameter is used. But without this, DDP lays its buckets anew after the first step, and a
                    # resumed run adds the same numbers in another order.
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
                with self._accelerator.autocast():
                    output: LossOutput = self._ddp(microbatch.mlp_in_BLD, microbatch.mlp_out_BLD, context)
                self._accelerator.backward(output.total)
            return output

        return step_loss(microbatches, run, self.model, self.mesh.data, residual=residual)
