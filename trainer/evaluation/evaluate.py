"""`layerloom evaluate run=DIR`: a run's newest checkpoint, measured on held-out documents."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from activation_store.atomic import write_json
from activation_store.config import InputHook
from activation_store.errors import UserError
from activation_store.progress import report, silenced
from activation_store.store import ActivationStore
from activation_store.subject import Subject, SubjectInfo, describe_subject, load_subject
from activation_store.text import Document, stream_documents
from activation_store.tokens import PackedContexts, pack_tokens
from trainer.checkpoint import Checkpoint, Checkpointer
from trainer.config import ActivationKind, EvalConfig, ParallelConfig, RunConfig, Span
from trainer.evaluation.inputs import INPUTS_FILE, evaluation_inputs
from trainer.evaluation.measure import MeasureSettings, measure
from trainer.evaluation.plots import save_plots
from trainer.evaluation.ranks import check_axes, columns_split, stopped_together
from trainer.evaluation.report import evaluation_json
from trainer.evaluation.table import format_table
from trainer.full_disk import full_disk_told
from trainer.load import load_checkpoint
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.spec import ModelSpec
from trainer.parallel.agreement import Agreement, lost_peers_told
from trainer.parallel.collectives import collectives_of
from trainer.parallel.mesh import Mesh, open_mesh, rank_device
from trainer.rows import check_text, store_identity
from trainer.run_folder import RunFolder, load_config, resume_command
from trainer.sample import reference_path
from trainer.saving.ranks import all_ranks
from trainer.schedule import dead_after_tokens


def evaluate(
    run: Path | str,
    config: EvalConfig,
    *,
    parallel: ParallelConfig | None = None,
    device: str = "auto",
    show_table: bool = True,
) -> dict[str, Any]:
    """Measures a run on held-out documents; writes evaluation.json and plots/ into it and prints a table (if wanted).

    `parallel`: the processes that are started, each to have its part of the transcoder (None: this one has it all).

    Returns the content of evaluation.json. Raises UserError, before anything is computed or written, for a folder that
    is no run, a run without a checkpoint or (topk, batchtopk) without thresholds yet, a store or subject that is not
    the run's, text with too few held-out documents, and a mesh that does not fit.
    """
    parallel = parallel if parallel is not None else ParallelConfig()
    check_axes(parallel)
    on, folder = rank_device(device), RunFolder(run)
    with (
        lost_peers_told(f"evaluate again with `{resume_command(folder.path, 'evaluate')}`"),
        open_mesh(parallel, on) as mesh,
        silenced(not mesh.is_first),
    ):
        return _evaluate(folder, config, parallel, mesh, on, show_table=show_table)


def _evaluate(
    folder: RunFolder,
    config: EvalConfig,
    parallel: ParallelConfig,
    mesh: Mesh,
    device: torch.device,
    *,
    show_table: bool,
) -> dict[str, Any]:
    """`evaluate` on an open mesh. Every rank runs the subject; rank 0 alone writes and speaks."""
    agreement = Agreement(mesh)
    with agreement.together():
        run_config = load_config(folder.path)
        check_eval_config(config, run_config)
    checkpoint = Checkpointer.of(folder.path, run_config, ranks=all_ranks()).newest_good(model_only=True)
    with stopped_together(mesh, agreement) as end_if_asked:
        with agreement.together():
            opened = _open(folder, config, run_config, checkpoint, parallel, device)
        end_if_asked()
        collectives = collectives_of(mesh, by_columns=opened.by_columns)
        transcoder = load_checkpoint(opened.checkpoint, run_config, device, collectives=collectives)
        end_if_asked()
        evaluation = evaluate_transcoder(
            transcoder,
            opened.subject,
            opened.contexts,
            _settings(config, run_config, opened.store),
            threshold_rule=threshold_rule(run_config, opened.checkpoint),
            dead_after_tokens=dead_after_tokens(run_config),
            after_batch=end_if_asked,
        )
    first_layer = opened.store.layers[0]
    with agreement.together(), full_disk_told(folder.path, resume_command(folder.path, "evaluate")):
        if mesh.is_first:
            _write(folder, evaluation, first_layer, _title(run_config, opened.subject.info))
            write_json(folder.path / INPUTS_FILE, evaluation_inputs(folder.path, opened.checkpoint, config))
    if show_table:
        report(format_table(evaluation, first_layer=first_layer))
    return evaluation


@dataclass(frozen=True)
class _Opened:
    """What is measured, and on what: found to belong together. by_columns: how decoders lie on the feature axis."""

    checkpoint: Checkpoint
    by_columns: bool
    store: ActivationStore
    subject: Subject
    contexts: PackedContexts


def _open(
    folder: RunFolder,
    config: EvalConfig,
    run_config: RunConfig,
    checkpoint: Checkpoint | None,
    parallel: ParallelConfig,
    device: torch.device,
) -> _Opened:
    """Raises UserError as `evaluate` does."""
    if checkpoint is None:
        raise UserError(
            f"run={folder.path} has no complete checkpoint to evaluate; train it: layerloom train run={folder.path} ..."
        )
    _check_thresholds(folder, checkpoint)
    by_columns = columns_split(parallel, ModelSpec(**checkpoint.state["spec"]))
    store = ActivationStore.open(reference_path(run_config, folder.path))
    _check_inputs(folder, checkpoint, store, describe_subject(run_config.subject))
    check_text(run_config, store)
    documents = held_out_documents(run_config, config)
    subject = load_subject(run_config.subject, device=device)
    contexts = pack_tokens(
        documents,
        subject.tokenizer,
        context_length=run_config.text.context_length,
        bos_token_id=store.manifest.bos_token_id,
        contexts_per_document=config.contexts_per_document,
    )
    return _Opened(checkpoint, by_columns, store, subject, contexts)


def evaluate_transcoder(
    transcoder: CrossLayerTranscoder,
    subject: Subject,
    contexts: PackedContexts,
    settings: MeasureSettings,
    *,
    threshold_rule: str,
    dead_after_tokens: int | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The content of evaluation.json for any transcoder on any subject, measured on `contexts`; writes nothing.

    The transcoder lies on the subject's device and covers the layers `settings.layers`; of one on a feature axis, all
    ranks call this with the same contexts and get the same figures. Without `dead_after_tokens` (the window of
    training's dead features) the dead fractions are null. `after_batch` may end it by raising.
    """
    measured = measure(transcoder, subject, contexts, settings, after_batch=after_batch)
    return evaluation_json(
        measured, transcoder.spec, threshold_rule=threshold_rule, dead_after_tokens=dead_after_tokens
    )


