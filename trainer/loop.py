"""The training loop.

    update n = 1, 2, ...:  microbatches (n-1) m ... n m - 1 -> loss and gradients -> norm -> clip -> Adam
                           -> dead-feature state -> metrics -> evaluation -> checkpoint

Everything that update n depends on is a function of the config, the store and what the checkpoint of an earlier step
holds, so that a run which is killed and resumed ends with the same bits (docs/train.md says on what conditions).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch.profiler import record_function

from activation_store.batch import ActivationBatch
from activation_store.errors import AgreedInterruptError
from activation_store.progress import Progress, report
from trainer.checkpoint import Checkpoint
from trainer.full_disk import full_disk_told
from trainer.in_training import Evaluator
from trainer.interrupt import StopRequest
from trainer.loss import StepContext
from trainer.metrics import MetricsLog, start_wandb, training_record
from trainer.nonfinite import check_finite
from trainer.parallel.engine import BatchLoss, Engine, TracksRuns, build_engine
from trainer.profile import profiled
from trainer.reproducibility import seed_everything
from trainer.run_folder import resume_command
from trainer.run_state import RunState
from trainer.schedule import dead_after_tokens
from trainer.setup import Setup
from trainer.sources import Batches


class Loop:
    """One call's training: the model and its engine, and the steps of the loop that are not the engine's."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config = setup, setup.config
        self.mesh, self.agreement, self.schedule = setup.mesh, setup.agreement, setup.schedule
        self.dead_after_tokens = dead_after_tokens(self.config)
        seed_everything(self.config.model.seed)
        self.model = setup.model()
        self.engine: Engine = build_engine(replace(self.config, kernels=setup.kernels.config), self.model, self.mesh)
        self.evaluator = Evaluator(self.config, setup.store, self.model, device=setup.device, dealing=setup.dealing())
        self.state = RunState(setup, self.model, self.engine)

    def train(self, checkpoint: Checkpoint | None) -> None:
        """The loop."""
        train, last_step, batch_tokens = self.config.train, self.schedule.total_steps, self.setup.batch_tokens
        step = self.state.restore(checkpoint)
        with ExitStack() as stack:
            stack.enter_context(self.setup.checkpointer)
            stop = stack.enter_context(StopRequest(told_later=self.mesh.size > 1))
            log = self._open_log(stack, step)
            batches = stack.enter_context(self.setup.batches(step, self.state.source_states, self.model))
            progress = stack.enter_context(
                Progress("train", total=last_step * batch_tokens, unit="tok", initial=step * batch_tokens)
            )
            profile = stack.enter_context(
                profiled(self.setup.folder.path, self.mesh.rank, self.agreement, wanted=train.profile)
            )
            saved_step, stopped = step, False
            while step < last_step and not stopped:
                with self.state.continuable(), record_function("step: wait for rows"):
                    microbatches = [next(batches) for _ in range(self.setup.microbatches_per_step)]
                step += 1
                logged = step % train.log_every == 0 or step in {1, last_step}
                loss, norm = self._update(step, microbatches, logged=logged)
                note = ""
                if logged:
                    record = self._record(step, microbatches, loss, norm, batches)
                    self._write(log, record)
                    note = f"fvu {record['fvu']:.3f}, l0 {record['l0']:.0f}"
                if step == last_step or (train.eval_every and step % train.eval_every == 0):
                    with self.state.continuable(), self.engine.master_weights():
                        self._evaluate(step, log)
                if step < last_step and train.checkpoint_every and step % train.checkpoint_every == 0:
                    saved_step = self._save(step, log, batches)
                progress.advance(batch_tokens, note=note)
                if train.profile:
                    with self._told_together():
                        profile.step()
                # A signal reaches one rank before another, or one rank alone: they stop after the same step.
                stopped = self.agreement.any(stop.requested)
            if step > saved_step:
                self._save(step, log, batches)
        if stopped:
            # In the last step too: what would follow training must not start.
            resume = f"continue with `{resume_command(self.setup.folder.path)}`"
            left = resume if step < last_step else "training is complete"
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
                resume=self.state.where_to_resume,
            )
        with record_function("step: update"):
            self.engine.update(norm)
            self.model.record_step(
                loss.fired, self.setup.batch_tokens, loss.batch_threshold_L, self.config.activation.threshold_decay
            )
        return loss, norm

    def _open_log(self, stack: ExitStack, step: int) -> MetricsLog | None:
        """On rank 0, until the stack is closed."""
        with self.agreement.together():
            if self.mesh.is_first:
                start = self.engine.start_wandb if isinstance(self.engine, TracksRuns) else start_wandb
                log = MetricsLog(self.setup.folder, self.config, resumed_from=step, start=start)
                return stack.enter_context(log)
        return None

    def _write(self, log: MetricsLog | None, record: dict[str, Any]) -> None:
        with self._told_together():
            if log is not None:
                log.write(record)

    @contextmanager
    def _told_together(self) -> Iterator[None]:
        """What fails on one rank fails on all; a full disk with the command that continues."""
        folder = self.setup.folder.path
        with self.agreement.together(), full_disk_told(folder, resume_command(folder)):
            yield

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
            tokens=step * self.setup.batch_tokens,
            epochs=batches.epochs,
            lr=self.schedule.learning_rate(step),
            grad_norm=norm,
            context=self._context(step),
            model=self.model,
        )

    def _evaluate(self, step: int, log: MetricsLog | None) -> None:
        """Calibrates the inference threshold on training rows and measures both rules on the held-out rows, in fp32."""
        if self.evaluator.calibrate(step, last=step == self.schedule.total_steps):
            self.state.calibrated_step = step
        if (found := self.evaluator.measure()) is not None:
            self._write(log, {"step": step, "eval": found})

    def _save(self, step: int, log: MetricsLog | None, batches: Batches) -> int:
        """Writes the checkpoint of `step` (or begins to), after the metrics up to it; returns `step`."""
        with self._told_together():
            if log is not None:
                log.sync()
        self.state.save(step, batches)
        return step
