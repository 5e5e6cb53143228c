"""How long a step takes with decoders by columns, of what it takes with rows: measured, by device and by link.

`python -m benchmarks.splits` measures it (benchmarks/results/splits.md): whole steps of two processes, in turns, over
how many bytes either way sends. On one machine messages cost next to nothing, and rows have less to do: a rank decodes
its own entries alone, and nothing waits for codes. Over a slow link the bytes count, up to a point. Nothing was
measured between GPUs.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Link(NamedTuple):
    """What a feature group's ranks speak over. device: the type of their devices."""

    device: str
    one_machine: bool


class Steps(NamedTuple):
    """Steps that were measured. where: the conditions, for the log. points: bytes of columns to those of rows, and the
    time of columns to that of rows there; in order.
    """

    where: str
    points: tuple[tuple[float, float], ...]

    def time_ratio(self, bytes_ratio: float) -> float:
        """Of columns to rows: between two points by the logarithm of the bytes, outside as at the nearest."""
        if bytes_ratio <= self.points[0][0]:
            return self.points[0][1]
        for (low, at_low), (high, at_high) in pairwise(self.points):
            if bytes_ratio <= high:
                share = math.log(bytes_ratio / low) / math.log(high / low)
                return at_low + share * (at_high - at_low)
        return self.points[-1][1]


# Means of the two shapes that every link of the page has; from 1.0 on, what one of them has.
_MEASURED = {
    Link("cpu", one_machine=True): Steps(
        "two CPU processes of one machine", ((0.03, 1.085), (0.13, 1.09), (0.5, 1.175), (1.0, 1.17))
    ),
    Link("cpu", one_machine=False): Steps(
        "two CPU processes over 1 Gbit/s", ((0.03, 0.86), (0.13, 0.945), (0.5, 0.995), (1.0, 1.02), (6.0, 1.06))
    ),
}


def measured_steps(link: Link) -> Steps | None:
    """What was measured over such a link, if it was."""
    return _MEASURED.get(link)


def groups_in_one_machine(hosts: Sequence[str], feature: int) -> bool:
    """Whether each feature group lies within a machine; hosts: the name of every rank's."""
    groups = (hosts[first : first + feature] for first in range(0, len(hosts), feature))
    return all(len(set(group)) == 1 for group in groups)
