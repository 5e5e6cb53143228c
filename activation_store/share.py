"""A harvester's share of a text without a store: every n-th block, from any place on, epoch after epoch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from activation_store.errors import UserError
from activation_store.subject import Subject
from activation_store.tokens import PackedContexts
from activation_store.windows import Blocks, Part


class TextPlace(NamedTuple):
    """A context of a harvester's share: the next to come. `block` counts the blocks of the whole text."""

    epoch: int
    block: int
    context: int


@dataclass(frozen=True, slots=True)
class TextUnit:
    """Contexts of one block, for one forward of the subject; `place` of the first, `after` of what follows."""

    place: TextPlace
    after: TextPlace
    contexts: PackedContexts
    names: dict[int, str]


def share_of_text(
    part: Part, subject: Subject, *, share: int, shares: int, start: TextPlace, contexts: int
) -> Iterator[TextUnit]:
    """Units of at most `contexts` contexts, without end: blocks share, share + shares, ... of `part`'s text, again and
    again. What comes from `start` on is a function of it and of the text. Raises UserError for a text so short that
    nothing of it is this share.
    """
    blocks = Blocks(part, subject)
    place, empty = start, False
    while True:
        found = blocks.get(place.block)
        if found is None:
            if empty:
                raise UserError(
                    f"text.path={part.text.path} has no text for harvester {share + 1} of {shares}: each takes every "
                    f"{shares}. block of text.documents_per_block={part.text.documents_per_block} documents; lower "
                    "source.harvesters or text.documents_per_block, or give more text"
                )
            place, empty = TextPlace(place.epoch + 1, share, 0), True
            continue
        empty = empty and not len(found.contexts)
        for first in range(place.context, len(found.contexts), contexts):
            taken = found.contexts[first : first + contexts]
            after = TextPlace(place.epoch, place.block, first + len(taken))
            if after.context == len(found.contexts):
                after = TextPlace(place.epoch, place.block + shares, 0)
            yield TextUnit(TextPlace(place.epoch, place.block, first), after, taken, found.names)
        place = TextPlace(place.epoch, place.block + shares, 0)