def check_eval_config(config: EvalConfig, run: RunConfig) -> None:
    """Raises UserError for values out of range, and for more documents than the run holds out. Reads nothing."""
    for name, least in (("documents", 0), ("contexts_per_document", 0), ("batch_contexts", 1)):
        if getattr(config, name) < least:
            raise UserError(f"eval.{name}={getattr(config, name)} must be at least {least}")
    held_out = run.text.held_out_documents
    if held_out == 0:
        raise UserError(
            "the run has no held-out documents (text.held_out_documents=0), so there is nothing to evaluate on; "
            "harvest and train with text.held_out_documents above 0"
        )
    if config.documents > held_out:
        raise UserError(
            f"eval.documents={config.documents} is more than the run's text.held_out_documents={held_out}; use at most "
            f"{held_out}, or 0 for all of them"
        )


def held_out_documents(run: RunConfig, config: EvalConfig) -> list[Document]:
    """The first `eval.documents` held-out documents (0: all). Raises UserError if the text has fewer."""
    wanted = config.documents or run.text.held_out_documents
    documents = list(islice(stream_documents(run.text, held_out=True), wanted))
    if len(documents) < wanted:
        raise UserError(
            f"text.path={run.text.path} has {len(documents)} held-out documents, eval.documents={config.documents} "
            f"wants {wanted}; use eval.documents={len(documents)}"
        )
    return documents


def threshold_rule(run: RunConfig, checkpoint: Checkpoint) -> str:
    """Where the threshold of the inference rule comes from, in words (`threshold_rule` of evaluation.json).

    A run that was stopped between two evaluations has the threshold of the earlier one, and this says so.
    """
    if run.activation.kind is ActivationKind.relu:
        return "zero"
    if run.activation.kind is ActivationKind.jumprelu:
        return "learned"
    calibrated = checkpoint.state["calibrated_step"]
    stale = "" if calibrated == checkpoint.step else f" at step {calibrated} of {checkpoint.step}"
    return f"calibrated per {run.activation.threshold_scope.value}{stale}"


def _check_thresholds(folder: RunFolder, checkpoint: Checkpoint) -> None:
    kind = checkpoint.state["spec"]["kind"]
    if kind in (ActivationKind.topk, ActivationKind.batchtopk) and checkpoint.state["calibrated_step"] is None:
        raise UserError(
            f"run={folder.path} stopped at step {checkpoint.step}, before the thresholds of {kind} were calibrated; "
            f"continue it with `layerloom train run={folder.path}`, then evaluate"
        )


def _check_inputs(folder: RunFolder, checkpoint: Checkpoint, store: ActivationStore, info: SubjectInfo) -> None:
    """The statistics that exclude and ablate are those of the store trained on, the subject the one harvested."""
    if store_identity(store) != checkpoint.state["data"]["store"]:
        raise UserError(
            f"store {store.path} is not the one that run={folder.path} was trained on (its rows differ); put "
            "that store back, or train again"
        )
    harvested_from = store.manifest.subject["fingerprint"]
    if info.fingerprint != harvested_from:
        raise UserError(
            f"subject.path={info.path} is now {info.fingerprint}, and run={folder.path} was trained on "
            f"{harvested_from}; put that subject back, or harvest and train again"
        )


def _settings(config: EvalConfig, run: RunConfig, store: ActivationStore) -> MeasureSettings:
    manifest = store.manifest
    return MeasureSettings(
        input_hook=InputHook(manifest.input_hook),
        layers=range(manifest.layers[0], manifest.layers[-1] + 1),
        statistics=store.statistics(),
        special_token_ids=frozenset(manifest.special_token_ids),
        outlier_factor=manifest.outlier_factor,
        batch_contexts=config.batch_contexts,
        replacement=config.replacement,
        selection_rows=run.train.microbatch_tokens or run.train.batch_size_tokens,
    )


def _title(run: RunConfig, info: SubjectInfo) -> str:
    name = (info.base_model or info.path).rstrip("/").rpartition("/")[2]
    kind = "cross-layer transcoder" if run.model.span is Span.cross_layer else "per-layer transcoders"
    return f"{name}: {'skip ' if run.model.skip else ''}{kind}"


def _write(folder: RunFolder, evaluation: dict[str, Any], first_layer: int, title: str) -> None:
    # What says that the pair is whole goes first and comes back last.
    (folder.path / INPUTS_FILE).unlink(missing_ok=True)
    write_json(folder.evaluation_file, evaluation)
    plots = save_plots(evaluation, folder.plots, first_layer=first_layer, title=title)
    report(f"wrote {folder.evaluation_file} and {len(plots)} plots in {folder.plots}")
