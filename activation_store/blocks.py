"""Runs the subject over the contexts of a window: tokens -> rows as they are stored.

No batch of the subject spans two windows: so rows do not depend on who harvests them, or what else it harvested.

Letters: N contexts of a batch, C tokens of a context, n valid tokens of a batch, L layers, D d_model.
"""

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from activation_store.codec import encode
from activation_store.config import Dtype, StoreConfig, SubjectConfig, TextConfig
from activation_store.errors import UserError
from activation_store.hooks import CaptureHooks
from activation_store.manifest import HELD_OUT
from activation_store.places import store_place
from activation_store.tokens import PackedContexts
from activation_store.windows import Part
from activation_store.writer import StoredRows


@dataclass(frozen=True, slots=True)
class BlockRunner:
    """What every batch needs."""

    hooks: CaptureHooks
    subject: SubjectConfig
    store: StoreConfig


def parts_of(text: TextConfig, store: StoreConfig) -> list[Part]:
    """The held-out part first: a store whose training rows are complete has its held-out rows too.

    Held-out contexts come evenly from all held-out documents, at least one from each: `held_out_tokens` or a few more.
    """
    folder = store_place(store)
    # The context that reaches the last token asked for is taken whole; others may be partly filled.
    most_rows = store.tokens + text.context_length - 1
    parts = [Part("train", folder, text, store.tokens, most_rows)]
    if store.held_out_tokens > 0 and text.held_out_documents > 0:
        row_tokens = text.context_length * text.held_out_documents
        each = -(-store.held_out_tokens // row_tokens)
        held_out = replace(text, contexts_per_document=each)
        parts.insert(0, Part("held_out", folder / HELD_OUT, held_out, None, each * row_tokens))
    return parts


def capture_rows(batch: PackedContexts, runner: BlockRunner, names: dict[int, str]) -> StoredRows:
    """The valid tokens of a batch as rows. Raises UserError, with the document's name, for one that is not finite."""
    captured = runner.hooks.capture(batch.token_ids_NC, batch.positions_NC)
    valid_NC = batch.valid_NC
    document_ids_n = batch.document_ids_NC[valid_NC]
    keep_NC = valid_NC.to(captured.mlp_in_NCLD.device)
    stored = []
    for name, raw_NCLD in (("mlp_in", captured.mlp_in_NCLD), ("mlp_out", captured.mlp_out_NCLD)):
        raw_nLD = raw_NCLD[keep_NC]
        stored_nLD = encode(raw_nLD, runner.store.dtype).cpu()
        finite_nL = stored_nLD.finite()
        if not finite_nL.all():
            row, column = (int(i) for i in (~finite_nL).nonzero()[0])
            document = int(document_ids_n[row])
            where = f"{name} of layer {runner.hooks.layers[column]} in document {document} ({names[document]})"
            raise _non_finite(where, raw_nLD[row, column], runner)
        stored.append(stored_nLD)
    return StoredRows(
        stored[0],
        stored[1],
        batch.token_ids_NC[valid_NC],
        document_ids_n,
        batch.positions_NC[valid_NC],
        batch.pieces_NC[valid_NC],
    )


def _non_finite(where: str, values_D: Tensor, runner: BlockRunner) -> UserError:
    """The error for a row that is not finite as stored, from its values as captured."""
    path, dtype = runner.store.path, runner.subject.dtype
    if torch.isfinite(values_D).all():
        return UserError(
            f"{where} reaches {float(values_D.abs().max()):.6g}, more than store.dtype={runner.store.dtype.value} can "
            f"hold; committed windows stay: use store.dtype=bfloat16 and a new store.path: layerloom harvest ... "
            f"store.dtype=bfloat16 store.path={path}_bfloat16"
        )
    if dtype is Dtype.float32:
        return UserError(
            f"{where} is not finite in the subject itself; committed windows stay: use other text or another subject"
        )
    return UserError(
        f"{where} is not finite in the subject run in {dtype.value}; committed windows stay: use subject.dtype=float32 "
        f"and a new store.path: layerloom harvest ... subject.dtype=float32 store.path={path}_float32"
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
