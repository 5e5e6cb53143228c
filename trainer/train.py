"""The training loop.

    update n = 1, 2, ...:  microbatches (n-1) m ... n m - 1 -> loss and gradients -> norm -> clip -> Adam
                           -> dead-feature state -> metrics -> evaluation -> checkpoint

Everything that update n depends on is a function of the config, the store and what the checkpoint of an earlier step
holds, so that a run which is killed and resumed ends with the same bits (docs/train.md says on what conditions).
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from activation_store.batch import ActivationBatch
from activation_store.errors import AgreedError, AgreedInterruptError, UserError
from activation_store.progress import Progress, human_seconds, report, silenced
from trainer.build import build_model, checkpoint_bytes, model_spec
from trainer.checkpoint import Checkpoint, Checkpointer, check_space
from trainer.config import RunConfig
from trainer.dealing import Dealing
from trainer.full_disk import full_disk_told
from trainer.in_training import Evaluator
from trainer.interrupt import StopRequest
from trainer.loss import StepContext
from trainer.memory import freed_memory_kept
from trainer.metrics import MetricsLog, check_wandb, read_metrics, start_wandb, training_record
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.collectives import Collectives
from trainer.nonfinite import check_finite
from trainer.parallel.agreement import Agreement, lost_peers_told
from trainer.parallel.collectives import collectives_of
from trainer.parallel.engine import BatchLoss, Engine, TracksRuns, build_engine
from trainer.parallel.feed import Feed
from trainer.parallel.mesh import Axis, Mesh, open_mesh, rank_device
from trainer.parallel.split import SplitChoice, choose_split
from trainer.profile import profiled
from trainer.reproducibility import (
    deterministic,
    environment,
    environment_differences,
    restore_rng,
    rng_state,
    seed_everything,
)
from trainer.rows import CalibrationRows
from trainer.rules import check_columns, check_run_config
from trainer.run_folder import RunFolder, checkpoint_folder, resume_command
from trainer.saving.origin import check_origin, origin
from trainer.saving.ranks import all_ranks
from trainer.schedule import Schedule, build_schedule, dead_after_tokens
from trainer.sources import Batches, Source, open_source
from trainer.tuned import ChosenKernels, choose_kernels

# Rows from which b_enc is set when model.initial_density asks for it.
_INITIAL_ROWS = 4_096


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
    with agreement.together():
        folder.check(config)
        source = open_source(config)
        spec = model_spec(config.model, config.activation, source.n_layers, source.d_model)
        kernels = choose_kernels(config, spec, device)
        split = choose_split(config.parallel, config.model, config.activation, spec)
        if split.by_columns:
            check_columns(spec.d_model, config.parallel)
        if mesh.is_first:
            n_bytes = checkpoint_bytes(spec, config.optim)
            place, keep = checkpoint_folder(folder.path, config), config.train.keep_checkpoints
            check_space(folder.path, n_bytes=n_bytes, keep=keep, folder=place)
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
            _Run(
                config,
                mesh=mesh,
                agreement=agreement,
                by_columns=split.by_columns,
                folder=folder,
                source=source,
                schedule=schedule,
                checkpointer=checkpointer,
                device=device,
                kernels=kernels,
            ).train(checkpoint)
    seconds = time.monotonic() - started
    metrics = agreement.first(last_metrics(folder))
    if resumed_from != schedule.total_steps:
        took = human_seconds(seconds)
        report(f"train: wrote {schedule.total_steps} steps to {folder.path} in {took}{_headline(metrics)}")
    return TrainSummary(folder.path, schedule.total_steps, metrics, seconds, resumed_from)


def _mesh_line(mesh: Mesh, config: RunConfig, split: SplitChoice) -> str:
    """For the log."""
    decoders = f"; decoders by {split.reason}" if mesh.feature.size > 1 else ""
    sizes = f"data={mesh.data.size} x feature={mesh.feature.size}"
    return f"{mesh.size} processes, {sizes}; engine {config.engine.kind}{decoders}"


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


class _Run:
    """One call's training: the parts that the loop works with, and the steps of the loop that are not the engine's."""

    def __init__(
        self,
        config: RunConfig,
        *,
        mesh: Mesh,
        agreement: Agreement,
        by_columns: bool,
        folder: RunFolder,
        source: Source,
        schedule: Schedule,
        checkpointer: Checkpointer,
        device: torch.device,
        kernels: ChosenKernels,
    ) -> None:
        self.config, self.folder, self.source, self.device = config, folder, source, device
        self.mesh, self.agreement, self.by_columns = mesh, agreement, by_columns
        self.store = source.reference
        self.schedule, self.checkpointer = schedule, checkpointer
        self.batch_tokens = config.train.batch_size_tokens
        self.microbatch = config.train.microbatch_tokens or self.batch_tokens
        self.microbatches_per_step = self.batch_tokens // self.microbatch
        self.dead_after_tokens = dead_after_tokens(config)
        self.source_states: Sequence[Mapping[str, Any]] = []
        self.calibrated_step: int | None = None
        seed_everything(config.model.seed)
        self.model = self._build()
        self.engine: Engine = build_engine(replace(config, kernels=kernels.config), self.model, mesh)
        self.evaluator = Evaluator(config, self.store, self.model, device=device, dealing=self._dealing())
        density = kernels.config.dense_above_density
        self.environment = environment(device) | {"kernels": kernels.name, "dense_above_density": density}

    def train(self, checkpoint: Checkpoint | None) -> None:
        """The loop."""
        train, last_step = self.config.train, self.schedule.total_steps
        step = self._restore(checkpoint)
        with ExitStack() as stack:
            stack.enter_context(self.checkpointer)
            stop = stack.enter_context(StopRequest(told_later=self.mesh.size > 1))
            log = self._open_log(stack, step)
            batches = stack.enter_context(self._batches(step))
            progress = stack.enter_context(
                Progress("train", total=last_step * self.batch_tokens, unit="tok", initial=step * self.batch_tokens)
            )
            profile = stack.enter_context(
                profiled(self.folder.path, self.mesh.rank, self.agreement, wanted=train.profile)
            )
            saved_step, stopped = step, False
            while step < last_step and not stopped:
                with self._continuable(), record_function("step: wait for rows"):
                    microbatches = [next(batches) for _ in range(self.microbatches_per_step)]
                step += 1
                logged = step % train.log_every == 0 or step in {1, last_step}
                loss, norm = self._update(step, microbatches, logged=logged)
                note = ""
                if logged:
                    record = self._record(step, microbatches, loss, norm, batches)
                    self._write(log, record)
                    note = f"fvu {record['fvu']:.3f}, l0 {record['l0']:.0f}"
                if step == last_step or (train.eval_every and step % train.eval_every == 0):
                    with self._continuable(), self.engine.master_weights():
                        self._evaluate(step, log)
                if step < last_step and train.checkpoint_every and step % train.checkpoint_every == 0:
                    saved_step = self._save(step, log, batches)
                progress.advance(self.batch_tokens, note=note)
                if train.profile:
                    with self._told_together():
                        profile.step()
                # A signal reaches one rank before another, or one rank alone: they stop after the same step.
                stopped = self.agreement.any(stop.requested)
            if step > saved_step:
                self._save(step, log, batches)
        if stopped:
            # In the last step too: what would follow training must not start.
            left = f"continue with `{resume_command(self.folder.path)}`" if step < last_step else "training is complete"
            report(f"train: stopped at step {step} of {last_step}; {left}")
            raise AgreedInterruptError

    def _update(self, step: int, microbatches: Sequence[ActivationBatch], *, logged: bool) -> tuple[BatchLoss, float]:
        """One update of the parameters and of the model's state; the loss before it, and the gradients' norm."""
        with record_function("step: forward and backward"):
            loss = self.engine.backward(microbatches, self._context(step), residual=logged)
        with record_function("step: gradient norm"):
            norm = check_finite(
                loss,
                self.engine,
                self.model,
                microbatches,
                self.agreement,
                step=step,
                resume=self._where_to_resume,
            )
        with record_function("step: update"):
            self.engine.update(norm)
            self.model.record_step(
                loss.fired, self.batch_tokens, loss.batch_threshold_L, self.config.activation.threshold_decay
            )
        return loss, norm

    def _open_log(self, stack: ExitStack, step: int) -> MetricsLog | None:
        """On rank 0, until the stack is closed."""
        with self.agreement.together():
            if self.mesh.is_first:
                start = self.engine.start_wandb if isinstance(self.engine, TracksRuns) else start_wandb
                return stack.enter_context(MetricsLog(self.folder, self.config, resumed_from=step, start=start))
        return None

    def _write(self, log: MetricsLog | None, record: dict[str, Any]) -> None:
        with self._told_together():
            if log is not None:
                log.write(record)

    @contextmanager
    def _told_together(self) -> Iterator[None]:
        """What fails on one rank fails on all; a full disk with the command that continues."""
        with self.agreement.together(), full_disk_told(self.folder.path, resume_command(self.folder.path)):
            yield

    def _batches(self, step: int) -> Batches:
        """This rank's microbatches from those of `step` on."""
        with self.agreement.together():
            source = self.source.batches(
                step * self.microbatches_per_step,
                self.source_states,
                device=self.device,
                rank=self.mesh.rank,
                ranks=self.mesh.size,
                # What travels is what is stored, which is mostly half of what it becomes.
                decoded=self.mesh.feature.size == 1,
            )
        if self.mesh.size == 1:
            return source
        return Feed(source, self.mesh, self.model.collectives.partitioning, device=self.device)

    def _build(self) -> CrossLayerTranscoder:
        rows = None
        if self.config.model.initial_density is not None:
            rows_of = CalibrationRows(
                store=self.store, n_rows=_INITIAL_ROWS, batch_rows=_INITIAL_ROWS, device=self.device
            )
            with self.agreement.together():
                rows = next(iter(rows_of))
        return build_model(
            self.config,
            self.store.statistics(),
            device=self.device,
            initial_rows_BLD=rows,
            collectives=self._collectives(self.mesh),
        )

    def _collectives(self, mesh: Mesh) -> Collectives:
        return collectives_of(mesh, by_columns=self.by_columns)

    def _dealing(self) -> Dealing:
        """Of what is measured over the data axis."""
        mesh = self.mesh
        if mesh.size == 1:
            return Dealing()
        alone = self._collectives(replace(mesh, data=Axis()))
        return Dealing(mesh.data.rank, mesh.data.size, alone=alone, agreement=self.agreement)

    def _context(self, step: int) -> StepContext:
        return StepContext(
            k=self.schedule.k(step),
            penalty_scale=self.schedule.penalty_scale(step),
            dead_after_tokens=self.dead_after_tokens,
            per_token=self.schedule.per_token(step),
            lr=self.schedule.learning_rate(step),
        )

    def _record(
        self,
        step: int,
        microbatches: Sequence[ActivationBatch],
        loss: BatchLoss,
        norm: float,
        batches: Batches,
    ) -> dict[str, Any]:
        return training_record(
            step,
            microbatches,
            loss,
            tokens=step * self.batch_tokens,
            epochs=batches.epochs,
            lr=self.schedule.learning_rate(step),
            grad_norm=norm,
            context=self._context(step),
            model=self.model,
        )

    def _evaluate(self, step: int, log: MetricsLog | None) -> None:
        """Calibrates the inference threshold on training rows and measures both rules on the held-out rows, in fp32."""
        if self.evaluator.calibrate(step, last=step == self.schedule.total_steps):
            self.calibrated_step = step
        if (found := self.evaluator.measure()) is not None:
            self._write(log, {"step": step, "eval": found})

    def _save(self, step: int, log: MetricsLog | None, batches: Batches) -> int:
        """Writes the checkpoint of `step` (or begins to), after the metrics up to it; returns `step`."""
        with self._told_together():
            if log is not None:
                log.sync()
        state = {
            "tokens": step * self.batch_tokens,
            "data": {
                "next_microbatch": step * self.microbatches_per_step,
                "store": self.source.identity,
                "source": self.agreement.gather(batches.state()),
            },
            "subject": self.store.manifest.subject,
            "layers": list(self.store.layers),
            "spec": self.model.spec.to_dict(),
            "calibrated_step": self.calibrated_step,
            "rng": rng_state(),
            "environment": self.environment,
            **origin(self.config),
        }
        with self.engine.master_weights():
            self.checkpointer.save(
                step,
                model=self.engine.model_state(),
                optimizer=self.engine.optimizer_state(),
                state=state,
                durable=lambda: self.source.checkpointed(step * self.microbatches_per_step),
            )
        return step

    def _restore(self, checkpoint: Checkpoint | None) -> int:
        """Loads a checkpoint into model, optimizer and generators; the step that it is of (0 without one)."""
        if checkpoint is None:
            return 0
        state = checkpoint.state
        if state["data"]["store"] != self.source.identity:
            raise AgreedError(
                f"{self.source.path} is not the store that run={self.folder.path} was trained on "
                f"until step {checkpoint.step}; give that store, or train.fresh=true to start over"
            )
        self.source_states = state["data"].get("source", [])
        with self.engine.master_weights():
            checkpoint.load_model(self.engine.model_state())
            checkpoint.load_optimizer(self.engine.optimizer_state())
        self.calibrated_step = state["calibrated_step"]
        restore_rng(state["rng"])
        if differences := environment_differences(state["environment"], self.environment):
            report(f"train: the same bits are promised only on the same set-up; {'; '.join(differences)}")
        report(f"train: continuing {self.folder.path} from step {checkpoint.step} of {self.schedule.total_steps}")
        return checkpoint.step

    def _where_to_resume(self) -> str:
        self.checkpointer.settle()
        if self.checkpointer.newest is None:
            return "no checkpoint was written yet"
        return f"resume from {self.checkpointer.newest} with `{resume_command(self.folder.path)}`"

    @contextmanager
    def _continuable(self) -> Iterator[None]:
        """Says of what goes wrong with the store, or with calibration, how training goes on afterwards."""
        try:
            yield
        except UserError as error:
            kind = AgreedError if isinstance(error, AgreedError) else UserError
            raise kind(f"{error}; then {self._where_to_resume()}") from error


def _headline(metrics: dict[str, Any]) -> str:
    evaluation = metrics.get("eval") or {}
    if not evaluation or evaluation["fvu"] is None or not math.isfinite(evaluation["fvu"]):
        return ""
    rule = evaluation["training_rule"]
    return (
        f"; held-out rows: FVU {evaluation['fvu']:.3f} at L0 {evaluation['l0']:.1f} "
        f"(training rule: {rule['fvu']:.3f} at {rule['l0']:.1f})"
    )
