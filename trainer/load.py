"""Trained models from disk: run folders here, published folders through `trainer.publish`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from activation_store.device import resolve_device
from activation_store.errors import AgreedError, UserError
from activation_store.progress import report
from trainer.checkpoint import Checkpoint, Checkpointer
from trainer.config import RunConfig
from trainer.kernels.dispatch import choose
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.collectives import Collectives
from trainer.model.spec import ModelSpec
from trainer.parallel.parts import whole_pieces
from trainer.run_folder import load_config

if TYPE_CHECKING:
    from activation_store.subject import SubjectInfo


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A run's newest good checkpoint. `layers`: the subject's layers that the model covers; `step`: updates done."""

    model: CrossLayerTranscoder
    config: RunConfig
    subject: "SubjectInfo"
    layers: tuple[int, ...]
    step: int


def load_transcoder(folder: Path | str, *, device: str = "cpu") -> CrossLayerTranscoder:
    """The transcoder of a run folder (newest good checkpoint) or of a published folder, in eval mode.

    Raises UserError for a folder that is neither, or a run without a good checkpoint.
    """
    from trainer.publish.load import is_published, load_published

    # Both kinds of folder hold a config.yaml.
    if is_published(Path(folder)):
        return load_published(folder, device=device)
    return load_run(folder, device=device).model


def load_run(run: Path | str, *, device: str = "cpu") -> LoadedRun:
    """The newest good checkpoint of a run folder, its model in eval mode. The store is not needed.

    Raises UserError for a folder that is not a run, or has no good checkpoint.
    """
    from activation_store.subject import SubjectInfo

    config = load_config(run)
    checkpoint = Checkpointer.of(run, config).newest_good(model_only=True)
    if checkpoint is None:
        raise UserError(f"run={run} has no good checkpoint; train it: layerloom train run={run}")
    model = load_checkpoint(checkpoint, config, resolve_device(device))
    state = checkpoint.state
    _report_stale_threshold(run, checkpoint, model)
    return LoadedRun(model, config, SubjectInfo.from_dict(state["subject"]), tuple(state["layers"]), int(state["step"]))


def load_checkpoint(
    checkpoint: Checkpoint, config: RunConfig, device: torch.device, *, collectives: Collectives | None = None
) -> CrossLayerTranscoder:
    """The model of this very checkpoint, in float32 and eval mode; on a mesh (`collectives`), this rank's part of it.

    Raises UserError, on all ranks alike, if training has removed it in the meantime.
    """
    spec = ModelSpec(**checkpoint.state["spec"])
    model = CrossLayerTranscoder(spec, backend=kernel_backend(config, device), collectives=collectives)
    try:
        pieces = whole_pieces(model.state_dict(), model.partitions(), model.collectives.partitioning)
        checkpoint.load_model(pieces, widen=True)
    except FileNotFoundError:
        raise AgreedError(
            f"checkpoint {checkpoint.path} was removed while it was about to be read: its run is being trained; try "
            "again when training has ended"
        ) from None
    return model.to(device).eval().requires_grad_(False)


def kernel_backend(config: RunConfig, device: torch.device) -> str:
    """The run's own, or what is fastest on `device` where that does not run: a GPU's run is looked at anywhere."""
    try:
        choose(config.kernels.backend.value, device)
    except ValueError:
        return "auto"
    return config.kernels.backend.value


def _report_stale_threshold(run: Path | str, checkpoint: Checkpoint, model: CrossLayerTranscoder) -> None:
    """Top-k models are used by a calibrated threshold; one between two evaluations has an older one, or none."""
    calibrated = checkpoint.state["calibrated_step"]
    if model.spec.is_topk and calibrated != checkpoint.step:
        when = "has none yet" if calibrated is None else f"was calibrated at step {calibrated}"
        report(
            f"run={run} is at step {checkpoint.step}, its inference threshold {when}; finish the run for exact "
            f"figures: layerloom train run={run}"
        )
