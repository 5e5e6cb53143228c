"""Mixtures: several text sources with weights, interleaved so that the place of every document is known beforehand.

Documents come in cycles of at most 1,000. Each cycle has a fixed number of documents of each source, in an order
shuffled by seed, so that document i of the mixture is found by arithmetic, whoever asks. A source that runs out leaves
the others to go on in their proportion; only a stream, which does not tell its length, ends the text where it ends.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import floor
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from activation_store.config import TextConfig
from activation_store.errors import UserError

if TYPE_CHECKING:
    from activation_store.text import Document, DocumentSource

_MOST_IN_CYCLE = 1_000
# A weight is met to this share of all documents.
_WEIGHT_ERROR = 0.0005
_SEPARATOR = ": "


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Cycles (None: without end) from document `start` on, with so many of each source; `taken` came before."""

    start: int
    cycles: int | None
    quotas: tuple[int, ...]
    taken: tuple[int, ...]

    @property
    def stop(self) -> int | None:
        return None if self.cycles is None else self.start + self.cycles * sum(self.quotas)


class MixtureOrder:
    """Which document of which source comes where: a pure function of weights, counts and seed."""

    def __init__(self, weights: Sequence[float], counts: Sequence[int | None], *, seed: int) -> None:
        """`counts`: documents of each source, None for one that does not tell."""
        self._seed = seed
        self._stretches = list(_stretches(weights, counts))

    @property
    def count(self) -> int | None:
        """Documents of all sources together; None if one of them does not tell."""
        return self._stretches[-1].stop if self._stretches else 0

    def place(self, index: int) -> tuple[int, int] | None:
        """(source, number within it) of document `index` of the mixture; None after the last one."""
        for stretch in self._stretches:
            if stretch.stop is None or index < stretch.stop:
                cycle, offset = divmod(index - stretch.start, sum(stretch.quotas))
                sources, numbers = _cycle(stretch.quotas, self._seed, stretch.start, cycle)
                source = int(sources[offset])
                return source, stretch.taken[source] + cycle * stretch.quotas[source] + int(numbers[offset])
        return None


