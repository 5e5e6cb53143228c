"""Harvests and readers in processes of their own, to be killed. They are forked from a server that has imported what
they need."""

import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from activation_store.config import StoreConfig, SubjectConfig, TextConfig

Configs = tuple[SubjectConfig, TextConfig, StoreConfig]

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.conftest", "activation_store.harvest"])


def harvest_in_child(configs: Configs, stderr: Path | None = None) -> ForkServerProcess:
    """Starts a harvest on the CPU. It exits with 0, 2 after a UserError, or 130 after SIGINT."""
    return in_child(_run, configs, stderr)


def in_child(work: Callable[..., None], *arguments: object) -> ForkServerProcess:
    """Starts `work` with this process's AWS settings."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    process = _CONTEXT.Process(target=_with_settings, args=(settings, work, *arguments))
    process.start()
    return process


def _with_settings(settings: dict[str, str], work: Callable[..., None], *arguments: object) -> None:
    os.environ.update(settings)
    work(*arguments)


def _run(configs: Configs, stderr: Path | None) -> None:
    from activation_store.errors import UserError
    from activation_store.harvest import harvest

    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(stderr or os.devnull, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(descriptor, 2)
    try:
        harvest(*configs, device="cpu")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
