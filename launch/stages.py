"""What each verb does with its config. Heavy imports stay inside, so that a wrong word is answered at once."""

import logging
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from activation_store.config import SourceKind
from activation_store.errors import UserError
from launch.arguments import Arguments
from launch.compose import parse_overrides
from launch.config import LayerloomConfig
from launch.validate import validate


def prepare(config: LayerloomConfig, verb: str) -> None:
    """Checks the config and sets this process up: threads, and no chatter from libraries."""
    quiet_libraries()
    validate(config, verb)
    import torch

    from activation_store.device import resolve_device

    resolve_device(config.device)
    # Of a mesh, the processes of this machine share its cores.
    share = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(config.launch.threads or share)


def quiet_libraries() -> None:
    """To be called before the libraries are imported, for they read it then (some rules of `validate` import them).

    A bar for every file that `datasets` opens would drown the stage's own. transformers asks accelerate for help when
    it saves a subject, which imports DeepSpeed wherever it is installed, which then warns that it finds no GPU.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("DeepSpeed").addFilter(_is_no_guess)


def _is_no_guess(record: logging.LogRecord) -> bool:
    """With engine=deepspeed there is none: it is told the device."""
    return not record.getMessage().startswith("Setting accelerator to CPU.")


def harvest(config: LayerloomConfig, arguments: Arguments) -> int:
    """`layerloom harvest`."""
    prepare(config, "harvest")
    if config.source.kind is SourceKind.rolling:
        from activation_store.rolling_harvest import harvest_rolling

        harvest_rolling(config.subject, config.text, config.store, config.source, device=config.device)
        return 0
    from activation_store.harvest import harvest as run_harvest

    run_harvest(config.subject, config.text, config.store, device=config.device)
    return 0


def train(config: LayerloomConfig, arguments: Arguments) -> int:
    """`layerloom train`."""
    config = _continued(config, arguments)
    prepare(config, "train")
    from trainer.train import train as run_train

    run_train(config)
    return 0


def _continued(config: LayerloomConfig, arguments: Arguments) -> LayerloomConfig:
    """`layerloom train run=DIR` and no more about the run: its own settings are taken.

    What a run may go on with otherwise (FREE_FIELDS) is what the words say, and the run's where they say nothing.
    """
    from trainer.run_folder import FREE_FIELDS, RunFolder, load_config

    words = parse_overrides(arguments.overrides)
    keys = [str(word.key_or_group) for word in words]
    groups = [key.partition(".")[0] for key in keys]
    about_this_call = all(
        key in FREE_FIELDS or group in (*FREE_FIELDS, "launch") for key, group in zip(keys, groups, strict=True)
    )
    if "run" not in keys or not about_this_call or not RunFolder(config.run).exists():
        return config
    there = load_config(config.run)
    kept = {field.name: getattr(there, field.name) for field in fields(there)}
    told: dict[str, Any] = {}
    for key, group in zip(keys, groups, strict=True):
        if group not in kept:
            continue
        if key == group:
            told[group] = getattr(config, group)
        else:
            name = key.removeprefix(f"{group}.")
            told[group] = replace(told.get(group, kept[group]), **{name: getattr(getattr(config, group), name)})
    return replace(config, **{**kept, **told})


def evaluate(config: LayerloomConfig, arguments: Arguments) -> int:
    """`layerloom evaluate`."""
    prepare(config, "evaluate")
    from trainer.evaluation.evaluate import evaluate as run_evaluate

    run_evaluate(Path(config.run), config.eval, parallel=config.parallel, device=config.device)
    return 0


def publish(config: LayerloomConfig, arguments: Arguments) -> int:
    """`layerloom publish`."""
    prepare(config, "publish")
    from trainer.publish.export import publish as run_publish

    run_publish(Path(config.run), Path(config.output), config.publish, device=config.device)
    return 0


def store(config: LayerloomConfig, arguments: Arguments) -> int:
    """`layerloom store info | verify | repair | merge | remove`."""
    from activation_store.places import store_place
    from launch import stores

    keys = {str(word.key_or_group) for word in parse_overrides(arguments.overrides)}
    if arguments.action == "remove" and not (arguments.folders or "store.path" in keys):
        raise UserError("store remove wants the folder to delete: layerloom store remove FOLDER")
    names = arguments.folders or (config.store.path,)
    folders = [store_place(config.store, name) for name in names]
    return getattr(stores, arguments.action)(config, folders, keys)  # type: ignore[no-any-return]


def checkpoint(config: LayerloomConfig, arguments: Arguments) -> int:
    """`layerloom checkpoint info | convert | verify`."""
    from launch import checkpoints

    keys = {str(word.key_or_group) for word in parse_overrides(arguments.overrides)}
    if not (arguments.folders or "run" in keys):
        raise UserError(
            f"checkpoint {arguments.action} wants a run or a checkpoint: layerloom checkpoint {arguments.action} FOLDER"
        )
    name = arguments.folders[0] if arguments.folders else config.run
    return getattr(checkpoints, arguments.action)(config, name, keys)  # type: ignore[no-any-return]


def sweep(config: LayerloomConfig, arguments: Arguments) -> int:
    """`layerloom sweep`."""
    from launch.sweep import run_sweep

    return run_sweep(config, arguments)


def tune(config: LayerloomConfig, arguments: Arguments) -> int:
    """`layerloom tune`."""
    prepare(config, "tune")
    from launch.tune import run_tune

    run_tune(config)
    return 0


def demo(config: LayerloomConfig, arguments: Arguments) -> int:
    """`layerloom demo`."""
    prepare(config, "demo")
    from launch.demo import run_demo

    run_demo(config)
    return 0
