"""Plain torch: one device, or gradients summed over the data axis while the backward pass computes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from activation_store.batch import ActivationBatch
from trainer.config import RunConfig
from trainer.kernels.dispatch import dense_adam
from trainer.loss import LossOutput, StepContext
from trainer.model.clt import CrossLayerTranscoder
from trainer.optimizer import NamedAdam
from trainer.parallel.buckets import GradientSum
from trainer.parallel.engine import BatchLoss
from trainer.parallel.losses import LossModule, Microbatch, step_loss
from trainer.parallel.mesh import Mesh
from trainer.parallel.norms import global_norm
from trainer.parallel.parts import is_split, whole_pieces
from trainer.saving.pieces import State


class PlainEngine:
    """See Engine. Parameters and optimizer are replicated over the data axis."""

    def __init__(self, config: RunConfig, model: CrossLayerTranscoder, mesh: Mesh | None = None) -> None:
        self.mesh = mesh if mesh is not None else Mesh()
        self.model, self.loss = model, LossModule(config, model)
        self.lr = 0.0
        self._clip_norm = config.optim.clip_norm
        self._partitions, self._partitioning = model.partitions(), model.collectives.partitioning
        self.parameters = dict(model.named_parameters())
        self._split = [name for name in self.parameters if is_split(self._partitions[name], self._partitioning)]
        self.optimizer = NamedAdam(
            self.parameters, config.optim, seed=config.model.seed, dense_adam=dense_adam(model.kernels)
        )
        self._fused = config.optim.fused_update
        if self._fused:
            self.optimizer.register_fused(model.fused_updates)
        self._sum: GradientSum | None = None
        self._prepare(config)

    def _prepare(self, config: RunConfig) -> None:
        """What the data axis needs."""
        # No hook looks at gradients here, so the large ones may be written into memory that lives on.
        self.model.gradient_buffers.enabled = True
        if self.mesh.data.size > 1:
            self._sum = GradientSum(
                self.parameters, self.mesh.data, self.model.gradient_buffers, bucket_bytes=config.engine.bucket_bytes
            )

    def backward(
        self, microbatches: Sequence[ActivationBatch], context: StepContext, *, residual: bool = False
    ) -> BatchLoss:
        """See Engine. Microbatches follow one another and their gradients add up."""
        self.lr = context.lr
        self.optimizer.zero_grad()
        if self._fused:
            self.optimizer.begin_fused(self.lr)
        # The mean over microbatches and over the data axis.
        count = len(microbatches) * self.mesh.data.size

        def run(microbatch: Microbatch) -> LossOutput:
            output: LossOutput = self.loss(microbatch.mlp_in_BLD, microbatch.mlp_out_BLD, context)
            if self._sum is not None and microbatch.last:
                self._sum.arm()
            (output.total / count).backward()  # type: ignore[no-untyped-call]
            return output

        loss = step_loss(microbatches, run, self.model, self.mesh.data, residual=residual)
        if self._sum is not None:
            self._sum.finish()
        return loss

    def gradient_norm(self) -> Tensor:
        """See Engine."""
        return global_norm(self.parameters, self._split, self.mesh, used_up=self.model.fused_updates.squares())

    def update(self, norm: float) -> None:
        """See Engine."""
        clip = 0 < self._clip_norm < norm
        self.optimizer.step(self.lr, divide_gradients_by=norm / self._clip_norm if clip else 1.0)

    def model_state(self) -> State:
        """See Engine."""
        return whole_pieces(self.model.state_dict(), self._partitions, self._partitioning)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by name, as this rank holds it."""
        return self.optimizer.tensors()

    def optimizer_state(self) -> State:
        """See Engine."""
        return whole_pieces(self.optimizer.tensors(), self._partitions, self._partitioning)

    def master_weights(self) -> AbstractContextManager[None]:
        """See Engine."""
        return self.optimizer.master_weights()
