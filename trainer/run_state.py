"""A run's state beside its model: what a checkpoint of it holds, and how a call goes on from one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from activation_store.errors import AgreedError, UserError
from activation_store.progress import report
from trainer.checkpoint import Checkpoint
from trainer.model.clt import CrossLayerTranscoder
from trainer.parallel.engine import Engine
from trainer.reproducibility import environment, environment_differences, restore_rng, rng_state
from trainer.run_folder import resume_command
from trainer.saving.origin import origin
from trainer.setup import Setup
from trainer.sources import Batches


class RunState:
    """calibrated_step: of the last calibration of the inference threshold. source_states: of the source, by rank, in
    the checkpoint that was restored.
    """

    def __init__(self, setup: Setup, model: CrossLayerTranscoder, engine: Engine) -> None:
        self._setup, self._model, self._engine = setup, model, engine
        self.calibrated_step: int | None = None
        self.source_states: Sequence[Mapping[str, Any]] = []
        kernels = setup.kernels
        self._environment = environment(setup.device) | {
            "kernels": kernels.name,
            "dense_above_density": kernels.config.dense_above_density,
        }

    def save(self, step: int, batches: Batches) -> None:
        """Writes the checkpoint of `step`, or begins to."""
        setup = self._setup
        position = step * setup.microbatches_per_step
        state = {
            "tokens": step * setup.batch_tokens,
            "data": {
                "next_microbatch": position,
                "store": setup.source.identity,
                "source": setup.agreement.gather(batches.state()),
            },
            "subject": setup.store.manifest.subject,
            "layers": list(setup.store.layers),
            "spec": self._model.spec.to_dict(),
            "calibrated_step": self.calibrated_step,
            "rng": rng_state(),
            "environment": self._environment,
            **origin(setup.config, by_columns=setup.by_columns),
        }
        with self._engine.master_weights():
            setup.checkpointer.save(
                step,
                model=self._engine.model_state(),
                optimizer=self._engine.optimizer_state(),
                state=state,
                durable=lambda: setup.source.checkpointed(position),
            )

    def restore(self, checkpoint: Checkpoint | None) -> int:
        """Loads a checkpoint into model, optimizer and generators; the step that it is of (0 without one)."""
        if checkpoint is None:
            return 0
        setup, state = self._setup, checkpoint.state
        run = setup.folder.path
        if state["data"]["store"] != setup.source.identity:
            raise AgreedError(
                f"{setup.source.path} is not the store that run={run} was trained on "
                f"until step {checkpoint.step}; give that store, or train.fresh=true to start over"
            )
        self.source_states = state["data"].get("source", [])
        with self._engine.master_weights():
            checkpoint.load_model(self._engine.model_state())
            checkpoint.load_optimizer(self._engine.optimizer_state())
        self.calibrated_step = state["calibrated_step"]
        restore_rng(state["rng"])
        if differences := environment_differences(state["environment"], self._environment):
            report(f"train: the same bits are promised only on the same set-up; {'; '.join(differences)}")
        report(f"train: continuing {run} from step {checkpoint.step} of {setup.schedule.total_steps}")
        return checkpoint.step

    def where_to_resume(self, *, without: str = "no checkpoint was written yet") -> str:
        """For an error's line. `without`: what it says where there is no checkpoint."""
        checkpointer = self._setup.checkpointer
        checkpointer.settle()
        if checkpointer.newest is None:
            return without
        return f"resume from {checkpointer.newest} with `{resume_command(self._setup.folder.path)}`"

    @contextmanager
    def continuable(self) -> Iterator[None]:
        """Says of what goes wrong with the store, or with calibration, how training goes on afterwards."""
        try:
            yield
        except UserError as error:
            kind = AgreedError if isinstance(error, AgreedError) else UserError
            again = f"start again with `{resume_command(self._setup.folder.path)}`"
            raise kind(f"{error}; then {self.where_to_resume(without=again)}") from error
