"""The engine: who owns backward, the gradients' norm, clipping and the update.

The loop in `trainer.loop` calls an engine and nothing below it, so that engines that spread the work over devices can
take its place.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from activation_store.batch import ActivationBatch
from activation_store.errors import UserError
from trainer.config import EngineKind, RunConfig
from trainer.loss import StepContext
from trainer.model.clt import CrossLayerTranscoder
from trainer.parallel.mesh import Mesh
from trainer.saving.pieces import State


@dataclass(slots=True)
class BatchLoss:
    """The global batch's losses, means over its microbatches, detached; the same on all ranks but for `fired`.

    total, mse, penalty, auxk, pre_act: 0-dim, as in LossOutput. mse_L, l0_L: by layer. fired: per layer (F) bool, on
    any microbatch, of the features that this rank encodes. batch_threshold_L: batchtopk, mean of the smallest selected
    scores of the microbatches that selected anything. residual_L: if asked for, the sum over the batch's tokens and d
    of the squared error in raw units.
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

    def model_state(self) -> State:
        """Parameters and buffers as this rank's boxes of the serial model's tensors, by its names; all ranks together
        have every number. Views of what is trained: a checkpoint is written from them, and loaded into them in place.
        To be asked for, and loaded into, while `master_weights` lasts.
        """

    def optimizer_state(self) -> State:
        """Adam's `<parameter>.step`, `.exp_avg` and `.exp_avg_sq`, in the same way; zeros before the first step."""

    def master_weights(self) -> AbstractContextManager[None]:
        """While it lasts, the model's parameters are whole (but for the feature axis) and in the best precision there
        is: to measure, save and load. All ranks enter it together.
        """


@runtime_checkable
class TracksRuns(Protocol):
    """An engine whose library starts runs of Weights & Biases itself."""

    def start_wandb(self, project: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """The wandb run. options: of `wandb.init`, beside project and config. On the first process alone."""


def check_engine(kind: EngineKind) -> None:
    """Raises UserError where the engine's library is not installed: before anything is written."""
    if kind is EngineKind.deepspeed and find_spec("deepspeed") is None:
        raise UserError(
            "engine=deepspeed: deepspeed is not installed; `DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed` "
            "installs it, or use engine=plain"
        )


def engine_name(config: RunConfig, mesh: Mesh) -> str:
    """The engine that `build_engine` builds, for the log."""
    kind = _kind_that_runs(config, mesh)
    reason = "" if kind is config.engine.kind else f" ({config.engine.kind} has nothing to shard with parallel.data=1)"
    return f"{kind}{reason}"


def _kind_that_runs(config: RunConfig, mesh: Mesh) -> EngineKind:
    kind = config.engine.kind
    return EngineKind.plain if kind is EngineKind.fsdp and mesh.data.size == 1 else kind


def build_engine(config: RunConfig, model: CrossLayerTranscoder, mesh: Mesh | None = None) -> Engine:
    """The engine that `engine.kind` names, for a model that is on its device and of this rank's partition."""
    mesh = mesh if mesh is not None else Mesh()
    kind = _kind_that_runs(config, mesh)
    # Imported when asked for: an engine's library is slow to import, or not installed.
    if kind is EngineKind.fsdp:
        from trainer.parallel.fsdp import FsdpEngine

        return FsdpEngine(config, model, mesh)
    if kind is EngineKind.accelerate:
        from trainer.parallel.accelerate_engine import AccelerateEngine

        return AccelerateEngine(config, model, mesh)
    if kind is EngineKind.deepspeed:
        # Read when it is first imported; else it looks for devices, and for a compiler for them.
        os.environ.setdefault("DS_ACCELERATOR", model.threshold_LF.device.type)
        from trainer.parallel.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(config, model, mesh)
    from trainer.parallel.plain import PlainEngine

    return PlainEngine(config, model, mesh)
