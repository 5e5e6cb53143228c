"""How measuring is shared over a mesh: whole batches of rows, each for one place on the data axis.

A batch is what selection looks at (batchtopk), and batches of the rows that happen to be there do not divide by a mesh:
so place d of the data axis takes batches d, d + data, ... with its feature group alone, exactly as one process would,
and only the sums are added up in the end. All places take equally many: where the last round has too few, the others
repeat a batch that does not count, for an engine may gather parameters over the data axis at every layer.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from trainer.model.clt import CrossLayerTranscoder
from trainer.model.collectives import Collectives
from trainer.parallel.agreement import Agreement

T = TypeVar("T")


class Dealing:
    """Batches for this rank. On one device (the default): all of them.

    alone: the collectives of a model whose data axis has this one rank; agreement: of all ranks, which read every batch
    and go on if all could.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, *, alone: Collectives | None = None, agreement: Agreement | None = None
    ) -> None:
        """rank, size: of the data axis."""
        self._rank, self._size, self._alone, self._agreement = rank, size, alone, agreement

    @contextmanager
    def alone(self, model: CrossLayerTranscoder) -> Iterator[None]:
        """While it lasts, the model selects over this rank's batches alone."""
        collectives = model.collectives
        model.collectives = self._alone if self._alone is not None else collectives
        try:
            yield
        finally:
            model.collectives = collectives

    def deal(self, batches: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """This rank's batches, and whether each counts."""
        round_of: list[T] = []
        for batch in self._read(batches):
            round_of.append(batch)
            if len(round_of) == self._size:
                yield round_of[self._rank], True
                round_of = []
        if round_of:
            counts = self._rank < len(round_of)
            yield round_of[self._rank if counts else 0], counts

    def _read(self, batches: Iterable[T]) -> Iterator[T]:
        """Each batch once every rank has it."""
        iterator = iter(batches)
        if self._agreement is None:
            yield from iterator
            return
        while True:
            with self._agreement.together():
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch
