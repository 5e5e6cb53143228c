"""The order in which training sees a store's rows: a pure function, computed where it is needed, never held.

Used rows are counted 0, 1, 2, ... in the order of the store. An epoch lays the store's chunks in a shuffled line and
cuts the line into `lanes` equal parts; lane v reads its part from one end to the other, and position p of the endless
order belongs to lane p mod lanes. So global batch n, positions [n B, (n + 1) B), has B / lanes rows of every lane, an
epoch is U consecutive positions with each used row once, and a rank that owns some of the lanes reads only their part.
A lane reads a pool of `pool_chunks` chunks at a time and shuffles it in runs of `run_rows` rows that stay neighbours
(a store's rows are shuffled already when they are written).

Letters: B rows of a global batch, U used rows of the store, t place in a lane's endless stream, x place in the line.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

IntRows = np.ndarray[Any, np.dtype[np.int64]]
# Parts of the store that are shuffled as wholes first, and their chunks then: what an epoch's tables hold is this many
# numbers and one part's chunks, however large the store.
MAX_PARTS = 4_096


@dataclass(frozen=True, slots=True)
class PoolPart:
    """Used rows [start, stop) of a chunk, counted within the chunk."""

    chunk: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Pool:
    """Rows that one lane mixes: places [start, stop) of its stream, in `epoch`.

    `places`: for the rows of all parts one after another, where in [0, stop - start) each comes.
    """

    epoch: int
    start: int
    stop: int
    parts: list[PoolPart]
    places: IntRows


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the store in an epoch's line: its chunks as shuffled, and where each ends in the line."""

    chunks: IntRows
    line_ends: IntRows
    first_place: int
    line_start: int


