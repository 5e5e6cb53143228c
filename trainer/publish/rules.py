"""What the layout cannot express, and output folders that are not ours: refused before anything is written."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from activation_store.errors import UserError
from activation_store.subject import SubjectInfo
from trainer.config import ActivationKind, PublishConfig, PublishFormat
from trainer.model.spec import ModelSpec
from trainer.publish.fold import DTYPES
from trainer.publish.layout import CONFIG_FILE

CARD_FILE = "README.md"
EVALUATION_FILE = "evaluation.json"
RUN_CONFIG_FILE = "layerloom_config.yaml"
PLOTS_FOLDER = "plots"
_OWN_NAMES = re.compile(
    r"config\.yaml|layerloom_config\.yaml|README\.md|evaluation\.json|plots|(W_enc|W_dec|layer)_\d+\.safetensors|\.DS_Store"
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def check_options(config: PublishConfig) -> None:
    """Raises UserError for a dtype, repository or format that does not exist."""
    if config.format not in tuple(PublishFormat):
        raise UserError(f"publish.format={config.format} is unknown; use {', '.join(PublishFormat)}")
    if config.dtype not in DTYPES:
        raise UserError(f"publish.dtype={config.dtype} cannot be published; use one of {', '.join(DTYPES)}")
    if config.repo and _REPOSITORY.fullmatch(config.repo) is None:
        raise UserError(f"publish.repo={config.repo} is not a repository of the hub; use ORG/NAME, or leave it empty")


def check_thresholds(run: Path, step: int, state: Mapping[str, Any]) -> None:
    """Raises UserError for a topk or batchtopk checkpoint whose thresholds are older than its weights, or not there."""
    calibrated, kind = state["calibrated_step"], state["spec"]["kind"]
    if kind in (ActivationKind.topk, ActivationKind.batchtopk) and calibrated != step:
        when = "not calibrated yet" if calibrated is None else f"those of step {calibrated}"
        raise UserError(
            f"run={run} is at step {step} and its thresholds are {when}: training has not ended; finish it with "
            f"`layerloom train run={run}`, evaluate, and publish again"
        )


def check_expressible(spec: ModelSpec, layers: Sequence[int], subject: SubjectInfo) -> None:
    """Raises UserError for a model that circuit-tracer's layout cannot hold, with the reason and a remedy."""
    if spec.skip and spec.span == "cross_layer":
        raise UserError(
            "a cross-layer transcoder with skips cannot be published: circuit-tracer ignores W_skip of such; "
            "train with model.skip=false, or per-layer transcoders (model.span=per_layer), which may have it"
        )
    if list(layers) != list(range(subject.n_layers)):
        raise UserError(
            f"layers {layers[0]} to {layers[-1]} of {subject.n_layers} cannot be published: circuit-tracer replaces "
            "every MLP of the subject; harvest and train all layers (store.layer_start=0 store.layer_stop=null)"
        )


def check_output(output: Path, run: Path) -> None:
    """Raises UserError unless `output` is new, empty, or a folder that was published before and nothing else."""
    if output.resolve() == run.resolve():
        raise UserError(f"output={output} is the run folder itself; give another folder")
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"output={output} is a file; give a folder that is new, empty, or published before")
    names = sorted(entry.name for entry in output.iterdir())
    ours = (output / RUN_CONFIG_FILE).is_file() and (output / CONFIG_FILE).is_file()
    foreign = [name for name in names if _OWN_NAMES.fullmatch(name) is None]
    if names and not ours:
        raise UserError(
            f"output={output} holds {(foreign or names)[0]} and was not published by Layerloom; give a folder that is "
            "new, empty, or published before"
        )
    if foreign:
        raise UserError(
            f"output={output} holds {foreign[0]}, which publishing again would delete; move it away, or give another "
            "folder"
        )
