"""Windows: the parts of a text that are claimed, harvested, shuffled and committed as one.

The contexts of a text, block after block, are cut into windows of so many contexts. Where window w begins in the text
and in the arrays depends on all before it, but on their tokens alone, which cost nothing beside the subject's forward:
so `windows/NNNNNNNN.json` says it for each window, written by whichever worker needs it first, each from the one
before. Everything here is a pure function of text and config: whoever computes it, the result is the same.

Letters: N contexts, C context length.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import torch

from activation_store.config import StoreConfig, TextConfig
from activation_store.errors import UserError
from activation_store.layout import StoreLayout
from activation_store.manifest import HELD_OUT
from activation_store.places import Place
from activation_store.storage import Storage
from activation_store.subject import Subject
from activation_store.text import Document, open_documents, stream_documents
from activation_store.tokens import PackedContexts, pack_tokens

WINDOWS = "windows"
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Part:
    """One of the two stores of a harvest: the rows for training, or the held-out ones in a folder of their own."""

    name: str
    folder: Place
    # Documents of this part are cut with these settings.
    text: TextConfig
    # Rows to harvest at most, rounded up to whole contexts; None: all that `text` gives.
    tokens: int | None
    # Most rows that it may have.
    most_rows: int
    # The text begins anew when it ends: there is no last window.
    endless: bool = False


@dataclass(frozen=True, slots=True)
class WindowRecord:
    """Where a window lies: in the text (from `context` of `block` on), and in the arrays (from `start_row` on)."""

    window: int
    block: int
    context: int
    contexts: int
    # Where the next window begins.
    next_block: int
    next_context: int
    start_row: int
    rows: int
    # Rows of all windows before.
    rows_before: int
    # No window follows.
    last: bool
    # How often the text had ended before.
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class WindowText:
    """A window's contexts, and the names of their documents by index."""

    contexts: PackedContexts
    names: dict[int, str]


