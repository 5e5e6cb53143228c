"""`layerloom publish`: a run's newest checkpoint as a folder that circuit-tracer loads, checked before it appears.

Everything is written into a hidden folder beside `output`, read back, compared with the run's own inference, and
renamed: `output` is there whole, or as it was. One layer is in memory at a time, of the checkpoint and of what is
written, whatever mesh trained the run.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from activation_store.atomic import read_json, write_json, write_text
from activation_store.device import resolve_device
from activation_store.errors import UserError
from activation_store.progress import Progress, human_bytes, report
from activation_store.store import ActivationStore
from activation_store.subject import SubjectInfo
from trainer.checkpoint import Checkpoint, Checkpointer
from trainer.config import PublishConfig, RunConfig
from trainer.evaluation.inputs import INPUTS_FILE
from trainer.model.spec import ModelSpec
from trainer.publish.card import CardContent, model_card
from trainer.publish.fold import DTYPES
from trainer.publish.fold_model import fold_layer
from trainer.publish.folder import check_space, replaced_folder
from trainer.publish.hooks import Hooks, circuit_hooks
from trainer.publish.layout import CROSS_LAYER, PER_LAYER, LayoutConfig, count_layers, write_layer
from trainer.publish.recipe import is_machine_path, plain, shared_config
from trainer.publish.rows import VerificationRows, open_run_store, verification_rows
from trainer.publish.rules import (
    CARD_FILE,
    EVALUATION_FILE,
    PLOTS_FOLDER,
    RUN_CONFIG_FILE,
    check_expressible,
    check_options,
    check_output,
    check_thresholds,
)
from trainer.publish.streamed import StreamedModel
from trainer.publish.verify import Comparison, compare, require_passed
from trainer.run_folder import RunFolder, load_config
from trainer.sample import reference_path
from trainer.tensor_file import hash_file

# Of what `layerloom_config.yaml` says under `published`; a change makes republishing write anew.
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PublishSummary:
    """What was published: the folder, its bytes (0 when it was up to date and left alone) and the comparison."""

    output: Path
    step: int
    bytes: int
    comparison: Comparison | None

    @property
    def unchanged(self) -> bool:
        """Whether the folder already held this checkpoint with these options."""
        return self.comparison is None


def publish(run: Path, output: Path, config: PublishConfig, *, device: str = "auto") -> PublishSummary:
    """Publishes the newest good checkpoint of `run` into `output` and returns what was done.

    Returns at once when `output` already holds it. Raises UserError, leaving `output` as it was, for a run that is not
    one or was not evaluated, for what the layout cannot express (docs/publish.md), for an output folder of something
    else, for a disk too small, and when what was written does not reconstruct as the run does.
    """
    run, output = Path(run), Path(output)
    request = _read_request(run, output, config)
    shared = shared_config(request.run_config, _published_section(request))
    if _is_up_to_date(output, shared):
        report(f"{output} already holds step {request.checkpoint.step} of {run}, published with these options")
        return PublishSummary(output, request.checkpoint.step, 0, None)
    job = _prepare(request, device)
    summary = _write(job, shared)
    _report_done(summary, job)
    return summary


@dataclass(frozen=True)
class _Request:
    """What is asked for, read and checked as far as files and options go."""

    run: RunFolder
    output: Path
    config: PublishConfig
    run_config: RunConfig
    checkpoint: Checkpoint
    evaluation: Mapping[str, Any]


@dataclass(frozen=True)
class _Job:
    """A request whose every rule is met: the model, and all that is written around its weights."""

    request: _Request
    store: ActivationStore
    subject: SubjectInfo
    hooks: Hooks
    layout: LayoutConfig
    model: StreamedModel


def _read_request(run: Path, output: Path, config: PublishConfig) -> _Request:
    check_options(config)
    run_config = load_config(run)
    check_output(output, run)
    checkpoint = Checkpointer.of(run, run_config).newest_good(model_only=True)
    if checkpoint is None:
        raise UserError(f"run={run} has no whole checkpoint; run `layerloom train run={run}` first")
    check_thresholds(run, checkpoint.step, checkpoint.state)
    folder = RunFolder(run)
    return _Request(folder, output, config, run_config, checkpoint, _read_evaluation(folder, checkpoint))


def _prepare(request: _Request, device: str) -> _Job:
    """Checks what the layout can express and the disk can hold."""
    config, run_config, state = request.config, request.run_config, request.checkpoint.state
    spec, subject = ModelSpec(**state["spec"]), SubjectInfo.from_dict(state["subject"])
    check_expressible(spec, state["layers"], subject)
    hooks = circuit_hooks(subject.architecture, run_config.store.input_hook)
    layout = LayoutConfig(
        model_kind=CROSS_LAYER if spec.span == "cross_layer" else PER_LAYER,
        model_name=_model_name(config, run_config, subject),
        feature_input_hook=hooks.feature_input,
        feature_output_hook=hooks.feature_output,
        scan=_scan(config, request.output),
    )
    store = open_run_store(reference_path(run_config, request.run.path))
    check_space(request.output, weight_bytes(spec, config.dtype))
    model = StreamedModel(request.checkpoint, run_config, resolve_device(device))
    return _Job(request, store, subject, hooks, layout, model)


def _write(job: _Job, shared: str) -> PublishSummary:
    request, rows = job.request, verification_rows(job.store)
    with replaced_folder(request.output) as folder:
        written, comparison = write_weights(folder, job.model, job.layout, DTYPES[request.config.dtype], rows)
        require_passed(comparison, request.output)
        write_json(folder / EVALUATION_FILE, request.evaluation)
        write_text(folder / RUN_CONFIG_FILE, shared)
        plots = _copy_plots(request.run.plots, folder / PLOTS_FOLDER)
        write_text(folder / CARD_FILE, model_card(_card_content(job, comparison, plots, written)))
        total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return PublishSummary(request.output, request.checkpoint.step, total, comparison)


def write_weights(
    folder: Path, model: StreamedModel, layout: LayoutConfig, dtype: torch.dtype, rows: VerificationRows
) -> tuple[int, Comparison]:
    """Writes config.yaml and every layer, then compares them with the model on `rows`; bytes written, comparison."""
    n_layers, kind, written = model.spec.n_layers, layout.model_kind, 0
    with Progress("publish", total=n_layers, unit="layer") as progress:
        for s in range(n_layers):
            with model.layer(s) as opened:
                written += write_layer(folder, kind, s, fold_layer(opened, s, dtype))
            progress.advance()
    layout.write(folder)
    with Progress("verify", total=n_layers, unit="layer") as progress:
        comparison = compare(
            folder,
            model.model,
            rows.mlp_in_BLD,
            source=rows.source,
            advance=progress.advance,
            layer=model.layer,
        )
    return written, comparison


def _card_content(job: _Job, comparison: Comparison, plots: list[str], written: int) -> CardContent:
    request, spec = job.request, job.model.spec
    subject = job.subject.to_dict()
    for name in ("base_model", "license"):  # these may be told after harvesting
        subject[name] = getattr(request.run_config.subject, name) or subject[name]
    return CardContent(
        config=request.run_config,
        layout=job.layout,
        hooks=job.hooks,
        subject=subject,
        evaluation=request.evaluation,
        comparison=comparison,
        plots=plots,
        n_layers=spec.n_layers,
        n_features=spec.n_features,
        step=request.checkpoint.step,
        tokens_seen=request.checkpoint.state["tokens"],
        bos_token_id=job.store.manifest.bos_token_id,
        dtype=request.config.dtype,
        repo=request.config.repo,
        license=request.config.license,
        bytes=written,
    )


def weight_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of the weight files, headers aside."""
    features, d_model = spec.n_features, spec.d_model
    matrices = sum(features * d_model * (1 + len(spec.targets(s))) for s in range(spec.n_layers))
    matrices += spec.n_layers * d_model * d_model * spec.skip
    return matrices * DTYPES[dtype].itemsize + spec.n_layers * (2 * features + d_model) * 4


