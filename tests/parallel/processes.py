"""Real processes over gloo on this machine, started once and used for many cases.

    with Processes(4) as processes:
        results = processes.run(function, argument, ...)        # one result for each rank, in order

`function` is a module's own (it is pickled by name) and runs on every rank at once, as function(*args, **kwargs). An
exception on any rank comes back with its traceback; a rank that does not answer in time is an error too. Either way all
processes are killed, since the others may wait for ever in a collective, and the next `run` starts new ones.
"""

import multiprocessing
import os
import pickle
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

# A collective that waits longer than this raises on the rank that waits, with a traceback that says where.
_COLLECTIVE_TIMEOUT = timedelta(seconds=300)


class RankError(AssertionError):
    """What failed, and on which ranks."""


class Processes:
    """A group of `size` processes with torch.distributed over gloo, one thread each.

    initialise: False leaves torch.distributed alone; the environment is that of torchrun, so that the code under test
    can set it up itself.
    """

    def __init__(self, size: int, *, initialise: bool = True) -> None:
        self.size = size
        self._initialise = initialise
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 600, **kwargs: Any) -> list[Any]:
        """The results of function(*args, **kwargs) by rank.

        Raises:
            RankError: the tracebacks of the ranks that failed, or who did not answer within `timeout` seconds.
        """
        return self.run_each(function, [args] * self.size, timeout=timeout, **kwargs)

    def run_each(
        self, function: Callable[..., Any], args_by_rank: list[tuple[Any, ...]], *, timeout: float = 600, **kwargs: Any
    ) -> list[Any]:
        """As `run`, with arguments of its own for each rank."""
        if not self._processes:
            self._start()
        for pipe, args in zip(self._pipes, args_by_rank, strict=True):
            pipe.send_bytes(pickle.dumps((function, args, kwargs)))
        results: dict[int, Any] = {}
        try:
            self._collect(results, time.monotonic() + timeout)
        except BaseException:
            self.close(kill=True)
            raise
        return [results[rank] for rank in range(self.size)]

    def close(self, *, kill: bool = False) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if kill:
                process.kill()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="layerloom-ranks-")
        context = multiprocessing.get_context("spawn")
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            store = Path(self._folder.name) / "store" if self._initialise else None
            process = context.Process(target=_serve, args=(theirs, rank, self.size, environment, store), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, results: dict[int, Any], deadline: float) -> None:
        waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        failures: dict[int, str] = {}
        while waiting:
            for pipe in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                rank = waiting.pop(pipe)
                try:
                    good, payload = pickle.loads(self._pipes[rank].recv_bytes())
                except EOFError:
                    good, payload = False, "the process died"
                (results if good else failures)[rank] = payload
            if failures and deadline - time.monotonic() > 5:
                # Others may fail with it, and say more; they may also wait for it for ever.
                deadline = time.monotonic() + 5
            if waiting and time.monotonic() >= deadline:
                break
        if failures or waiting:
            said = [f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())]
            silent = f"no answer from ranks {sorted(waiting.values())}" if waiting else ""
            raise RankError("\n".join([*said, silent]))


def _serve(pipe: Connection, rank: int, size: int, environment: dict[str, str], store: Path | None) -> None:
    """One process: runs what comes through the pipe until it is closed."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ["LOCAL_WORLD_SIZE"] = str(size)
    import torch
    import torch.distributed as dist

    from trainer.parallel.mesh import end_groups

    torch.set_num_threads(1)
    if store is not None:
        dist.init_process_group(
            "gloo", init_method=store.as_uri(), rank=rank, world_size=size, timeout=_COLLECTIVE_TIMEOUT
        )
    while True:
        try:
            function, args, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (True, function(*args, **kwargs))
        except BaseException:  # noqa: BLE001 - whatever it is, the parent shows it
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
        if answer[0] and store is not None:
            # Those that the function left.
            end_groups()


def free_port() -> int:
    """A port that nobody listens on, below those that Linux hands out: other tests' sockets would get one of these in
    the seconds until rank 0 listens.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