@lru_cache(maxsize=64)
def _cycle(quotas: tuple[int, ...], seed: int, start: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """The source of each document of a cycle, and how many of the same source come before it there."""
    sources = np.random.default_rng([seed, 2, start, cycle]).permutation(np.repeat(np.arange(len(quotas)), quotas))
    numbers = np.empty_like(sources)
    for source, quota in enumerate(quotas):
        numbers[sources == source] = np.arange(quota)
    return sources, numbers


def _stretches(weights: Sequence[float], counts: Sequence[int | None]) -> Iterator[_Stretch]:
    start, taken = 0, [0] * len(weights)
    while True:
        left = [None if count is None else count - used for count, used in zip(counts, taken, strict=True)]
        alive = [weight if rest is None or rest > 0 else 0.0 for weight, rest in zip(weights, left, strict=True)]
        if not any(alive):
            return
        quotas = cycle_quotas(alive)
        whole = [rest // quota for rest, quota in zip(left, quotas, strict=True) if rest is not None and quota]
        cycles = min(whole) if whole else None
        if cycles == 0:
            # The last of a source do not fill its places: a cycle of what there is.
            cycles = 1
            quotas = [quota if rest is None else min(quota, rest) for rest, quota in zip(left, quotas, strict=True)]
        yield _Stretch(start, cycles, tuple(quotas), tuple(taken))
        if cycles is None:
            return
        start += cycles * sum(quotas)
        taken = [used + cycles * quota for used, quota in zip(taken, quotas, strict=True)]


def cycle_quotas(weights: Sequence[float]) -> list[int]:
    """Documents of each source in a cycle: the shortest cycle that meets the weights, at least one of each above 0."""
    total = sum(weights)
    shares = [weight / total for weight in weights]
    best: tuple[float, list[int]] | None = None
    for length in range(sum(weight > 0 for weight in weights), _MOST_IN_CYCLE + 1):
        quotas = [max(round(share * length), int(share > 0)) for share in shares]
        error = max(abs(quota / sum(quotas) - share) for quota, share in zip(quotas, shares, strict=True))
        if best is None or error < best[0]:
            best = error, quotas
        if error <= _WEIGHT_ERROR:
            break
    assert best is not None
    return best[1]


def source_texts(cfg: TextConfig) -> list[TextConfig]:
    """The sources as texts of their own, each with its part of the held-out documents; [] if `cfg` is no mixture.

    `held_out_documents` is shared out by weight. Raises UserError for sources that cannot be told apart, or a weight
    that is not above 0.
    """
    labels = source_labels(cfg)
    if not labels:
        return []
    for label, source in zip(labels, cfg.sources, strict=True):
        if not source.weight > 0:
            raise UserError(f"text.sources: {label} has weight={source.weight}; want a number above 0, or leave it out")
        if _SEPARATOR in label or labels.count(label) > 1:
            raise UserError(
                f"text.sources: two sources are called {label}, or it has '{_SEPARATOR}' in it; give each a label="
            )
    weights = [source.weight for source in cfg.sources]
    ends = [floor(cfg.held_out_documents * sum(weights[: i + 1]) / sum(weights) + 0.5) for i in range(len(weights))]
    texts = []
    for source, start, stop in zip(cfg.sources, [0, *ends], ends, strict=False):
        own = {key: value for key, value in asdict(source).items() if key not in ("weight", "label")}
        texts.append(replace(cfg, sources=[], held_out_documents=stop - start, **own))
    return texts


def source_labels(cfg: TextConfig) -> list[str]:
    """What each source is called: its label, else the last part of its path that is no glob."""
    return [source.label or _label(source.path) for source in cfg.sources]


def _label(path: str) -> str:
    parts = [part for part in PurePath(path).parts if not set("*?[") & set(part)]
    return parts[-1] if parts else path


def source_of(document_name: str) -> str:
    """The label of the source of a document of a mixture, from its name."""
    return document_name.split(_SEPARATOR, 1)[0]


class Mixture:
    """The documents of several sources as one text; the first `held_out_documents` are those that they hold out."""

    def __init__(self, cfg: TextConfig, sources: "Sequence[DocumentSource]", texts: Sequence[TextConfig]) -> None:
        """`sources` and `texts`: the sources in their order, and `source_texts(cfg)`."""
        self._sources, self._labels = sources, source_labels(cfg)
        self._held_out = [text.held_out_documents for text in texts]
        self._first = sum(self._held_out)
        left = [None if s.count is None else s.count - n for s, n in zip(sources, self._held_out, strict=True)]
        weights = [source.weight for source in cfg.sources]
        held_out_weights = [float(n) for n in self._held_out]
        self._held_out_order = MixtureOrder(held_out_weights, self._held_out, seed=cfg.seed)
        self._order = MixtureOrder(weights, left, seed=cfg.seed)
        count = self._order.count
        self.count = None if count is None else self._first + count
        facts = "\n".join(
            f"{source.fingerprint}\t{weight}\t{held_out}"
            for source, weight, held_out in zip(sources, weights, self._held_out, strict=True)
        )
        self.fingerprint = f"mixture of {len(sources)}, xxh3 {xxhash.xxh3_64_hexdigest(facts.encode())}"

    def read(self, start: int, stop: int | None) -> "Iterator[Document]":
        """Documents [start, stop) of the mixture (None: to the last one)."""
        open_sources: dict[int, Iterator[Document]] = {}
        index = start
        while (stop is None or index < stop) and (place := self._place(index)) is not None:
            source, number = place
            if source not in open_sources:
                documents = self._open(source, number, index)
                if documents is None:
                    return
                open_sources[source] = documents
            document = next(open_sources[source], None)
            if document is None:
                return
            yield replace(document, index=index, name=f"{self._labels[source]}{_SEPARATOR}{document.name}")
            index += 1
            if index == self._first:
                # Held-out documents and the others are two orders.
                open_sources = {}

    def _place(self, index: int) -> tuple[int, int] | None:
        """(source, number in its own shuffled order)."""
        if index < self._first:
            return self._held_out_order.place(index)
        place = self._order.place(index - self._first)
        return None if place is None else (place[0], place[1] + self._held_out[place[0]])

    def _open(self, source: int, number: int, index: int) -> "Iterator[Document] | None":
        """A source from a document on; None if it is a stream that ended before."""
        if self._sources[source].count is not None or number == 0:
            return self._sources[source].read(number, None)
        documents = self._sources[source].read(number - 1, None)
        return documents if next(documents, None) is not None else None
