"""One point of a sweep: the task that Hydra's launcher calls, on this machine or on another."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from activation_store.atomic import read_json, write_json
from activation_store.errors import UserError, os_error_line
from activation_store.progress import report
from launch.config import LayerloomConfig
from launch.stages import prepare
from launch.usage import Usage

RESULT_FILE = "result.json"
# What may go wrong in one point and leave the others be: a user's mistake, the machine's limits, torch's own refusals.
_FAILURES = (UserError, RuntimeError, OSError, MemoryError)
_READABLE_LENGTH = 40


@dataclass(frozen=True)
class PointTask:
    """Trains and evaluates one point into `output/points/<slug>`; `keys` are those that vary, in the grid's order."""

    output: Path
    keys: tuple[str, ...]

    def __call__(self, node: DictConfig) -> str:
        """Returns the point's slug. A failure is recorded in its result.json; only an interruption leaves."""
        chosen = dict(word.split("=", 1) for word in HydraConfig.get().overrides.task)
        slug = point_slug({key: chosen[key] for key in self.keys})
        config = OmegaConf.to_object(node)
        assert isinstance(config, LayerloomConfig)
        config = replace(config, run=str(self.output / "points" / slug))
        result_file = Path(config.run) / RESULT_FILE
        before: dict[str, Any] = read_json(result_file) if result_file.is_file() else {}
        # A run folder that never began must not look like a folder of something else.
        result_file.unlink(missing_ok=True)
        report(f"\npoint {slug}")
        try:
            result = {"status": "done", "error": "", **_run_point(config, before)}
        except _FAILURES as error:
            message = " ".join(str(error).split()) or type(error).__name__
            report(f"point {slug} failed: {message}")
            result = {"status": "failed", "error": message, "seconds": None, "metrics": {}}
        values = flatten(OmegaConf.to_container(node, enum_to_str=True))
        try:
            write_json(result_file, {"point": slug, "config": values, **result})
        except OSError as error:  # a full disk: this point is done again, the others go on
            report(f"point {slug}: its result could not be written ({os_error_line(error)})")
        return slug


def _run_point(config: LayerloomConfig, before: Mapping[str, Any]) -> dict[str, Any]:
    prepare(config, "train")
    from trainer.evaluation.evaluate import evaluate
    from trainer.evaluation.inputs import evaluation_is_current
    from trainer.run_folder import RunFolder
    from trainer.train import train

    with Usage() as usage:
        summary = train(config)
    nothing_left = summary.resumed_from == summary.steps
    seconds = before.get("seconds") if nothing_left else usage.seconds
    if not config.sweep.evaluate:
        return {"seconds": seconds, "metrics": summary.metrics.get("eval") or {}}
    if evaluation_is_current(config.run, config.eval):
        metrics = read_json(RunFolder(config.run).evaluation_file)
    else:
        metrics = evaluate(Path(config.run), config.eval, device=config.device)
    return {"seconds": seconds, "metrics": metrics}


def point_slug(values: Mapping[str, str]) -> str:
    """`n_features-512_k-8`: a folder name that tells the point; different values never share one."""
    names = [key.split(".")[-1] for key in values]
    if len(set(names)) < len(names):
        names = list(values)
    return "_".join(f"{name}-{_readable(value)}" for name, value in zip(names, values.values(), strict=True))


def _readable(value: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", value)
    if plain == value and len(value) <= _READABLE_LENGTH:
        return value
    return f"{plain[:_READABLE_LENGTH].strip('-')}-{hashlib.sha256(value.encode()).hexdigest()[:8]}"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """`{"model": {"k": 1}}` -> `{"model.k": 1}`; lists become text."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(item) if isinstance(item, Sequence) and not isinstance(item, str) else item
    return flat
