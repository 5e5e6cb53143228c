"""In which order live rows are drawn from the ring: as they come and at random, or as a pure function.

`Drawn` rows are numbers of rows of the ring; a mixer holds those that are filled and not drawn yet.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from activation_store.errors import UserError
from activation_store.live_harvest import Filled
from activation_store.ring import IntRows
from activation_store.share import TextPlace

_NO_ROWS: IntRows = np.empty(0, dtype=np.int64)


class Mixer(Protocol):
    """The order in which rows are drawn."""

    def add(self, harvester: int, message: Filled, rows: IntRows) -> None:
        """Rows that a harvester has filled."""

    def draw(self, rows: int) -> IntRows:
        """At most so many rows; none if those that come next are not there."""

    def state(self) -> dict[str, Any]:
        """Where training is in the text, as JSON: `places` of the harvesters, and what else a resume needs."""


class RandomMixer:
    """Rows drawn at random from all that are filled, never from fewer than `fill_rows`: so it depends on timing.

    A resume goes on in the text after what had come; rows that were filled and not drawn are passed over.
    """

    def __init__(self, *, seed: int, fill_rows: int, places: Sequence[TextPlace]) -> None:
        self._random, self._fill_rows = np.random.default_rng(seed), fill_rows
        self._rows, self._places = _NO_ROWS, list(places)

    def add(self, harvester: int, message: Filled, rows: IntRows) -> None:
        self._rows = np.concatenate([self._rows, rows])
        if message.last:
            self._places[harvester] = message.after

    def draw(self, rows: int) -> IntRows:
        if len(self._rows) < max(rows, self._fill_rows):
            return _NO_ROWS
        at = self._random.choice(len(self._rows), rows, replace=False)
        drawn = self._rows[at]
        self._rows = np.delete(self._rows, at)
        return drawn

    def state(self) -> dict[str, Any]:
        return {"places": [list(place) for place in self._places]}


class PoolMixer:
    """Pools of `units` units of each harvester, one after another, each shuffled by seed: a pure function of the text.

    A pool is drawn once it is whole. A resume begins with the pool that was being drawn, harvested again.
    """

    def __init__(self, *, seed: Sequence[int], units: int, places: Sequence[TextPlace], pool: int) -> None:
        """`pool`: the number of the first pool, which begins at `places` of the harvesters."""
        self._seed, self._units, self._pool = seed, units, pool
        self._places: dict[int, list[TextPlace]] = {pool: list(places)}
        # Rows that have come, of each pool and harvester in their order; whole units of each harvester, from pool 0 on.
        self._rows: dict[int, list[list[IntRows]]] = {}
        self._whole = [pool * units] * len(places)
        self._order: IntRows | None = None
        self._drawn = 0

    def add(self, harvester: int, message: Filled, rows: IntRows) -> None:
        pool = self._whole[harvester] // self._units
        if pool not in self._rows:
            self._rows[pool] = [[] for _ in self._whole]
            self._places.setdefault(pool, [message.place] * len(self._whole))
        if not self._rows[pool][harvester] and self._whole[harvester] % self._units == 0:
            self._places[pool][harvester] = message.place
        self._rows[pool][harvester].append(rows)
        self._whole[harvester] += message.last

    def draw(self, rows: int) -> IntRows:
        while True:
            if self._order is None:
                if min(self._whole) < (self._pool + 1) * self._units:
                    return _NO_ROWS
                filled = np.concatenate([piece for pieces in self._rows.pop(self._pool) for piece in pieces])
                self._order = filled[np.random.default_rng([*self._seed, self._pool]).permutation(len(filled))]
            drawn = self._order[self._drawn : self._drawn + rows]
            if len(drawn):
                self._drawn += len(drawn)
                return drawn
            del self._places[self._pool]
            self._pool, self._drawn, self._order = self._pool + 1, 0, None

    def state(self) -> dict[str, Any]:
        places = [list(place) for place in self._places[self._pool]]
        return {"places": places, "pool": self._pool, "drawn": self._drawn}


def begin(
    states: Sequence[Mapping[str, Any]], *, rank: int, ranks: int, harvesters: int, exact: bool
) -> tuple[list[TextPlace], Mapping[str, Any]]:
    """Where a rank's harvesters begin, and its mixer's state: as all ranks' `states` say, or at the start of the text.

    States of another number of ranks or harvesters have no such places: `exact` refuses them (UserError), otherwise
    all begin at the lowest place.
    """
    shares = range(rank * harvesters, (rank + 1) * harvesters)
    if not states:
        return [TextPlace(0, share, 0) for share in shares], {}
    there = [TextPlace(*place) for state in states for place in state["places"]]
    if len(states) == ranks and len(there) == ranks * harvesters:
        return [TextPlace(*place) for place in states[rank]["places"]], states[rank]
    if exact:
        raise UserError(
            f"the checkpoint is of {len(states)} ranks and {len(there)} harvesters in all, not {ranks} and "
            f"{ranks * harvesters}: source.deterministic=true resumes with the same numbers, or use "
            "source.deterministic=false and another run folder"
        )
    lowest = min(there)
    first = lowest.block - lowest.block % (ranks * harvesters)
    return [TextPlace(lowest.epoch, first + share, 0) for share in shares], {}
