"""Harvests blocks of documents: text -> tokens -> the subject -> rows for the writer, a commit after each block.

A block needs only its own documents, and no batch of the subject spans two blocks: so its rows do not depend on where a
harvest was interrupted.

Letters: N contexts of a batch, C tokens of a context, n valid tokens of a batch, L layers, D d_model.
"""

import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from activation_store.config import Dtype, StoreConfig, SubjectConfig, TextConfig
from activation_store.errors import UserError
from activation_store.hooks import CaptureHooks
from activation_store.layout import to_stored
from activation_store.manifest import HELD_OUT
from activation_store.progress import Progress
from activation_store.text import Document, stream_documents
from activation_store.tokens import PackedContexts, pack_tokens
from activation_store.writer import ActivationWriter, StoredRows


@dataclass(frozen=True, slots=True)
class Part:
    """One of the two stores of a harvest: the rows for training, or the held-out ones in a folder of their own."""

    name: str
    folder: Path
    # Documents of this part are cut with these settings.
    text: TextConfig
    # Rows to harvest at most, rounded up to whole contexts; None: all that `text` gives.
    tokens: int | None
    # Most rows that it may have.
    most_rows: int


@dataclass(frozen=True, slots=True)
class BlockRunner:
    """What every block needs."""

    hooks: CaptureHooks
    subject: SubjectConfig
    store: StoreConfig


def parts_of(text: TextConfig, store: StoreConfig) -> list[Part]:
    """The held-out part first: a store whose training rows are complete has its held-out rows too.

    Held-out contexts come evenly from all held-out documents, at least one from each: `held_out_tokens` or a few more.
    """
    folder = Path(store.path)
    most_rows = -(-store.tokens // text.context_length) * text.context_length
    parts = [Part("train", folder, text, store.tokens, most_rows)]
    if store.held_out_tokens > 0 and text.held_out_documents > 0:
        row_tokens = text.context_length * text.held_out_documents
        each = -(-store.held_out_tokens // row_tokens)
        held_out = replace(text, contexts_per_document=each)
        parts.insert(0, Part("held_out", folder / HELD_OUT, held_out, None, each * row_tokens))
    return parts


def harvest_blocks(part: Part, runner: BlockRunner, writer: ActivationWriter, progress: Progress) -> None:
    """Harvests and commits blocks until the part has its rows or the text ends.

    Raises UserError for a non-finite activation, OSError from the disk; the block is then not committed.
    """
    size = part.text.documents_per_block
    start = writer.next_block * size
    documents = stream_documents(part.text, held_out=part.name == HELD_OUT, start=start)
    while part.tokens is None or writer.rows < part.tokens:
        block = list(islice(documents, size))
        if not block:
            return
        contexts = _pack(block, part, runner.hooks)
        if part.tokens is not None:
            contexts = contexts.first_tokens(part.tokens - writer.rows)
        names = {document.index: document.name for document in block}
        for batch in contexts.batches(runner.store.batch_contexts):
            rows = _capture(batch, runner, names)
            writer.append(rows)
            progress.advance(len(rows))
        writer.commit(list(names.items()))


def _pack(block: list[Document], part: Part, hooks: CaptureHooks) -> PackedContexts:
    return pack_tokens(
        block,
        hooks.subject.tokenizer,
        context_length=part.text.context_length,
        bos_token_id=hooks.subject.bos_token_id,
        contexts_per_document=part.text.contexts_per_document,
    )


def _capture(batch: PackedContexts, runner: BlockRunner, names: dict[int, str]) -> StoredRows:
    """The valid tokens of a batch as rows."""
    captured = runner.hooks.capture(batch.token_ids_NC, batch.positions_NC)
    valid_NC = batch.valid_NC
    document_ids_n = batch.document_ids_NC[valid_NC]
    keep_NC = valid_NC.to(captured.mlp_in_NCLD.device)
    stored = []
    for name, raw_NCLD in (("mlp_in", captured.mlp_in_NCLD), ("mlp_out", captured.mlp_out_NCLD)):
        raw_nLD = raw_NCLD[keep_NC]
        stored_nLD = to_stored(raw_nLD, runner.store.dtype)
        finite_nLD = torch.isfinite(stored_nLD)
        if not finite_nLD.all():
            row, column = (int(i) for i in (~finite_nLD).any(2).nonzero()[0])
            document = int(document_ids_n[row])
            where = f"{name} of layer {runner.hooks.layers[column]} in document {document} ({names[document]})"
            raise _non_finite(where, raw_nLD[row, column], runner)
        stored.append(stored_nLD)
    return StoredRows(stored[0], stored[1], batch.token_ids_NC[valid_NC], document_ids_n, batch.positions_NC[valid_NC])


def _non_finite(where: str, values_D: Tensor, runner: BlockRunner) -> UserError:
    """The error for a row that is not finite as stored, from its values as captured."""
    if torch.isfinite(values_D).all():
        return UserError(
            f"{where} reaches {float(values_D.abs().max()):.6g}, more than store.dtype={runner.store.dtype.value} can "
            f"hold; use store.dtype=bfloat16 and a new store.path: layerloom harvest ... store.dtype=bfloat16 "
            f"store.path={runner.store.path}_bfloat16"
        )
    if runner.subject.dtype is Dtype.float32:
        return UserError(f"{where} is not finite in the subject itself; use other text or another subject")
    return UserError(
        f"{where} is not finite in the subject run in {runner.subject.dtype.value}; use subject.dtype=float32 and a "
        f"new store.path: layerloom harvest ... subject.dtype=float32 store.path={runner.store.path}_float32"
    )


def measure_rate(hooks: CaptureHooks, text: TextConfig, store: StoreConfig) -> float:
    """Tokens per second of the subject's forward, measured on made-up tokens after one to warm up.

    One context is enough to tell on a CPU; a GPU wants a full batch. Raises UserError for contexts that are too long.
    """
    contexts = 1 if hooks.subject.device.type == "cpu" else store.batch_contexts
    token_ids_NC = torch.arange(text.context_length).remainder(hooks.subject.info.vocab_size).repeat(contexts, 1)
    positions_NC = torch.arange(text.context_length).repeat(contexts, 1)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        # Copied to the CPU, as harvested rows are: that waits for the device.
        hooks.capture(token_ids_NC, positions_NC).mlp_out_NCLD.cpu()
        seconds = time.perf_counter() - started
    return token_ids_NC.numel() / max(seconds, 1e-9)
