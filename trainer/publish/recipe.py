"""The resolved run config as it may leave this machine, and the part of it that a model card shows."""

from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from trainer.config import RunConfig

# Groups whose values say what was trained; the others say where and how it ran.
_RECIPE_GROUPS = ("model", "activation", "optim", "schedule", "train", "text", "store", "source", "kernels", "parallel")
# Knobs that do not change the result, and those that the card tells elsewhere.
_NOT_RECIPE = frozenset(
    {
        "train.fresh",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.checkpoint_path",
        "train.async_checkpoint",
        "train.log_every",
        "train.eval_every",
        "text.held_out_documents",
        "text.documents_per_block",
        "store.held_out_tokens",
        "store.chunk_rows",
        "store.shard_rows",
        "store.batch_contexts",
        "store.path",
        "store.scratch",
        "store.claim_seconds",
        "store.remote_options",
        "store.remote_requests",
        "store.remote_retry_seconds",
        "store.remote_cache_bytes",
        "store.remote_cache_dir",
        "source.prefetch_bytes",
        "source.threads",
        "text.path",
        "text.license",
    }
)
# Always shown; of the rest only what differs from the default.
_MAIN_KNOBS = (
    "model.n_features",
    "model.span",
    "model.skip",
    "model.input_scaling",
    "model.target_scaling",
    "activation.kind",
    "activation.k",
    "activation.scope",
    "activation.threshold_scope",
    "activation.auxk_coefficient",
    "optim.lr",
    "schedule.warmup_steps",
    "schedule.decay_fraction",
    "train.tokens",
    "train.batch_size_tokens",
    "train.precision",
    "text.context_length",
    "store.input_hook",
    "store.dtype",
)


def plain(value: Any) -> Any:
    """Nested dataclass values as plain YAML and JSON values: enums become their strings, tuples lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def without_machine_paths(value: Any) -> Any:
    """The same nested value with every string that is a path of this machine cut to its last part.

    Such are absolute paths, paths into a home folder, and relative ones that climb out with "..". Hub ids,
    package:// addresses and relative paths stay.
    """
    if isinstance(value, Mapping):
        return {key: without_machine_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_machine_paths(item) for item in value]
    return PureWindowsPath(value).name if isinstance(value, str) and is_machine_path(value) else value


def is_machine_path(text: str) -> bool:
    """Whether `text` is a path that means something on one machine alone."""
    if "://" in text:
        return text.startswith("file://")
    climbs = ".." in PurePosixPath(text).parts or ".." in PureWindowsPath(text).parts
    return climbs or text.startswith("~") or PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()


def shared_config(config: RunConfig, publishing: Mapping[str, Any]) -> str:
    """YAML of layerloom_config.yaml: the run's config without machine paths, and how it was published."""
    values = without_machine_paths({**plain(asdict(config)), "published": plain(publishing)})
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def recipe(config: RunConfig) -> list[tuple[str, Any]]:
    """(knob, value) of the main knobs, then of every other knob of the recipe that differs from its default."""
    values, defaults = _flat(config), _flat(RunConfig())
    shown = [(knob, values[knob]) for knob in _MAIN_KNOBS]
    for knob, value in values.items():
        changed = value != defaults[knob] and knob not in _MAIN_KNOBS and knob not in _NOT_RECIPE
        if changed and knob.partition(".")[0] in _RECIPE_GROUPS:
            shown.append((knob, value))
    return shown


def _flat(config: RunConfig) -> dict[str, Any]:
    groups: dict[str, Any] = plain(asdict(config))
    return {
        f"{group}.{name}": v for group, knobs in groups.items() if isinstance(knobs, dict) for name, v in knobs.items()
    }
