"""Real processes over gloo on this machine, one thread each, for what a benchmark measures on a mesh."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from benchmarks.links import End, enter

Found = TypeVar("Found")


def in_ranks(size: int, function: Callable[..., Found], *args: Any, ends: Sequence[End] = ()) -> Found:
    """What function(*args), a module's own, returns on rank 0 of `size` new processes that all run it.

    ends: of the link between them, one for each.

    Raises:
        SystemExit: a process failed; it has said why.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="layerloom-ranks-") as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_rank, args=(rank, size, store, ends[rank] if ends else None, queue, function, args))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        found: list[Found] = []
        while any(process.is_alive() for process in processes):
            if any(process.exitcode for process in processes):
                # The others may wait for it for ever.
                for process in processes:
                    process.kill()
            # Read before the end, for a large answer fills the pipe.
            if not queue.empty():
                found.append(queue.get())
            processes[0].join(0.1)
        for process in processes:
            process.join()
        if not queue.empty():
            found.append(queue.get())
    if not found or any(process.exitcode for process in processes):
        sys.exit("a process failed: see above")
    return found[0]


def join(rank: int, size: int, store: str) -> None:
    """Makes this process a rank, as torchrun does: accelerate goes by the environment."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)


def _rank(
    rank: int,
    size: int,
    store: str,
    end: End | None,
    queue: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    if end is not None:
        enter(end)
    join(rank, size, store)
    found = function(*args)
    if rank == 0:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()
