"""The device mesh: `data` x `feature`, one process a device, and who this process is in it.

Global rank = data rank * feature size + feature rank: the ranks of a feature group are neighbours (and on one node,
where the launcher fills nodes in order), and in the order of global ranks the shares of a batch are in the order of
its tokens.
"""

import gc
import sys
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from activation_store.device import resolve_device
from activation_store.errors import AgreedError, AgreedInterruptError, OwnError, UserError
from trainer.config import ParallelConfig
from trainer.parallel.launcher import local_rank, process_count

AXES = ("data", "feature")
# Ranks that wait while one reads, calibrates or writes must not give up before it is done.
_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the mesh as this process sees it. `group` is None where the axis has one rank and no processes."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True, slots=True)
class Mesh:
    """`data` (parts of a batch's tokens) x `feature` (parts of the features, or of the decoders' columns).

    device_mesh: torch's, with the axes of that name; None in a single process.
    """

    data: Axis = field(default_factory=Axis)
    feature: Axis = field(default_factory=Axis)
    device_mesh: DeviceMesh | None = None

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.data.size * self.feature.size

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return self.data.rank * self.feature.size + self.feature.rank

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes logs, metrics and files that are not partitioned."""
        return self.rank == 0


@contextmanager
def open_mesh(config: ParallelConfig, device: torch.device) -> Iterator[Mesh]:
    """The mesh of this run; leaves torch.distributed as it found it, but after an error that the other ranks do not
    know of: they may be waiting for this one, which has to end for them to notice.

    Raises UserError where the processes that were started are not as many as the mesh has.
    """
    wanted, started = config.data * config.feature, _started()
    if wanted != started:
        raise UserError(
            f"parallel.data={config.data} x parallel.feature={config.feature} wants {wanted} processes, and "
            f"{started} {'was' if started == 1 else 'were'} started; start with `torchrun --nproc-per-node {wanted}`, "
            "or change the sizes"
        )
    if wanted == 1 and not dist.is_initialized():
        yield Mesh()
        return
    ours, before = not dist.is_initialized(), set(_groups())
    if ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    orderly = False
    try:
        yield mesh_of(config.data, config.feature, device)
        orderly = True
    except (AgreedError, AgreedInterruptError):
        orderly = True
        raise
    finally:
        if ours and orderly:
            dist.destroy_process_group()
        elif orderly:
            end_groups(before)


def end_groups(but: Container[dist.ProcessGroup] = ()) -> None:
    """Ends process groups, but these and torch.distributed's own; the last made first, on every rank alike.

    Each of gloo's has a thread that wakes a hundred times a second for as long as it is there.
    """
    # DeepSpeed keeps some in its modules, and has to know.
    deepspeed = sys.modules.get("deepspeed.comm")
    ends = deepspeed if deepspeed is not None and deepspeed.is_initialized() else dist
    for group in reversed(_groups()):
        if group is not dist.group.WORLD and group not in but:
            ends.destroy_process_group(group)
    # DeviceMesh and engines refer to theirs in circles.
    gc.collect()


def _groups() -> list[dist.ProcessGroup]:
    """Those of this process, in the order in which they were made."""
    return list(dist.distributed_c10d._world.pg_map)


def rank_device(name: str) -> torch.device:
    """The device of this process: of several on one machine, each has the GPU of its number.

    Raises UserError (OwnError where other processes may have theirs) if it is not there.
    """
    if process_count() == 1:
        return resolve_device(name)
    try:
        device = resolve_device(name)
        if device.type == "cuda" and ":" not in str(device):
            device = resolve_device(f"cuda:{local_rank()}")
    except UserError as error:
        raise OwnError(str(error)) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def mesh_of(data: int, feature: int, device: torch.device) -> Mesh:
    """The mesh over the processes of an initialised torch.distributed, of which there are data * feature."""
    device_mesh = init_device_mesh(device.type, (data, feature), mesh_dim_names=AXES)
    axes = {
        name: Axis(size, device_mesh.get_local_rank(name), device_mesh.get_group(name))
        for name, size in zip(AXES, (data, feature), strict=True)
    }
    return Mesh(axes["data"], axes["feature"], device_mesh)


def _started() -> int:
    """Processes of this job."""
    return dist.get_world_size() if dist.is_initialized() else process_count()
