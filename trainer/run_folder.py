"""A run folder: its config, what counts as one, and when a call may continue it.

config.yaml  metrics.jsonl  checkpoints/  evaluation.json  plots/  profile/  sample/  wandb/  wandb.json
"""

import copy
import dataclasses
import fcntl
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from activation_store.atomic import write_text
from activation_store.compare import config_differences
from activation_store.config import SourceKind
from activation_store.errors import UserError
from activation_store.object_storage import ObjectStorageOptions
from activation_store.places import Place, place
from trainer.config import RunConfig
from trainer.parallel.launcher import launching_words, process_count

# What a run's weights do not depend on, and so may change from one call to the next. `store.path` is free because a
# checkpoint records which store it was trained on, and a resume compares that.
FREE_FIELDS = (
    "run",
    "device",
    "log",
    "train.fresh",
    "train.keep_checkpoints",
    "train.checkpoint_every",
    "train.async_checkpoint",
    "train.eval_every",
    "train.log_every",
    "train.profile",
    "source.prefetch_bytes",
    "source.threads",
    "source.harvester_devices",
    "source.budget_bytes",
    # Any mesh and engine go on with what another has begun.
    "parallel",
    "engine",
    "store.path",
    "store.batch_contexts",
    "store.scratch",
    "store.claim_seconds",
    "store.remote_options",
    "store.remote_requests",
    "store.remote_retry_seconds",
    "store.remote_cache_bytes",
    "store.remote_cache_dir",
    "subject.cache_dir",
    "subject.base_model",
    "subject.model_name",
    "subject.license",
    "text.license",
)
_OWN_NAMES = (
    "config.yaml",
    "metrics.jsonl",
    "checkpoints",
    "evaluation.json",
    "evaluation_inputs.json",
    "plots",
    "profile",
    "sample",
    "wandb",
    "wandb.json",
)


class RunFolder:
    """Paths of a run, and the rules of starting, continuing and replacing it."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.evaluation_file = self.path / "evaluation.json"
        self.plots = self.path / "plots"
        # A store of the beginning of the text and of the held-out documents, where a run has no other.
        self.sample = self.path / "sample"
        self.wandb_file = self.path / "wandb.json"

    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config_file.is_file()

    def check(self, config: RunConfig) -> None:
        """Refuses a folder of something else, and (unless train.fresh) a run of a different config. Writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run={self.path} is a file; give a folder that is empty, new, or a run")
        if not self.exists():
            if self.path.is_dir() and (other := _visible_names(self.path)):
                raise UserError(
                    f"run={self.path} is not a run folder (it has {other[0]} but no config.yaml); give a folder that "
                    "is empty or new, or one that `layerloom train` made"
                )
            return
        if not config.train.fresh:
            self._check_same(config)

    def start(self, config: RunConfig) -> None:
        """Makes the folder ready for `config`: discards the run there if train.fresh, and writes config.yaml."""
        if config.train.fresh and self.exists():
            self._discard()
        self.path.mkdir(parents=True, exist_ok=True)
        for partial in (*self.path.glob(".*.partial"), *self.plots.glob(".*.partial")):
            partial.unlink()  # what a kill left; the folder is locked
        save_config(self.path, config)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second process from training here at the same time (UserError)."""
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"run={self.path} is being trained by another process; wait for it, or give another run folder"
                ) from None
            yield
        finally:
            os.close(descriptor)

    def _check_same(self, config: RunConfig) -> None:
        differences = config_differences(_binding(load_config(self.path)), _binding(config))
        if differences:
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise UserError(
                f"run={self.path} was started with another config: {differences[0]}{more}; give the same values, "
                "another run folder, or train.fresh=true to start over"
            )

    def _discard(self) -> None:
        # config.yaml goes last: a kill in between leaves what is still a run folder.
        for name in reversed(_OWN_NAMES):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def checkpoint_folder(run: Path | str, config: RunConfig) -> Place:
    """Where the checkpoints of a run of that config are. Raises UserError for a URL that cannot be."""
    if not config.train.checkpoint_path:
        return RunFolder(run).checkpoints
    # What is read of a checkpoint is read once: no local copies.
    return place(config.train.checkpoint_path, ObjectStorageOptions(cache_bytes=0))


def checkpoint_differences(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """What a checkpoint's config has that may not differ, as `name: x there, y asked for`."""
    return config_differences(_without_free(copy.deepcopy(dict(saved))), _binding(config))


def save_config(run: Path | str, config: RunConfig) -> None:
    """Writes the resolved config (the RunConfig part of it) as `config.yaml`, whole or not at all."""
    plain = config_to_dict(config)
    plain["train"]["fresh"] = False
    write_text(Path(run) / "config.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def load_config(run: Path | str) -> RunConfig:
    """The config of a run folder. Raises UserError if `run` is not one, or its config is not of this version."""
    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise UserError(
            f"run={run} is not a run folder: it has no config.yaml; give a folder that `layerloom train` made"
        )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(file))
        return cast(RunConfig, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{file} is not a config of this version: {first_line}; train into another run folder"
        ) from error


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """The fields of RunConfig as plain nested values (a subclass's further fields are left out)."""
    part = RunConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)})
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(part), enum_to_str=True))


def resume_command(run: Path | str, verb: str = "train") -> str:
    """What to type to continue: the command that is running, without train.fresh, or `layerloom VERB run=...`; as one
    of several processes, with what starts them.
    """
    words = [verb, f"run={run}"]
    if Path(sys.argv[0]).name == "layerloom" or (process_count() > 1 and sys.argv[0].endswith("launch/main.py")):
        words = [word for word in sys.argv[1:] if not word.startswith("train.fresh")]
    return shlex.join([*launching_words(), *words])


def _binding(config: RunConfig) -> Mapping[str, Any]:
    """The config without its free fields."""
    return _without_free(config_to_dict(config))


def _without_free(values: dict[str, Any]) -> dict[str, Any]:
    for name in FREE_FIELDS:
        *groups, key = name.split(".")
        holder = values
        for group in groups:
            holder = holder[group]
        holder.pop(key, None)
    if values["source"]["kind"] != SourceKind.live.name:
        # Who fills a store, and how many, changes nothing of it.
        values["source"].pop("harvesters", None)
    return values


def _visible_names(folder: Path) -> list[str]:
    """Entries other than hidden ones (.hydra, .lock, .DS_Store), sorted."""
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
