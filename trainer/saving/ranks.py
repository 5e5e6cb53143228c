"""The processes that write and read a checkpoint together, over a group of their own.

A checkpoint is written by a thread while training goes on: its collectives must not mix with those of the step.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")
# A rank may wait for others that write, verify or upload much.
_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among them. `group` is None where there is no other."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that coordinates, reports and removes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank. Collective."""
        if self.group is None:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: T) -> T:
        """The first rank's value. Collective."""
        return self.gather(value)[0]


def all_ranks() -> Ranks:
    """All processes of torch.distributed, over a new gloo group; collective. One process without it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks()
    return Ranks(dist.get_world_size(), dist.get_rank(), dist.new_group(backend="gloo", timeout=_TIMEOUT))
