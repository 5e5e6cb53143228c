"""The order in which training sees the rows of a rolling store: groups of windows, each in an order of its own.

Group g is windows [g G, (g + 1) G). Its used rows follow those of the groups before, in the order in which a store of
these windows alone would be read for one epoch (`activation_store.order`): a function of seed, g and the rows. Which
windows are on disk when, and who harvested them, changes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

from activation_store.chunks import RowChunk
from activation_store.layout import StoreLayout
from activation_store.order import IntRows, LaneOrder, Pool, PoolPart
from activation_store.places import Place
from activation_store.statistics import BoolRows
from activation_store.store import ActivationStore
from activation_store.used import UsedRows

# Chunks are numbered (group, chunk of the group).
_GROUP_BITS = 32


@dataclass(frozen=True, slots=True)
class Group:
    """Windows that are mixed: a store of its own. `start`: used rows of all groups before; `epoch`: of its text."""

    number: int
    start: int
    epoch: int
    store: ActivationStore
    used: UsedRows

    @property
    def stop(self) -> int:
        return self.start + self.used.count


# Waits until a group's windows are on disk, and gives it; arguments: its number and its first position.
LoadGroup = Callable[[int, int], Group]


class Groups:
    """The groups that are read, loaded in their order from `first` on, which begins at position `start`.

    What the assembler reads of a store: `chunks` and `used` by the numbers that the order gives.
    """

    def __init__(self, load: LoadGroup, path: Place, layout: StoreLayout, *, first: int, start: int) -> None:
        self._load, self._first, self._start = load, first, start
        self.path, self.layout = path, layout
        self._groups: dict[int, Group] = {}

    @property
    def chunks(self) -> "Groups":
        return self

    @property
    def used(self) -> "Groups":
        return self

    def at(self, position: int) -> Group:
        """The group that a position is in; waits for it."""
        found = self.begun(position)
        while found is None or position >= found.stop:
            number, start = (self._first, self._start) if found is None else (found.number + 1, found.stop)
            found = self._groups.get(number) or self._load(number, start)
            self._groups[number] = found
        return found

    def forget(self, position: int) -> None:
        """Forgets the groups that end before a position: all their rows have been read."""
        for group in [group for group in self._groups.values() if group.stop <= position]:
            self._first, self._start = group.number + 1, group.stop
            del self._groups[group.number]

    def get(self, number: int) -> Group:
        """A group that was loaded before."""
        return self._groups[number]

    def begun(self, position: int) -> Group | None:
        """The last group that was loaded and begins at or before a position; without waiting."""
        return max((g for g in self._groups.values() if g.start <= position), key=lambda g: g.number, default=None)

    def __getitem__(self, chunk: int) -> RowChunk:
        """A chunk; its `first_row` is a row of the arrays, holes counted."""
        found = self._group_of(chunk).store.chunks[chunk % (1 << _GROUP_BITS)]
        first_row = found.shard * self.layout.shard_rows + found.row_chunk * self.layout.chunk_rows
        return RowChunk(found.shard, found.row_chunk, first_row, found.rows)

    def mask(self, chunk: int, rows: int) -> BoolRows:
        """Which of a chunk's rows are used."""
        return self._group_of(chunk).used.mask(chunk % (1 << _GROUP_BITS), rows)

    def _group_of(self, chunk: int) -> Group:
        return self._groups[chunk >> _GROUP_BITS]


class RollingOrder(LaneOrder):
    """Positions of the endless order -> used rows of the groups."""

    def __init__(self, groups: Groups, *, seed: int, lanes: int, pool_chunks: int, run_rows: int) -> None:
        super().__init__(seed=seed, lanes=lanes, pool_chunks=pool_chunks, run_rows=run_rows)
        self._groups = groups

    def epoch_at(self, position: int) -> int:
        return self._groups.at(position).number

    def text_epoch(self, position: int) -> int:
        found = self._groups.begun(position)
        return 0 if found is None else found.epoch

    def pool_at(self, lane: int, t: int) -> Pool:
        pool = super().pool_at(lane, t)
        base = pool.epoch << _GROUP_BITS
        parts = [PoolPart(base + part.chunk, part.start, part.stop) for part in pool.parts]
        return Pool(pool.epoch, pool.start, pool.stop, parts, pool.places)

    def _span(self, epoch: int) -> tuple[int, int]:
        group = self._groups.get(epoch)
        return group.start, group.stop

    def _ends(self, epoch: int) -> IntRows:
        return self._groups.get(epoch).used.ends
