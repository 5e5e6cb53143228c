"""Documents to rows of token ids: pieces that each start with BOS, short ones sharing a row.

Shapes: N contexts (rows), C context length.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from activation_store.chat import chat_token_ids
from activation_store.text import Document


@dataclass(frozen=True, slots=True)
class PackedContexts:
    """N rows of C tokens. A row holds one or several pieces, each of one document with positions from 0.

    `document_ids_NC` is `Document.index`, -1 on padding; padding follows the last piece with `valid_NC` False and its
    positions run on, so that it never starts a piece and no valid token sees it. `pieces_NC` is the number of the piece
    in its document: document, piece and position say which token of which document it is.
    """

    token_ids_NC: Tensor
    document_ids_NC: Tensor
    positions_NC: Tensor
    valid_NC: Tensor
    pieces_NC: Tensor

    def __len__(self) -> int:
        return self.token_ids_NC.shape[0]

    @property
    def tokens(self) -> int:
        """Valid tokens."""
        return int(self.valid_NC.sum())

    def __getitem__(self, rows: slice | Tensor) -> "PackedContexts":
        return PackedContexts(*(getattr(self, name)[rows] for name in _FIELDS))

    @classmethod
    def join(cls, parts: "list[PackedContexts]") -> "PackedContexts":
        """The rows of all parts (at least one), in order."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in _FIELDS))

    def batches(self, contexts: int) -> Iterator["PackedContexts"]:
        """Consecutive slices of at most so many rows."""
        for start in range(0, len(self), contexts):
            yield self[start : start + contexts]

    def first_tokens(self, tokens: int) -> "PackedContexts":
        """The first rows that together hold at least so many valid tokens (all, if they hold fewer)."""
        before_N = self.valid_NC.sum(1).cumsum(0) - self.valid_NC.sum(1)
        return self[: int((before_N < tokens).sum())]


_FIELDS = [field.name for field in fields(PackedContexts)]


@dataclass(frozen=True, slots=True)
class _Piece:
    document: int
    number: int
    token_ids: list[int]


def pack_tokens(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    bos_token_id: int | None,
    contexts_per_document: int = 0,
) -> PackedContexts:
    """Tokenises and packs documents (a block of them: packing starts anew with every call).

    Each document is cut into pieces of `context_length` tokens, BOS included. With `contexts_per_document` = n > 0 it
    gives at most n pieces, spread evenly over it, full ones where it has n of them. A full piece is a row of its own;
    short ones share rows in order.
    """
    body = context_length - (bos_token_id is not None)
    if body < 1:
        raise ValueError(f"context_length={context_length} leaves no room for text beside BOS; use 2 or more")
    rows: list[list[_Piece]] = []
    shared: list[_Piece] = []
    for document in documents:
        for piece in _pieces(document, tokenizer, body, bos_token_id, contexts_per_document):
            if len(piece.token_ids) == context_length:
                rows.append([piece])
                continue
            if sum(len(other.token_ids) for other in shared) + len(piece.token_ids) > context_length:
                rows.append(shared)
                shared = []
            shared.append(piece)
    if shared:
        rows.append(shared)
    return _to_tensors(rows, context_length)


def _pieces(
    document: Document, tokenizer: PreTrainedTokenizerBase, body: int, bos_token_id: int | None, at_most: int
) -> list[_Piece]:
    ids = _token_ids(document, tokenizer, bos_token_id)
    starts = list(range(0, len(ids), body))
    full = len(ids) // body
    if at_most and full >= at_most:
        starts = [((2 * j + 1) * full // (2 * at_most)) * body for j in range(at_most)]
    elif at_most:
        starts = starts[:at_most]
    bos = [] if bos_token_id is None else [bos_token_id]
    return [_Piece(document.index, start // body, bos + ids[start : start + body]) for start in starts]


def _token_ids(document: Document, tokenizer: PreTrainedTokenizerBase, bos_token_id: int | None) -> list[int]:
    """Without BOS."""
    if document.messages is not None:
        return chat_token_ids(document.messages, tokenizer, bos_token_id=bos_token_id, name=document.name)
    # verbose=False: a document longer than the model's window is what we cut up, not something to warn of.
    ids: list[int] = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _to_tensors(rows: list[list[_Piece]], context_length: int) -> PackedContexts:
    shape = (len(rows), context_length)
    token_ids_NC = torch.zeros(shape, dtype=torch.int64)
    document_ids_NC = torch.full(shape, -1, dtype=torch.int64)
    positions_NC = torch.zeros(shape, dtype=torch.int64)
    pieces_NC = torch.zeros(shape, dtype=torch.int64)
    for row, pieces in enumerate(rows):
        end = 0
        for piece in pieces:
            start, end = end, end + len(piece.token_ids)
            token_ids_NC[row, start:end] = torch.tensor(piece.token_ids)
            document_ids_NC[row, start:end] = piece.document
            pieces_NC[row, start:end] = piece.number
            # To the row's end: padding continues the last piece, the next piece overwrites the rest.
            positions_NC[row, start:] = torch.arange(context_length - start)
    return PackedContexts(token_ids_NC, document_ids_NC, positions_NC, document_ids_NC >= 0, pieces_NC)
