"""FSDP2: parameters, gradients and optimizer sharded over the data axis, by torch's `fully_shard`.

The loss as a whole is one unit: parameters are gathered when a microbatch's forward pass begins, and its gradients are
summed and scattered when its backward pass ends. Units of single layers, whose parameters come and go, would ask every
rank to use the same layers in the same order, where each goes sparse or dense by its own rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from activation_store.batch import ActivationBatch
from trainer.config import RunConfig
from trainer.loss import LossOutput, StepContext
from trainer.model.clt import CrossLayerTranscoder
from trainer.optimizer import NamedAdam
from trainer.parallel.engine import BatchLoss
from trainer.parallel.losses import LossModule, Microbatch, step_loss
from trainer.parallel.mesh import Mesh
from trainer.parallel.norms import global_norm
from trainer.parallel.parts import is_split, piece
from trainer.saving.pieces import Piece, State, whole


class FsdpEngine:
    """See Engine. Every parameter is cut along its first dim, and each rank of the data axis updates its part."""

    def __init__(self, config: RunConfig, model: CrossLayerTranscoder, mesh: Mesh) -> None:
        assert mesh.device_mesh is not None
        self._mesh, self._model = mesh, model
        self._lr, self._clip_norm = 0.0, config.optim.clip_norm
        self._partitions, self._partitioning = model.partitions(), model.collectives.partitioning
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._split = [name for name in self._shapes if is_split(self._partitions[name], self._partitioning)]
        self._loss = LossModule(config, model)
        self._unit = fully_shard(self._loss, mesh=mesh.device_mesh["data"], reshard_after_forward=False)
        # Gloo knows no mean; the loss is divided instead.
        self._unit.set_gradient_divide_factor(1.0)
        self._unit.set_force_sum_reduction_for_comms(True)
        self._sharded = {name: _sharded(parameter) for name, parameter in model.named_parameters()}
        self._shards = {name: nn.Parameter(p.to_local().detach()) for name, p in self._sharded.items()}
        self._optimizer = NamedAdam(self._shards, config.optim, seed=config.model.seed)

    def backward(
        self, microbatches: Sequence[ActivationBatch], context: StepContext, *, residual: bool = False
    ) -> BatchLoss:
        """See Engine."""
        self._lr = context.lr
        for parameter in self._sharded.values():
            parameter.grad = None
        count = len(microbatches) * self._mesh.data.size

        def run(microbatch: Microbatch) -> LossOutput:
            output: LossOutput = self._loss(microbatch.mlp_in_BLD, microbatch.mlp_out_BLD, context)
            (output.total / count).backward()  # type: ignore[no-untyped-call]
            return output

        loss = step_loss(microbatches, run, self._model, self._mesh.data, residual=residual)
        for name, parameter in self._sharded.items():
            self._shards[name].grad = None if parameter.grad is None else _local(parameter.grad)
        return loss

    def gradient_norm(self) -> Tensor:
        """See Engine."""
        return global_norm(self._shards, self._split, self._mesh, sharded=True)

    def update(self, norm: float) -> None:
        """See Engine."""
        clip = 0 < self._clip_norm < norm
        self._optimizer.step(self._lr, divide_gradients_by=norm / self._clip_norm if clip else 1.0)

    def model_state(self) -> State:
        """See Engine."""
        state = {name: self._piece(name, shard) for name, shard in self._shards.items()}
        buffers = dict(self._model.named_buffers())
        return state | {
            name: piece(buffer, self._partitions[name], self._partitioning) for name, buffer in buffers.items()
        }

    def optimizer_state(self) -> State:
        """See Engine."""
        return {
            name: self._piece(name.rpartition(".")[0], tensor) if tensor.ndim else whole(tensor)
            for name, tensor in self._optimizer.tensors().items()
        }

    @contextmanager
    def master_weights(self) -> Iterator[None]:
        """See Engine. Every rank has the whole parameters meanwhile."""
        self._unit.unshard()
        try:
            yield
        finally:
            self._unit.reshard()

    def _piece(self, name: str, shard: Tensor) -> Piece:
        """The box of a parameter's shard, or of a moment of it."""
        shape = self._shapes[name]
        rows = -(-shape[0] // self._mesh.data.size)
        start = min(self._mesh.data.rank * rows, shape[0])
        offsets = (start, *([0] * (len(shape) - 1)))
        return piece(shard, self._partitions[name], self._partitioning, shape=shape, offsets=offsets)


def _sharded(parameter: nn.Parameter) -> DTensor:
    assert isinstance(parameter, DTensor)
    return parameter


def _local(gradient: Tensor) -> Tensor:
    assert isinstance(gradient, DTensor)
    return gradient.to_local()
