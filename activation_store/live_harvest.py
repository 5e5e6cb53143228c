"""What a harvester of `source=live` does: text -> subject -> rows that training uses -> its part of the ring.

Letters: n rows, L layers, D d_model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from torch import Tensor

from activation_store.blocks import BlockRunner, capture_rows
from activation_store.codec import Encoded, decode, stored_bits
from activation_store.config import StoreConfig, SubjectConfig, TextConfig
from activation_store.errors import UserError, os_error_line
from activation_store.hooks import CaptureHooks
from activation_store.pipeline import Ahead
from activation_store.places import place
from activation_store.ring import IntRows, Ring, RingLayout, RowQueue
from activation_store.share import TextPlace, TextUnit, share_of_text
from activation_store.statistics import BoolRows, eligible_rows, outlier_rows
from activation_store.subject import Subject
from activation_store.windows import Part
from activation_store.writer import StoredRows


@dataclass(frozen=True, slots=True, kw_only=True)
class HarvesterJob:
    """All that a harvester is told. It goes to another process as it is."""

    subject: SubjectConfig
    text: TextConfig
    store: StoreConfig
    device: str
    # Threads of torch in a process of its own.
    threads: int
    # Its blocks of the text: share, share + shares, ...; its part of the ring.
    share: int
    shares: int
    part: int
    layout: RingLayout
    start: TextPlace
    # What says which rows training uses.
    norm_means_L2: np.ndarray[Any, Any]
    outlier_factor: float
    special_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Filled:
    """A harvester's message: so many numbers were added to its queue of filled rows, all of one unit."""

    rows: int
    place: TextPlace
    after: TextPlace
    # The unit is whole now.
    last: bool


def serve(job: HarvesterJob, subject: Subject, ring: Ring, connection: Connection) -> None:
    """Fills the ring until training hangs up. What goes wrong is told to training, as one line."""
    try:
        with connection:
            try:
                _fill(job, subject, ring, connection)
            except (UserError, MemoryError) as error:
                connection.send(str(error) or "out of memory")
            except (BrokenPipeError, ConnectionResetError):
                raise
            except OSError as error:
                connection.send(os_error_line(error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # Training is over.
        return


def _fill(job: HarvesterJob, subject: Subject, ring: Ring, connection: Connection) -> None:
    store = job.store
    hooks = CaptureHooks(
        subject, input_hook=store.input_hook, layer_start=store.layer_start, layer_stop=store.layer_stop
    )
    runner = BlockRunner(hooks, job.subject, store)
    output = _Output(job, ring, connection)
    with Ahead(_units(job, subject), check=lambda: None) as ahead:
        epoch, used_before = -1, 0
        for unit in ahead:
            rows = capture_rows(unit.contexts, runner, unit.names)
            used = used_mask(rows, job)
            if unit.place.epoch != epoch:
                if epoch >= 0 and output.rows == used_before:
                    raise UserError("the text has no row to train on: all are first tokens, special tokens or outliers")
                epoch, used_before = unit.place.epoch, output.rows
            output.write(unit, rows, used)


def _units(job: HarvesterJob, subject: Subject) -> Iterator[TextUnit]:
    part = Part("train", place(""), job.text, None, 0)
    return share_of_text(
        part, subject, share=job.share, shares=job.shares, start=job.start, contexts=job.store.batch_contexts
    )


def used_mask(rows: StoredRows, job: HarvesterJob) -> BoolRows:
    """Which rows training uses, by the rules of a store and the mean norms of the sample."""
    norms = [_norms(encoded) for encoded in (rows.mlp_in_NLD, rows.mlp_out_NLD)]
    outliers = outlier_rows(np.stack(norms, axis=2), job.norm_means_L2, job.outlier_factor)
    eligible = eligible_rows(rows.token_ids_N.numpy(), rows.positions_N.numpy(), job.special_token_ids)
    return eligible & ~outliers


def _norms(encoded: Encoded) -> np.ndarray[Any, Any]:
    """(n, L) float32, of the values as stored."""
    values_nLD: Tensor = decode(encoded).double()
    return np.asarray(values_nLD.square().sum(-1).sqrt().float().numpy())


def row_origins(rows: StoredRows) -> IntRows:
    """A number for each row: of its document, piece and position, 31, 16 and 16 bits."""
    origin = (rows.document_ids_N << 32) | ((rows.pieces_N & 0xFFFF) << 16) | (rows.positions_N & 0xFFFF)
    return np.asarray(origin.numpy())


class _Output:
    """A harvester's side of its part of the ring."""

    def __init__(self, job: HarvesterJob, ring: Ring, connection: Connection) -> None:
        self._ring, self._connection = ring, connection
        self._free, self._filled = RowQueue(ring.free[job.part]), RowQueue(ring.filled[job.part])
        # All rows of the part are free at first.
        self._available = ring.layout.part_rows
        self.rows = 0

    def write(self, unit: TextUnit, rows: StoredRows, used: BoolRows) -> None:
        """Writes the used rows in as many pieces as room comes. Raises EOFError when training hangs up."""
        chosen = np.flatnonzero(used)
        columns = _columns(rows)
        self.rows += len(chosen)
        while True:
            while self._connection.poll(None if len(chosen) and not self._available else 0):
                self._available += self._connection.recv()
            taken, chosen = chosen[: self._available], chosen[self._available :]
            places = self._free.take(len(taken))
            self._available -= len(taken)
            for name, values in columns.items():
                self._column(name)[places] = values[taken]
            self._filled.put(places)
            self._connection.send(Filled(len(taken), unit.place, unit.after, len(chosen) == 0))
            if not len(chosen):
                return

    def _column(self, name: str) -> np.ndarray[Any, Any]:
        return self._ring.origins if name == "origins" else self._ring.columns[name]


def _columns(rows: StoredRows) -> dict[str, np.ndarray[Any, Any]]:
    """The rows as the ring holds them, by column."""
    columns: dict[str, np.ndarray[Any, Any]] = {"origins": row_origins(rows)}
    for name, encoded in (("mlp_in", rows.mlp_in_NLD), ("mlp_out", rows.mlp_out_NLD)):
        columns[name] = stored_bits(encoded.values)
        if encoded.scale is not None:
            columns[f"{name}_scale"] = encoded.scale.numpy()
    return columns