def _read_evaluation(run: RunFolder, checkpoint: Checkpoint) -> dict[str, Any]:
    """evaluation.json. Raises UserError unless it is there, whole, and of this checkpoint."""
    remedy = f"run `layerloom evaluate run={run.path}` first: the model card states the measured quality"
    if not run.evaluation_file.is_file():
        raise UserError(f"run={run.path} has no {EVALUATION_FILE}; {remedy}")
    try:
        evaluation: dict[str, Any] = read_json(run.evaluation_file)
        made_from: dict[str, Any] = read_json(run.path / INPUTS_FILE)
    except (FileNotFoundError, json.JSONDecodeError):
        raise UserError(f"the evaluation of run={run.path} is not whole; {remedy}") from None
    measured = (made_from["weights_xxh3_64"], made_from["evaluation_xxh3_64"])
    if measured != (_weights_hash(checkpoint), hash_file(run.evaluation_file).xxh3_64):
        raise UserError(
            f"{run.evaluation_file} was measured on {made_from['checkpoint']}, the run is at {checkpoint.path.name}; "
            + remedy
        )
    return evaluation


def _weights_hash(checkpoint: Checkpoint) -> str:
    return checkpoint.weights_xxh3_64


def _published_section(request: _Request) -> dict[str, Any]:
    """How the folder was made: what must be the same for it to be up to date."""
    config, checkpoint = request.config, request.checkpoint
    return {
        "format_version": FORMAT_VERSION,
        "format": plain(config.format),
        "dtype": config.dtype,
        "scan": _scan(config, request.output),
        "model_name": config.model_name,
        "license": config.license,
        "step": checkpoint.step,
        "checkpoint_xxh3_64": _weights_hash(checkpoint),
        "evaluation_xxh3_64": hash_file(request.run.evaluation_file).xxh3_64,
    }


def _is_up_to_date(output: Path, shared: str) -> bool:
    file = output / RUN_CONFIG_FILE
    if not file.is_file() or file.read_text(encoding="utf-8") != shared or not (output / CARD_FILE).is_file():
        return False
    try:
        count_layers(output, LayoutConfig.read(output).model_kind)
    except UserError:
        return False
    return True


def _scan(config: PublishConfig, output: Path) -> str:
    return config.repo or f"layerloom/{output.resolve().name}"


def _model_name(config: PublishConfig, run_config: RunConfig, subject: SubjectInfo) -> str:
    told = config.model_name or run_config.subject.model_name or run_config.subject.base_model
    return told or subject.model_name or subject.base_model or subject.path


def _copy_plots(source: Path, target: Path) -> list[str]:
    names = sorted(file.name for file in source.glob("*.png"))
    if names:
        target.mkdir()
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def _report_done(summary: PublishSummary, job: _Job) -> None:
    assert summary.comparison is not None
    rows = f"{summary.comparison.rows:,} {summary.comparison.source} rows"
    report(f"checked against the run on {rows}: {summary.comparison.summary()}")
    report(f"published step {summary.step} in {summary.output} ({human_bytes(summary.bytes)})")
    if is_machine_path(job.layout.model_name):
        report(
            f"model_name in config.yaml is {job.layout.model_name}, a path of this machine; give "
            "publish.model_name=ORG/NAME before sharing the folder"
        )