def contexts_per_window(text: TextConfig, store: StoreConfig, layout: StoreLayout) -> int:
    """At least one. Counted in 32 bits, so that rows have the same order in every dtype."""
    context_bytes = 2 * layout.n_layers * layout.d_model * _FLOAT32_BYTES * text.context_length
    return max(1, store.window_bytes // context_bytes)


def row_order(seed: int, part: str, window: int, rows: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The order in which a window's rows are written."""
    return np.random.default_rng([seed, int(part == HELD_OUT), 1, window]).permutation(rows)


class Windows:
    """The windows of one part. Not thread-safe."""

    def __init__(self, part: Part, storage: Storage, subject: Subject, layout: StoreLayout, *, contexts: int) -> None:
        """`contexts`: how many a window has; the last one may have fewer."""
        self._storage, self._layout, self._contexts, self._part = storage, layout, contexts, part
        self._blocks = Blocks(part, subject)
        self._records: dict[int, WindowRecord] = {}
        self._read: tuple[int, WindowText] | None = None

    def record(self, window: int) -> WindowRecord | None:
        """Where a window is; None for one after the last."""
        first = window
        while first >= 0 and (found := self._recorded(first)) is None:
            first -= 1
        previous = found if first >= 0 else None
        for number in range(first + 1, window + 1):
            if previous is not None and previous.last:
                return None
            previous = self._make(number, previous)
        return previous

    def text(self, record: WindowRecord) -> WindowText:
        """The contexts of a window."""
        if self._read is None or self._read[0] != record.window:
            self._read = record.window, self._collect(record.block, record.context, record.contexts)[0]
        return self._read[1]

    def _recorded(self, window: int) -> WindowRecord | None:
        if window not in self._records:
            try:
                data = self._storage.get(_key(window))
            except FileNotFoundError:
                return None
            self._records = {window: WindowRecord(**json.loads(data))}
        return self._records[window]

    def _make(self, window: int, previous: WindowRecord | None) -> WindowRecord:
        """Computes a record from the one before, and publishes it."""
        block, context, start_row, rows_before, epoch = 0, 0, 0, 0, 0
        if previous is not None:
            block, context, epoch = previous.next_block, previous.next_context, previous.epoch
            start_row = previous.start_row + self._layout.shards_of(previous.rows) * self._layout.shard_rows
            rows_before = previous.rows_before + previous.rows
        tokens = self._part.tokens
        text, (next_block, next_context), ended = self._collect(block, context, self._contexts)
        if self._part.endless and not len(text.contexts):
            block, context, epoch = 0, 0, epoch + 1
            text, (next_block, next_context), ended = self._collect(block, context, self._contexts)
            if not len(text.contexts):
                raise UserError(f"text.path={self._part.text.path} has no text to harvest; give another")
        if tokens is not None:
            text = WindowText(text.contexts.first_tokens(tokens - rows_before), text.names)
        rows = text.contexts.tokens
        record = WindowRecord(
            window=window,
            block=block,
            context=context,
            contexts=len(text.contexts),
            next_block=next_block,
            next_context=next_context,
            start_row=start_row,
            rows=rows,
            rows_before=rows_before,
            last=not self._part.endless and (ended or (tokens is not None and rows_before + rows >= tokens)),
            epoch=epoch,
        )
        self._storage.put_if_absent(_key(window), [json.dumps(asdict(record)).encode()])
        self._records = {window: record}
        self._read = window, text
        return record

    def _collect(self, block: int, context: int, contexts: int) -> tuple[WindowText, tuple[int, int], bool]:
        """So many contexts from a place on: they, the place after them, and whether the text ended before."""
        parts = [self._blocks.none()]
        names: dict[int, str] = {}
        while contexts:
            found = self._blocks.get(block)
            if found is None:
                return WindowText(PackedContexts.join(parts), names), (block, context), True
            taken = found.contexts[context : context + contexts]
            parts.append(taken)
            names |= found.names
            contexts -= len(taken)
            context += len(taken)
            if context >= len(found.contexts):
                block, context = block + 1, 0
        return WindowText(PackedContexts.join(parts), names), (block, context), False


def _key(window: int) -> str:
    return f"{WINDOWS}/{window:08d}.json"


class Blocks:
    """Blocks of documents, packed, their contexts mixed by seed: a window of part of a block has some of all."""

    def __init__(self, part: Part, subject: Subject) -> None:
        self._part, self._subject = part, subject
        self._documents: Iterator[Document] = iter(())
        self._next = -1
        self._last: tuple[int, WindowText | None] = (-1, None)

    def none(self) -> PackedContexts:
        """No context, in the right shape."""
        return self._pack([])

    def get(self, block: int) -> WindowText | None:
        """A block; None after the last one. Those in order are read once."""
        if self._last[0] != block:
            self._last = block, self._load(block)
        return self._last[1]

    def _load(self, block: int) -> WindowText | None:
        size, text = self._part.text.documents_per_block, self._part.text
        if self._next > block or self._next < 0 or (self._next < block and open_documents(text).count is not None):
            self._documents = stream_documents(text, held_out=self._part.name == HELD_OUT, start=block * size)
        else:
            # A stream has no other way forward than to read on.
            for _ in islice(self._documents, (block - self._next) * size):
                pass
        documents = list(islice(self._documents, size))
        self._next = block + 1
        if not documents:
            return None
        contexts = self._pack(documents)
        key = [text.seed, int(self._part.name == HELD_OUT), 0, block]
        order = torch.from_numpy(np.random.default_rng(key).permutation(len(contexts)))
        return WindowText(contexts[order], {document.index: document.name for document in documents})

    def _pack(self, documents: list[Document]) -> PackedContexts:
        return pack_tokens(
            documents,
            self._subject.tokenizer,
            context_length=self._part.text.context_length,
            bos_token_id=self._subject.bos_token_id,
            contexts_per_document=self._part.text.contexts_per_document,
        )
