"""From a document back to its rows: they are shuffled over their windows when written.

    index = DocumentIndex(store)
    index.rows(17)     # logical rows of document 17, in the order of its text
    index.read(17)     # the rows themselves

A row's document, piece and position are in the arrays `document_ids`, `pieces`, `positions`.
"""

from functools import cached_property

import numpy as np
import torch

from activation_store.errors import UserError
from activation_store.manifest import read_commits
from activation_store.store import ActivationRows, ActivationStore
from activation_store.writer import IntRows


class DocumentIndex:
    """Which rows of a store, complete or not, are a document's. Reads all commits once."""

    def __init__(self, store: ActivationStore) -> None:
        self._store = store

    @cached_property
    def names(self) -> dict[int, str]:
        """The documents that have rows in the store, by index: where each came from."""
        return {d.index: d.name for commit in read_commits(self._store.path) for d in commit.documents}

    def rows(self, document: int) -> IntRows:
        """The logical rows of a document, in the order of its text (all of it that was harvested).

        Raises UserError for a document that has no row in the store.
        """
        if document not in self._windows:
            raise UserError(
                f"store {self._store.path} has no row of document {document}; DocumentIndex.names has those that it has"
            )
        parts = [self._in_window(document, *window) for window in self._windows[document]]
        rows, pieces, positions = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return np.asarray(rows[np.lexsort((positions, pieces))])

    def read(self, document: int) -> ActivationRows:
        """The rows of a document, in the order of its text."""
        return read_scattered(self._store, self.rows(document))

    def _in_window(self, document: int, start: int, stop: int) -> tuple[IntRows, IntRows, IntRows]:
        """Rows, pieces and positions."""
        found = np.flatnonzero(self._store.read_small("document_ids", start, stop) == document)
        pieces, positions = (self._store.read_small(name, start, stop)[found] for name in ("pieces", "positions"))
        return start + found, pieces, positions

    @cached_property
    def _windows(self) -> dict[int, list[tuple[int, int]]]:
        """First row and end of the windows in which a document has rows."""
        windows: dict[int, list[tuple[int, int]]] = {}
        first = 0
        for commit in read_commits(self._store.path):
            for document in commit.documents:
                windows.setdefault(document.index, []).append((first, first + commit.rows))
            first += commit.rows
        return windows


def read_scattered(store: ActivationStore, rows: IntRows) -> ActivationRows:
    """Any rows, in the order given. Chunks that hold several of them are read once."""
    parts, places = [], []
    for chunk in store.chunks:
        inside = np.flatnonzero((rows >= chunk.first_row) & (rows < chunk.first_row + chunk.rows))
        if not len(inside):
            continue
        wanted = rows[inside] - chunk.first_row
        first, last = int(wanted.min()), int(wanted.max())
        read = store.read_rows(chunk.first_row + first, chunk.first_row + last + 1)
        parts.append([getattr(read, name)[torch.from_numpy(wanted - first)] for name in _COLUMNS])
        places.append(inside)
    if not parts:
        return store.read_rows(0, 0)
    back = torch.from_numpy(np.argsort(np.concatenate(places)))
    return ActivationRows(*(torch.cat(columns)[back] for columns in zip(*parts, strict=True)))


_COLUMNS = ("mlp_in", "mlp_out", "token_ids", "document_ids", "positions")
