"""A call of `train`: what is refused, what is opened for the loop (trainer/loop.py), and what the call leaves."""

import math
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from activation_store.progress import human_seconds, report, silenced
from trainer.build import checkpoint_bytes, model_spec
from trainer.checkpoint import Checkpointer, check_space
from trainer.config import RunConfig
from trainer.full_disk import full_disk_told
from trainer.loop import Loop
from trainer.memory import freed_memory_kept
from trainer.metrics import check_wandb, read_metrics
from trainer.model.spec import ModelSpec
from trainer.parallel.agreement import Agreement, lost_peers_told
from trainer.parallel.engine import check_engine, engine_name
from trainer.parallel.mesh import Mesh, open_mesh, rank_device
from trainer.parallel.split import SplitChoice, choose_split, kept_split
from trainer.parallel.split_table import Link, groups_in_one_machine
from trainer.reproducibility import deterministic
from trainer.rules import check_columns, check_run_config
from trainer.run_folder import RunFolder, checkpoint_folder, resume_command
from trainer.saving.origin import check_origin
from trainer.saving.ranks import all_ranks
from trainer.schedule import build_schedule
from trainer.setup import Setup
from trainer.sources import Source, open_source
from trainer.tuned import choose_kernels


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """What a call of `train` left. `metrics`: the last training record with the last evaluation under `eval`.

    `resumed_from`: the step of the checkpoint that it continued from (the last step: nothing was left to do), or None.
    """

    run: Path
    steps: int
    metrics: dict[str, Any]
    seconds: float
    resumed_from: int | None


def train(config: RunConfig) -> TrainSummary:
    """Trains the run that `config` describes into `config.run`, from the start or from its newest good checkpoint.

    Raises UserError, before anything is written: for a config that breaks a rule, a store that is not the config's, a
    folder that is not a run or is one of another config, checkpoints of which none is good, and a disk too small; and
    later, for a loss that is not finite, a damaged shard or a disk that fills. Ctrl-C and SIGTERM write a checkpoint
    and raise KeyboardInterrupt.
    """
    started = time.monotonic()
    check_run_config(config)
    device = rank_device(config.device)
    with (
        lost_peers_told(f"continue with `{resume_command(config.run)}`"),
        open_mesh(config.parallel, device) as mesh,
        silenced(not mesh.is_first),
    ):
        return _train(config, mesh, device, started=started)


def _train(config: RunConfig, mesh: Mesh, device: torch.device, *, started: float) -> TrainSummary:
    """`train` on an open mesh. Rank 0 alone holds the folder's lock and writes what is not partitioned."""
    agreement, folder = Agreement(mesh), RunFolder(config.run)
    link = _link(mesh, agreement, device)
    with agreement.together():
        folder.check(config)
        check_engine(config.engine.kind)
        source = open_source(config)
        spec = model_spec(config.model, config.activation, source.n_layers, source.d_model)
        kernels = choose_kernels(config, spec, device)
        split = choose_split(config.parallel, config.model, config.activation, spec, link)
        if split.by_columns:
            check_columns(spec.d_model, config.parallel)
        if mesh.is_first:
            _check_room(folder, config, spec)
            check_wandb(config.log)
    # What another machine has measured may differ, and all must go dense alike.
    kernels = agreement.first(kernels)
    with ExitStack() as stack:
        stack.enter_context(full_disk_told(folder.path, resume_command(folder.path)))
        with agreement.together():
            if mesh.is_first:
                stack.enter_context(folder.locked())
                # Again, for another process may have trained here in the meantime.
                folder.check(config)
                if config.train.fresh:
                    Checkpointer.of(folder.path, config).discard()
                folder.start(config)
        stack.enter_context(deterministic(device))
        stack.enter_context(freed_memory_kept(device))
        background = config.train.async_checkpoint
        checkpointer = Checkpointer.of(folder.path, config, ranks=all_ranks(), background=background)
        checkpoint = checkpointer.to_resume()
        if checkpoint is not None:
            check_origin(config, checkpoint.state)
            split = kept_split(split, config.parallel, checkpoint.state.get("written_by", {}))
        resumed_from = None if checkpoint is None else checkpoint.step
        schedule = build_schedule(config)
        if resumed_from == schedule.total_steps:
            report(f"train: {folder.path} is complete ({resumed_from} steps); nothing to do")
        else:
            if mesh.size > 1:
                report(f"train: {_mesh_line(mesh, config, split)}")
            report(f"train: {kernels.line}")
            states = [] if checkpoint is None else checkpoint.state["data"].get("source", [])
            _prepare(source, states, mesh, agreement)
            setup = Setup(
                config=config,
                mesh=mesh,
                agreement=agreement,
                by_columns=split.by_columns,
                folder=folder,
                source=source,
                schedule=schedule,
                checkpointer=checkpointer,
                device=device,
                kernels=kernels,
            )
            Loop(setup).train(checkpoint)
    seconds = time.monotonic() - started
    metrics = agreement.first(last_metrics(folder))
    if resumed_from != schedule.total_steps:
        took = human_seconds(seconds)
        report(f"train: wrote {schedule.total_steps} steps to {folder.path} in {took}{_headline(metrics)}")
    return TrainSummary(folder.path, schedule.total_steps, metrics, seconds, resumed_from)


def _check_room(folder: RunFolder, config: RunConfig, spec: ModelSpec) -> None:
    """Raises UserError where the checkpoints would not fit."""
    n_bytes = checkpoint_bytes(spec, config.optim)
    place, keep = checkpoint_folder(folder.path, config), config.train.keep_checkpoints
    check_space(folder.path, n_bytes=n_bytes, keep=keep, folder=place)


def _link(mesh: Mesh, agreement: Agreement, device: torch.device) -> Link:
    """What feature groups speak over, the same on all ranks; collective."""
    hosts = agreement.gather(platform.node())
    return Link(device.type, one_machine=groups_in_one_machine(hosts, mesh.feature.size))


def _mesh_line(mesh: Mesh, config: RunConfig, split: SplitChoice) -> str:
    """For the log."""
    decoders = f"; decoders by {split.reason}" if mesh.feature.size > 1 else ""
    sizes = f"data={mesh.data.size} x feature={mesh.feature.size}"
    return f"{mesh.size} processes, {sizes}; engine {engine_name(config, mesh)}{decoders}"


def _prepare(source: Source, states: Sequence[Mapping[str, Any]], mesh: Mesh, agreement: Agreement) -> None:
    """First on rank 0, which makes what is missing, then on the others, which find it."""
    for turn in (True, False):
        with agreement.together():
            if mesh.is_first is turn:
                source.prepare(states, first=mesh.is_first)


def last_metrics(folder: RunFolder) -> dict[str, Any]:
    """The last training record of a run, with the last evaluation under `eval`."""
    metrics: dict[str, Any] = {}
    for record in read_metrics(folder.metrics_file):
        metrics |= record
    return metrics


def _headline(metrics: dict[str, Any]) -> str:
    evaluation = metrics.get("eval") or {}
    if not evaluation or evaluation["fvu"] is None or not math.isfinite(evaluation["fvu"]):
        return ""
    rule = evaluation["training_rule"]
    return (
        f"; held-out rows: FVU {evaluation['fvu']:.3f} at L0 {evaluation['l0']:.1f} "
        f"(training rule: {rule['fvu']:.3f} at {rule['l0']:.1f})"
    )
