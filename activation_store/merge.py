"""`layerloom store merge`: one store of the rows of several that were harvested apart.

The windows of the stores follow one another in the order in which the stores are named. Shards are hard-linked where
the file system can, else copied; only `document_ids` are written anew, so that a document of one store never has the id
of another's. Statistics come from the windows' own sums, in the order of the windows: the same stores in the same order
give the same statistics to the last bit.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from activation_store.compare import config_differences
from activation_store.completion import complete_store
from activation_store.errors import UserError
from activation_store.layout import ArrayLayout
from activation_store.manifest import (
    HARVESTING,
    HELD_OUT,
    MANIFEST,
    Commit,
    CommittedDocument,
    StoreManifest,
    provenance,
    read_commits,
)
from activation_store.places import Place, read_parts, storage_at
from activation_store.progress import Progress, counted, human_bytes, report
from activation_store.shard_writer import write_shard
from activation_store.shards import ShardRecord, read_pieces
from activation_store.store import ActivationStore

# Link is not possible there: another file system, one without links, or too many of them.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES)
# What of a store's config says how its text was chosen, and may differ.
_FREE_STORE = ("tokens", "held_out_tokens", "batch_contexts")
_OF_TEXT = ("context_length",)


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """`linked` and `copied` are bytes of shards. `shared`: documents that more than one of the stores has."""

    rows: int
    documents: int
    shared: int
    linked: int
    copied: int


def merge_stores(folders: Sequence[Place], output: Place) -> MergeSummary:
    """Makes the store `output` of the complete stores `folders`, their held-out parts included.

    Raises UserError, before anything is written: for fewer than two stores, one that is half written or another format,
    ones that differ in subject, hook, layers, dtype or the rules of windows (naming the difference), held-out documents
    of one that another trains on, and an `output` that is there. A merge that was killed leaves no store, and is
    continued by the same call.
    """
    stores = _checked(folders, output)
    shared = _shared_documents(stores)
    if shared:
        report(f"merge: {shared:,} documents are in more than one of the stores; their rows will be there twice")
    counts = [0, 0]
    parts = [stores]
    if all(store.held_out() is not None for store in stores):
        parts.insert(0, [held_out for store in stores if (held_out := store.held_out()) is not None])
    size = sum(_linked_bytes(store) for part in parts for store in part)
    with Progress("merge", total=size, unit="B") as progress:
        for part in parts:
            _Merge(part, output / HELD_OUT if len(parts) == 2 and part is parts[0] else output, progress, counts).run()
    merged = StoreManifest.load(output)
    return MergeSummary(merged.rows, merged.documents, shared, counts[0], counts[1])


def _linked_bytes(store: ActivationStore) -> int:
    """Bytes of the shards that are linked."""
    files = (item for commit in read_commits(store.path) for item in commit.files.items())
    return sum(record.bytes for key, record in files if not key.startswith("document_ids/"))


def _checked(folders: Sequence[Place], output: Place) -> list[ActivationStore]:
    if len(folders) < 2:
        raise UserError(f"merge joins two stores or more, got {len(folders)}; name their folders")
    if len({_resolved(folder) for folder in (*folders, output)}) <= len(folders):
        raise UserError(f"merge wants different folders, got {', '.join(map(str, folders))} and output={output}")
    stores = [ActivationStore.open(folder) for folder in folders]
    first = stores[0]
    for store in stores[1:]:
        if differences := config_differences(_alike(first), _alike(store)):
            shown = differences[0].replace(" asked for", f" in {store.path}").replace(" there,", f" in {first.path},")
            raise UserError(
                f"{first.path} and {store.path} cannot be merged: {shown}; harvest one of them like the other"
            )
    lacking = [str(store.path) for store in stores if store.held_out() is None]
    if lacking and len(lacking) < len(stores):
        raise UserError(
            f"{lacking[0]} has no held-out rows and another of the stores has; harvest all with store.held_out_tokens, "
            "or all without"
        )
    _check_held_out(stores)
    if output.exists() and any(output.iterdir()) and not _begun(output, stores):
        raise UserError(f"output={output} exists and is not a merge of these stores; give a new folder")
    return stores


def _resolved(folder: Place) -> str:
    return str(folder.resolve() if isinstance(folder, Path) else folder)


def _alike(store: ActivationStore) -> dict[str, Any]:
    """What stores must agree on to be merged."""
    m = store.manifest
    config = {key: value for key, value in m.config["store"].items() if key not in _FREE_STORE} if m.config else {}
    return {
        "subject": {"fingerprint": m.subject.get("fingerprint"), "dtype": m.subject["dtype"], "bos": m.bos_token_id},
        "special_token_ids": m.special_token_ids,
        "input_hook": m.input_hook,
        "layers": m.layers,
        "d_model": m.d_model,
        "store": {
            "dtype": m.dtype.value,
            "compression": m.compression.value,
            "chunk_rows": m.chunk_rows,
            "shard_rows": m.shard_rows,
            "outlier_factor": m.outlier_factor,
        }
        | config,
        "text": {key: m.text[key] for key in _OF_TEXT},
    }


def _text_of(store: ActivationStore) -> str:
    """Stores with the same of this have documents of the same names from the same text."""
    return str(store.manifest.config["text"]["fingerprint"]) if store.manifest.config else store.manifest.text["path"]


def _documents(store: ActivationStore) -> set[tuple[str, str]]:
    text = _text_of(store)
    return {(text, document.name) for commit in read_commits(store.path) for document in commit.documents}


def _shared_documents(stores: list[ActivationStore]) -> int:
    seen: set[tuple[str, str]] = set()
    shared: set[tuple[str, str]] = set()
    for store in stores:
        documents = _documents(store)
        shared |= seen & documents
        seen |= documents
    return len(shared)


def _check_held_out(stores: list[ActivationStore]) -> None:
    """No store may train on what another holds out."""
    for store in stores:
        held_out = store.held_out()
        if held_out is None:
            continue
        for other in stores:
            if both := _documents(held_out) & _documents(other):
                raise UserError(
                    f"{store.path} holds out {len(both)} documents that {other.path} trains on (such as "
                    f"{min(both)[1]}); harvest both with the same text.seed and text.held_out_documents"
                )


def _sources(stores: list[ActivationStore]) -> list[dict[str, Any]]:
    """What the manifest says of each store: its text, and where its rows and document ids are."""
    sources: list[dict[str, Any]] = []
    first_row = first_document = 0
    for store in stores:
        m = store.manifest
        sources.append(
            {
                "text": m.text,
                "fingerprint": _text_of(store),
                "first_row": first_row,
                "rows": m.rows,
                "first_document": first_document,
                "documents": m.documents,
                "provenance": m.provenance,
            }
        )
        first_row += m.rows
        first_document += _document_span(store)
    return sources


def _document_span(store: ActivationStore) -> int:
    """Document ids of a store are below this."""
    return max((d.index for commit in read_commits(store.path) for d in commit.documents), default=-1) + 1


def _merged_manifest(stores: list[ActivationStore]) -> StoreManifest:
    first = stores[0].manifest
    sources = _sources(stores)
    digest = xxhash.xxh3_64_hexdigest("\n".join(source["fingerprint"] for source in sources).encode())
    text = {"fingerprint": f"merged from {len(stores)} stores, xxh3 {digest}"}
    config = {**first.config, "text": first.config.get("text", {}) | text, "merged": sources}
    return replace(
        first,
        status=HARVESTING,
        rows=0,
        outlier_rows=0,
        documents=0,
        blocks=[],
        statistics=None,
        config=config,
        provenance=provenance(merged=str(len(stores))),
    )


def _begun(output: Place, stores: list[ActivationStore]) -> bool:
    """Whether `output` is a merge of these stores that was not finished."""
    parts = [
        (output, stores),
        (output / HELD_OUT, [held for store in stores if (held := store.held_out()) is not None]),
    ]
    found = [(StoreManifest.load(part), of) for part, of in parts if (part / MANIFEST).is_file()]
    unfinished = not (output / MANIFEST).is_file() or StoreManifest.load(output).status == HARVESTING
    return bool(found) and unfinished and all(manifest.config == _merged_manifest(of).config for manifest, of in found)


class _Merge:
    """One part of the merged store in the making."""

    def __init__(self, stores: list[ActivationStore], output: Place, progress: Progress, counts: list[int]) -> None:
        """`counts`: bytes linked and copied, counted up."""
        self._stores, self._output, self._progress, self._counts = stores, output, progress, counts
        self._storage = storage_at(output)
        self._manifest = _merged_manifest(stores)
        arrays = self._manifest.layout.arrays()
        self._ids = next(array for array in arrays if array.name == "document_ids")
        self._others = [array for array in arrays if array.name != "document_ids"]

    def run(self) -> None:
        """Writes the windows and completes the store."""
        self._manifest.create(self._output)
        window = start_row = 0
        for store, source in zip(self._stores, self._manifest.config["merged"], strict=True):
            for commit in read_commits(store.path):
                self._window(store, commit, window, start_row, source["first_document"])
                window += 1
                start_row += self._manifest.layout.shards_of(commit.rows) * self._manifest.shard_rows
        complete_store(self._output, self._manifest)

    def _window(self, store: ActivationStore, commit: Commit, window: int, start_row: int, offset: int) -> None:
        """Puts one window of a store in its place; does nothing if it is there."""
        files: dict[str, ShardRecord] = {}
        shard_rows = self._manifest.shard_rows
        for number in range(self._manifest.layout.shards_of(commit.rows)):
            before, after = commit.start_row // shard_rows + number, start_row // shard_rows + number
            for array in self._others:
                record = commit.files[array.shard_key(before)]
                self._link(store.path / array.shard_key(before), array.shard_key(after), record.bytes)
                files[array.shard_key(after)] = record
                self._progress.advance(record.bytes)
            filled = min(shard_rows, commit.rows - number * shard_rows)
            files[self._ids.shard_key(after)] = self._renumber(store, before, after, filled, offset)
        documents = [CommittedDocument(d.index + offset, d.name, d.rows) for d in commit.documents]
        moved = replace(commit, window=window, start_row=start_row, documents=documents, files=files)
        moved.create(self._output)

    def _link(self, there: Place, key: str, size: int) -> None:
        """Puts a shard in its place; it appears whole."""
        if self._storage.size(key) == size:
            return
        if isinstance(there, Path) and isinstance(self._output, Path):
            here = self._output / key
            here.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(there, here)
                self._counts[0] += size
                return
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
        self._storage.put_if_absent(key, list(read_parts(there)))
        self._counts[1] += size

    def _renumber(self, store: ActivationStore, before: int, after: int, filled: int, offset: int) -> ShardRecord:
        """Writes the shard `after` of document ids: those of shard `before` of a store, `offset` added."""
        ids: ArrayLayout = self._ids
        row_chunks = -(-filled // ids.chunk_rows)
        buffer = np.empty(ids.buffer_shape, dtype=ids.dtype)
        chunks = buffer[:row_chunks].reshape(-1).view(np.uint8).reshape(-1, ids.chunk_bytes)
        read_pieces(store.path, ids, before, [chunk.data for chunk in chunks], first_slot=0)
        flat = buffer.reshape(-1)
        flat[:filled] += offset
        written = write_shard(self._storage, ids, after, buffer, row_chunks)
        self._counts[1] += written.record.bytes
        return written.record


def merge_line(summary: MergeSummary, output: Place) -> str:
    """The summary in words."""
    rows = f"{counted(summary.rows, 'row')} of {counted(summary.documents, 'document')}"
    return f"{output}: {rows}; {human_bytes(summary.linked)} linked, {human_bytes(summary.copied)} copied"