class EpochLine:
    """The shuffled line of chunks of one epoch: place <-> chunk <-> position x of used rows."""

    # bisect where numpy has searchsorted: that lets go of the interpreter, which threads that read would not give back
    # at once.

    def __init__(self, ends: IntRows, *, seed: int, epoch: int) -> None:
        """`ends`: used rows before each chunk (chunks + 1,)."""
        self._ends, self._seed, self._epoch = ends, seed, epoch
        chunks = len(ends) - 1
        size = -(-chunks // MAX_PARTS)
        self._bounds = np.minimum(np.arange(-(-chunks // size) + 1) * size, chunks)
        self._order = np.random.default_rng([seed, epoch, 0]).permutation(len(self._bounds) - 1)
        used = np.diff(np.asarray(ends[self._bounds]))
        self._line_ends = np.cumsum(used[self._order])
        self._place_ends = np.cumsum(np.diff(self._bounds)[self._order])
        self._part = lru_cache(maxsize=256)(self._make_part)

    def place_of(self, x: int) -> int:
        """The place in the line of the chunk that holds position `x`."""
        part = self._part(bisect_right(self._line_ends, x))
        return part.first_place + bisect_right(part.line_ends, x)

    def chunk_at(self, place: int) -> tuple[int, int, int]:
        """The chunk at a place, and the positions [start, stop) of its used rows."""
        part = self._part(bisect_right(self._place_ends, place))
        inside = place - part.first_place
        start = int(part.line_ends[inside - 1]) if inside else part.line_start
        return int(part.chunks[inside]), start, int(part.line_ends[inside])

    def _make_part(self, number: int) -> _Part:
        part = int(self._order[number])
        first, last = int(self._bounds[part]), int(self._bounds[part + 1])
        chunks = np.arange(first, last)
        if len(chunks) > 1:
            np.random.default_rng([self._seed, self._epoch, 1, part]).shuffle(chunks)
        line_start = int(self._line_ends[number - 1]) if number else 0
        line_ends = line_start + np.cumsum(self._ends[chunks + 1] - self._ends[chunks])
        return _Part(chunks, line_ends, int(self._place_ends[number]) - (last - first), line_start)


class LaneOrder(ABC):
    """Positions of an endless order -> used rows: epoch after epoch, each a shuffled line of chunks cut into lanes."""

    def __init__(self, *, seed: int, lanes: int, pool_chunks: int, run_rows: int) -> None:
        self._seed = seed
        self.lanes, self._pool_chunks, self._run_rows = lanes, pool_chunks, run_rows
        # Of the epoch that is read, and of the next one, which other lanes may have reached.
        self._line = lru_cache(maxsize=2)(self._make_line)
        self._lane_starts = lru_cache(maxsize=2)(self._make_lane_starts)

    @abstractmethod
    def epoch_at(self, position: int) -> int:
        """The epoch that a position is in."""

    @abstractmethod
    def _span(self, epoch: int) -> tuple[int, int]:
        """The positions [start, stop) of an epoch."""

    @abstractmethod
    def _ends(self, epoch: int) -> IntRows:
        """Used rows before each chunk of an epoch, (chunks + 1,), of which the last is at least 1."""

    @abstractmethod
    def text_epoch(self, position: int) -> int:
        """How often the text was gone through before the row at a position, whole times alone."""

    def pool_at(self, lane: int, t: int) -> Pool:
        """The pool that holds place `t` of a lane's stream."""
        epoch = self.epoch_at(t * self.lanes + lane)
        first, last = self._lane_span(epoch, lane)
        line, lane_start = self._line(epoch), int(self._lane_starts(epoch)[lane])
        # Places of the line's rows that are this lane's: x = lane_start + (t - first).
        shift = lane_start - first
        first_place, last_place = line.place_of(lane_start), line.place_of(last - 1 + shift)
        # Lanes start with pools of different sizes: so they do not all read in the same batch.
        first_place -= lane * self._pool_chunks // self.lanes
        number = (line.place_of(t + shift) - first_place) // self._pool_chunks
        parts, start, stop = [], -1, -1
        for place in range(
            max(line.place_of(lane_start), first_place + number * self._pool_chunks),
            min(last_place + 1, first_place + (number + 1) * self._pool_chunks),
        ):
            chunk, x_start, x_stop = line.chunk_at(place)
            t_start, t_stop = max(x_start - shift, first), min(x_stop - shift, last)
            start, stop = (t_start if start < 0 else start), t_stop
            if t_stop > t_start:
                parts.append(PoolPart(chunk, t_start - x_start + shift, t_stop - x_start + shift))
        return Pool(epoch, start, stop, parts, self._places(stop - start, epoch, lane, number))

    def _places(self, rows: int, *key: int) -> IntRows:
        """Where each of a pool's rows comes: runs are shuffled, the last one may be shorter."""
        runs = -(-rows // self._run_rows)
        lengths = np.full(runs, self._run_rows)
        lengths[-1] = rows - (runs - 1) * self._run_rows
        order = np.random.default_rng([self._seed, key[0], 2, *key[1:]]).permutation(runs)
        starts = np.empty(runs, dtype=np.int64)
        starts[order] = np.cumsum(lengths[order]) - lengths[order]
        row = np.arange(rows)
        return starts[row // self._run_rows] + row % self._run_rows

    def _lane_span(self, epoch: int, lane: int) -> tuple[int, int]:
        """The t [first, last) of a lane whose positions t * lanes + lane are in the epoch."""
        start, stop = self._span(epoch)
        return -(-(start - lane) // self.lanes), -(-(stop - lane) // self.lanes)

    def _make_line(self, epoch: int) -> EpochLine:
        return EpochLine(self._ends(epoch), seed=self._seed, epoch=epoch)

    def _make_lane_starts(self, epoch: int) -> IntRows:
        """Where each lane's part of an epoch's line begins."""
        spans = [self._lane_span(epoch, lane) for lane in range(self.lanes)]
        return np.cumsum([0, *(last - first for first, last in spans)])


class ShuffleOrder(LaneOrder):
    """The order of a store that is there: a pure function of (ends, seed, lanes, pool_chunks, run_rows)."""

    def __init__(self, ends: IntRows, *, seed: int, lanes: int, pool_chunks: int, run_rows: int) -> None:
        """`ends`: used rows before each chunk (chunks + 1,), of which the last is at least 1."""
        super().__init__(seed=seed, lanes=lanes, pool_chunks=pool_chunks, run_rows=run_rows)
        self._store_ends = ends
        self.rows_per_epoch = int(ends[-1])

    def epoch_at(self, position: int) -> int:
        return position // self.rows_per_epoch

    def text_epoch(self, position: int) -> int:
        return self.epoch_at(position)

    def _span(self, epoch: int) -> tuple[int, int]:
        return epoch * self.rows_per_epoch, (epoch + 1) * self.rows_per_epoch

    def _ends(self, epoch: int) -> IntRows:
        return self._store_ends
