"""What all ranks must decide alike: to stop, to go on, that something failed. On one device, nothing to agree on.

    with agreement.together():      what fails on one rank (a damaged shard, a full disk) fails on all of them
        ...                         no collective in here: the others would wait in it for the one that failed
    stop = agreement.any(wanted)
    kernels = agreement.first(kernels)

Over gloo, whatever the devices: the numbers are on the CPU, and no stream waits for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from activation_store.errors import AgreedError, PeersLostError, UserError, os_error_line
from trainer.parallel.mesh import Mesh

T = TypeVar("T")


class Agreement:
    """Decisions over all ranks of a mesh. Every method is to be called by all of them, in the same order."""

    def __init__(self, mesh: Mesh) -> None:
        """Makes a process group of its own; collective."""
        self._size, self._rank = mesh.size, mesh.rank
        self._group = dist.new_group(backend="gloo") if mesh.size > 1 else None

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        if self._group is None:
            return flag
        total = torch.tensor([int(flag)])
        dist.all_reduce(total, group=self._group)
        return bool(total.item() > 0)

    def first(self, value: T) -> T:
        """Rank 0's value."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order."""
        if self._group is None:
            return [value]
        values = [value] * self._size
        dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """An exception in the block on any rank becomes an AgreedError of all, with what the first of them had to say.

        What is no UserError or OSError is a fault of the program: the rank that has it raises it itself.
        """
        if self._group is None:
            yield
            return
        problem: Exception | None = None
        try:
            yield
        except PeersLostError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait for this rank
            problem = error
        if not self.any(problem is not None):
            return
        texts = self.gather(self._text(problem))
        if problem is not None and not isinstance(problem, UserError | OSError):
            raise problem
        raise AgreedError(next(text for text in texts if text is not None)) from problem

    def _text(self, problem: Exception | None) -> str | None:
        if problem is None:
            return None
        if isinstance(problem, UserError):
            return str(problem)
        if isinstance(problem, OSError):
            return os_error_line(problem)
        return f"rank {self._rank} failed ({type(problem).__name__}); its own output says more"


@contextmanager
def lost_peers_told(resume: str) -> Iterator[None]:
    """Turns what torch raises when another process has gone into one line (PeersLostError) that says `resume`."""
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        raise PeersLostError(
            f"another process of this run ended or cannot be reached any more; its own output may say why; {resume}",
            tell=_is_first_to_tell(),
        ) from error


def _is_lost_peer(error: RuntimeError) -> bool:
    """gloo's errors have no class of their own, but name its files."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def _is_first_to_tell() -> bool:
    """Whether this rank is the first that asks: the others need not say it again. Without a store, all say it."""
    try:
        # torchrun's store lives in its agent, which outlives any rank.
        return dist.distributed_c10d._get_default_store().add("layerloom/told", 1) == 1
    except (RuntimeError, ValueError):
        return True
