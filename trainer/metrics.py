"""metrics.jsonl, and the same numbers to Weights & Biases when asked for.

A line is written for every `train.log_every`-th step and for every evaluation; docs/train.md defines the keys. After a
resume the file holds each step once: lines beyond the checkpoint's step are cut off.
"""

import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from activation_store.atomic import read_json, write_bytes, write_json
from activation_store.batch import ActivationBatch
from activation_store.errors import UserError
from activation_store.progress import report
from trainer.config import LogConfig, RunConfig, WandbMode
from trainer.loss import StepContext
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.collectives import Collectives
from trainer.parallel.engine import BatchLoss
from trainer.run_folder import RunFolder, config_to_dict


@torch.no_grad()
def training_record(
    step: int,
    microbatches: Sequence[ActivationBatch],
    loss: BatchLoss,
    *,
    tokens: int,
    epochs: float,
    lr: float,
    grad_norm: float,
    context: StepContext,
    model: CrossLayerTranscoder,
) -> dict[str, Any]:
    """The line of a training step: everything in it is of this one batch, nothing is averaged over steps.

    `fvu` is by the training rule, in raw units, centred per layer and dimension on this batch, mean over layers.
    """
    assert loss.residual_L is not None
    fvu_L = loss.residual_L / _centred_squares([batch.mlp_out for batch in microbatches], model.collectives).to(
        loss.residual_L
    )
    n_features_total = model.spec.n_layers * model.spec.n_features
    dead_LF = model.tokens_since_active_LF >= context.dead_after_tokens
    record: dict[str, Any] = {
        "step": step,
        "tokens": tokens,
        "epoch": microbatches[0].epoch,
        "epochs": epochs,
        "lr": lr,
        "loss": loss.total.item(),
        "mse": loss.mse.item(),
        "penalty": loss.penalty.item(),
        "auxk": loss.auxk.item(),
        "pre_act": loss.pre_act.item(),
        "fvu": fvu_L.mean().item(),
        "fvu_per_layer": fvu_L.tolist(),
        "l0": loss.l0_L.sum().item(),
        "l0_per_layer": loss.l0_L.tolist(),
        "grad_norm": grad_norm,
        "dead_fraction": model.collectives.sum_features(dead_LF.sum()).item() / n_features_total,
    }
    if model.spec.is_topk:
        record["k"] = context.k
    else:
        record["penalty_scale"] = context.penalty_scale
    return record


def _centred_squares(parts: Sequence[Tensor], over: Collectives) -> Tensor:
    """(L) sum of squares about the mean of each layer and dimension, of rows (B, L, columns) in parts on all ranks."""
    total_LD = over.sum_data(torch.stack([part_BLD.sum(dim=0) for part_BLD in parts]).sum(dim=0))
    mean_LD = total_LD / (sum(map(len, parts)) * over.data_size)
    squares_L = torch.stack([(part_BLD - mean_LD).square_().sum(dim=2).sum(dim=0) for part_BLD in parts]).sum(dim=0)
    return over.sum_columns(over.sum_data(squares_L))


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file, up to the first line that is not whole (a kill may cut the last one)."""
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
        except ValueError:
            return
        yield record


def cut_after(path: Path, step: int) -> None:
    """Rewrites a metrics file, atomically, without what lies beyond `step` or is not whole."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    if path.is_file():
        write_bytes(path, b"".join(_line(record) for record in kept))


def check_wandb(log: LogConfig) -> None:
    """With wandb online: logs in, or raises UserError if that fails. On a terminal wandb asks for the key."""
    if log.wandb is not WandbMode.online:
        return
    import wandb  # heavy, and not wanted by most runs

    try:
        wandb.login()
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"log.wandb=online: {reason}; or keep its files here with log=wandb_offline, or metrics.jsonl alone with "
            "log=file"
        ) from None


def start_wandb(project: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """A run of wandb's. options: of `wandb.init`."""
    import wandb  # heavy, and not wanted by most runs

    return wandb.init(project=project, config=dict(config), **options)


class MetricsLog:
    """Appends records to `metrics.jsonl` and forwards them to wandb."""

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        *,
        resumed_from: int,
        start: Callable[[str, Mapping[str, Any], Mapping[str, Any]], Any] = start_wandb,
    ) -> None:
        """Cuts what lies beyond `resumed_from` and opens the file; wandb continues the run it had in this folder.

        start: as `start_wandb`.
        """
        cut_after(folder.metrics_file, resumed_from)
        self._file = folder.metrics_file.open("ab")
        self._wandb = None
        if config.log.wandb is not WandbMode.disabled:
            self._wandb = _continue_wandb(folder, config, start)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()  # tries again to write what a full disk did not take
        finally:
            if self._wandb is not None:
                self._wandb.finish(exit_code=0 if kind is None else 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record, which must have `step`. A number that is not finite becomes null."""
        self._file.write(_line(record))
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(flat(record), step=record["step"])

    def sync(self) -> None:
        """Makes what was written durable; called before a checkpoint that relies on it."""
        os.fsync(self._file.fileno())


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(_finite(record), allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The record with wandb's keys: nested ones joined by `/`, lists by index."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, list | tuple):
            found |= {f"{prefix}{key}/{index:02d}": item for index, item in enumerate(value)}
        else:
            found[f"{prefix}{key}"] = value
    return found


def _continue_wandb(
    folder: RunFolder, config: RunConfig, start: Callable[[str, Mapping[str, Any], Mapping[str, Any]], Any]
) -> Any:
    """Starts or continues the wandb run whose id the run folder keeps."""
    import wandb  # heavy, and not wanted by most runs

    log: LogConfig = config.log
    run_id = read_json(folder.wandb_file)["id"] if folder.wandb_file.is_file() else secrets.token_hex(4)
    write_json(folder.wandb_file, {"id": run_id, "project": log.project})
    options = {
        "name": log.name or folder.path.name,
        "id": run_id,
        # Steps that wandb has already are dropped by it when they come again, and they come again bit for bit.
        "resume": "allow",
        "mode": log.wandb.value,
        "dir": str(folder.path),
        "settings": wandb.Settings(silent=True, console="off"),
    }
    run = start(log.project, config_to_dict(config), options)
    where = run.url if log.wandb is WandbMode.online else f"{folder.path}/wandb (upload it with `wandb sync`)"
    report(f"wandb: {where}")
    return run
