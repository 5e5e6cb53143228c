"""A harvest in a process of its own, to be killed. It is forked from a server that has imported what it needs."""

import os
import signal
import sys
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from activation_store.config import StoreConfig, SubjectConfig, TextConfig

Configs = tuple[SubjectConfig, TextConfig, StoreConfig]

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.conftest", "activation_store.harvest"])


def harvest_in_child(configs: Configs, stderr: Path | None = None) -> ForkServerProcess:
    """Starts a harvest on the CPU. It exits with 0, or 130 after SIGINT."""
    process = _CONTEXT.Process(target=_run, args=(configs, stderr))
    process.start()
    return process


def _run(configs: Configs, stderr: Path | None) -> None:
    from activation_store.harvest import harvest

    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(stderr or os.devnull, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(descriptor, 2)
    try:
        harvest(*configs, device="cpu")
    except KeyboardInterrupt:
        sys.exit(130)
