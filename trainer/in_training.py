"""Evaluation while a run trains: thresholds calibrated on training rows, both rules measured on the held-out rows."""

from typing import Any

import torch

from activation_store.errors import AgreedError
from activation_store.store import ActivationStore
from trainer.calibrate import calibrate_thresholds
from trainer.config import RunConfig
from trainer.dealing import Dealing
from trainer.held_out import evaluate_rows
from trainer.model.clt import CrossLayerTranscoder
from trainer.rows import CalibrationRows, held_out_batches


class Evaluator:
    """What `train.eval_every` asks for, with the definitions of `layerloom evaluate`, in fp32."""

    def __init__(
        self,
        config: RunConfig,
        store: ActivationStore,
        model: CrossLayerTranscoder,
        *,
        device: torch.device,
        dealing: Dealing,
    ) -> None:
        """`dealing`: of the batches, which are of a microbatch's rows, over the mesh."""
        self._config, self._store, self._model, self._device = config, store, model, device
        self._dealing = dealing
        self._held_out = store.held_out()
        self._batch_rows = config.train.microbatch_tokens or config.train.batch_size_tokens

    def calibrate(self, step: int, *, last: bool) -> bool:
        """Whether there were rows to calibrate the inference threshold on.

        Before the end of training, as many rows as are measured: a threshold for a point of the curve. Raises
        AgreedError, on all ranks, for weights that are not finite.
        """
        n_rows = self._config.activation.calibration_tokens
        if not last:
            n_rows = min(n_rows, 0 if self._held_out is None else self._held_out.n_rows)
        if n_rows == 0:
            return False
        rows = CalibrationRows(store=self._store, n_rows=n_rows, batch_rows=self._batch_rows, device=self._device)
        scope = self._config.activation.threshold_scope.value
        try:
            calibrate_thresholds(self._model, rows, scope, dealing=self._dealing)
        except AgreedError:
            raise
        except ValueError as error:
            # The last update may be the one that overflows: no later loss tells.
            raise AgreedError(f"after step {step}: {error}") from error
        return True

    def measure(self) -> dict[str, Any] | None:
        """What a line of metrics.jsonl has under `eval`; None without held-out rows. The same on all ranks."""
        if self._held_out is None:
            return None
        batches = held_out_batches(self._held_out, batch_rows=self._batch_rows, device=self._device)
        mean_out_LD = self._store.statistics().out_mean_LD.to(self._device)
        return evaluate_rows(self._model, batches, mean_out_LD=mean_out_LD, dealing=self._dealing)
