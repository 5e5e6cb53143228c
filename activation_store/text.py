"""Documents of a text, in an order shuffled by seed, through `datasets`; the first ones are held out from training."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from activation_store.chat import Messages, messages_of
from activation_store.config import Loader, TextConfig
from activation_store.errors import UserError
from activation_store.mixture import Mixture, source_texts
from activation_store.packages import PACKAGE_PREFIX, resolve_package_path

_ENDINGS = {
    ".txt": Loader.text,
    ".md": Loader.text,
    ".jsonl": Loader.jsonl,
    ".jsonl.gz": Loader.jsonl,
    ".jsonl.zst": Loader.jsonl,
    ".parquet": Loader.parquet,
}
_GLOB_CHARACTERS = frozenset("*?[")
# Places of a stream that are read at once.
_STREAM_PLACES = 16


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `index` is its place in the seed-shuffled order over ALL documents; `name` says where it came from."""

    index: int
    text: str
    name: str
    # Of a chat, whose `text` is empty.
    messages: Messages | None = None


class DocumentSource(Protocol):
    """All documents of a text in their shuffled order."""

    @property
    def count(self) -> int | None:
        """How many there are; None for a stream, which does not say."""

    @property
    def fingerprint(self) -> str:
        """Differs when the documents differ (files by name and size, hub data sets by id and revision)."""

    def read(self, start: int, stop: int | None) -> Iterator[Document]:
        """Documents [start, stop) of the shuffled order (None: to the last one)."""


def open_documents(cfg: TextConfig) -> DocumentSource:
    """Finds the documents. Raises UserError if there are none, or too few to hold out `held_out_documents` of them.

    A path on this machine is never looked up on the network.
    """
    source = _find_source(cfg)
    if source.count is not None and source.count <= cfg.held_out_documents:
        raise UserError(_too_few(cfg, source.count))
    return source


def stream_documents(cfg: TextConfig, *, held_out: bool, start: int = 0) -> Iterator[Document]:
    """The held-out documents (indices [0, held_out_documents)) or all the others, `start` of them skipped.

    Raises UserError for text without documents, or with no more than are held out.
    """
    source = open_documents(cfg)
    first, stop = (0, cfg.held_out_documents) if held_out else (cfg.held_out_documents, None)
    seen = 0
    for document in source.read(first + start, stop):
        seen += 1
        yield document
    # A stream tells its length only by ending.
    if seen == 0 and start == 0 and not (held_out and cfg.held_out_documents == 0):
        raise UserError(_too_few(cfg, None))


def text_fingerprint(cfg: TextConfig) -> str:
    """`open_documents(cfg).fingerprint`, without reading a document. Raises UserError for files that are not there."""
    if cfg.sources:
        return _mixture(cfg).fingerprint
    files = None if cfg.loader is Loader.hub else _local_files(cfg)
    return _hub_fingerprint(cfg) if files is None else _files_fingerprint(files)


def check_documents(cfg: TextConfig) -> None:
    """Reads one document for training of a stream, which shows only then what it has; files were looked at before.

    Raises UserError for a stream that cannot be reached, has another column, or no more documents than are held out.
    """
    for text in source_texts(cfg) or [cfg]:
        source = open_documents(text)
        if isinstance(source, _HubStream):
            source.check()


def _too_few(cfg: TextConfig, count: int | None) -> str:
    found = "no more than the held-out" if count is None else str(count)
    if count == 0 or cfg.held_out_documents == 0:
        return f"text.path={cfg.path} has no documents; give a text that has some"
    return (
        f"text.path={cfg.path} has {found} documents and text.held_out_documents={cfg.held_out_documents} of them are "
        "held out: none is left to train on; hold out fewer or give more text"
    )


def _mixture(cfg: TextConfig) -> Mixture:
    texts = source_texts(cfg)
    return Mixture(cfg, [open_documents(text) for text in texts], texts)


def _find_source(cfg: TextConfig) -> DocumentSource:
    if cfg.sources:
        return _mixture(cfg)
    files = None if cfg.loader is Loader.hub else _local_files(cfg)
    if files is None:
        return _HubStream(cfg) if cfg.streaming else _hub_table(cfg)
    loader = _loader_of(cfg, files)
    if loader is Loader.text:
        if cfg.chat:
            raise UserError(
                f"text.path={cfg.path} is read as plain text and text.chat=true wants a column of messages; use "
                "text=chat (JSON lines) or another text.loader"
            )
        return _TextFiles(cfg, files)
    return _local_table(cfg, loader, files)


def _local_files(cfg: TextConfig) -> list[Path] | None:
    """The files that `cfg.path` means, sorted; None if it means a hub data set."""
    path = resolve_package_path(cfg.path)
    if _GLOB_CHARACTERS & set(str(path)):
        anchor = Path(path.anchor)
        files = [file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file()]
    elif path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path))]
        if cfg.loader is Loader.auto:
            files = [file for file in files if _ending(file) in _ENDINGS]
    elif path.is_file():
        files = [path]
    elif cfg.loader is Loader.auto and _looks_like_hub_id(cfg.path):
        return None
    else:
        raise UserError(f"text.path={cfg.path} does not exist; give a file, a folder, a glob or a hub data set id")
    if not files:
        wanted = f"{'/'.join(_ENDINGS)} files" if cfg.loader is Loader.auto else "files"
        raise UserError(
            f"text.path={cfg.path} matches no {wanted}; a document is a .txt file or a row of jsonl or parquet"
        )
    return sorted(files)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _looks_like_hub_id(path: str) -> bool:
    local = path.startswith(("/", ".", "~", PACKAGE_PREFIX)) or path.count("/") > 1 or _ending(Path(path)) in _ENDINGS
    return bool(path) and not local


def _ending(file: Path) -> str:
    """`.jsonl.gz` for compressed files, else the last suffix."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return "".join(suffixes[-2:]) if "".join(suffixes[-2:]) in _ENDINGS else "".join(suffixes[-1:])


def _loader_of(cfg: TextConfig, files: list[Path]) -> Loader:
    if cfg.loader is not Loader.auto:
        return cfg.loader
    kinds = {_ENDINGS.get(_ending(file)) for file in files}
    if len(kinds) > 1 or None in kinds:
        endings = sorted({_ending(file) or "no ending" for file in files})
        raise UserError(
            f"text.path={cfg.path} has files with {', '.join(endings)}; set text.loader to text, jsonl or parquet"
        )
    (kind,) = kinds
    assert kind is not None
    return kind


def _files_fingerprint(files: list[Path]) -> str:
    """Of the names below their common folder and the sizes: cheap, and the same wherever the folder lies."""
    common = Path(os.path.commonpath([file.parent for file in files]))
    listing = "\n".join(f"{file.relative_to(common)}\t{file.stat().st_size}" for file in files)
    return f"{len(files)} files, xxh3 {xxhash.xxh3_64_hexdigest(listing.encode())}"


def _permutation(seed: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).permutation(count)


class _TextFiles:
    """A document is a file; only the files asked for are read."""

    def __init__(self, cfg: TextConfig, files: list[Path]) -> None:
        self._files = [files[i] for i in _permutation(cfg.seed, len(files))]
        self.count: int | None = len(files)
        self.fingerprint = _files_fingerprint(files)

    def read(self, start: int, stop: int | None) -> Iterator[Document]:
        files = self._files[start:stop]
        if not files:
            return
        # Streaming: nothing is copied to a cache. A byte that is not UTF-8 must not stop a harvest of hours.
        rows = IterableDataset.from_text([str(file) for file in files], sample_by="document", encoding_errors="replace")
        for offset, (file, row) in enumerate(zip(files, rows, strict=True)):
            yield Document(start + offset, row["text"], file.name)


class _Table:
    """A document is a row of a table with random access (`datasets` keeps it memory-mapped in its cache)."""

    def __init__(self, cfg: TextConfig, table: Dataset, fingerprint: str, row_name: str) -> None:
        _check_column(cfg, table.column_names)
        self._cfg, self._table, self._row_name = cfg, table, row_name
        self._order = _permutation(cfg.seed, len(table))
        self.count: int | None = len(table)
        self.fingerprint = fingerprint

    def read(self, start: int, stop: int | None) -> Iterator[Document]:
        for index in range(*slice(start, stop).indices(len(self._order))):
            row = int(self._order[index])
            name = f"{self._row_name} row {row}"
            yield _document(self._cfg, self._table[row], index, name)


def _local_table(cfg: TextConfig, loader: Loader, files: list[Path]) -> _Table:
    # Not load_dataset: before it reads a local file it asks a server to count the use.
    read = Dataset.from_json if loader is Loader.jsonl else Dataset.from_parquet
    # An empty file is no table; it has no documents.
    paths = [str(file) for file in files if file.stat().st_size > 0]
    if not paths:
        raise UserError(_too_few(cfg, 0))
    try:
        table = read(paths)
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(
            f"text.path={cfg.path} cannot be read as {loader.value}: {reason}; check text.loader"
        ) from error
    name = files[0].name if len(files) == 1 else f"{files[0].name}..{files[-1].name}"
    return _Table(cfg, table, _files_fingerprint(files), name)


def _hub_fingerprint(cfg: TextConfig) -> str:
    return f"hub {cfg.path} {cfg.name or 'default'} {cfg.split} at {cfg.revision}"


def _load_hub(cfg: TextConfig) -> Any:
    """`load_dataset` with the causes that a user can mend said in one line."""
    try:
        return load_dataset(cfg.path, cfg.name or None, split=cfg.split, revision=cfg.revision, streaming=cfg.streaming)
    except (DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"text.path={cfg.path} was not found on this machine and could not be loaded from the hub ({reason}); "
            "check text.path, text.name, text.split, text.revision and the network"
        ) from error


def _hub_table(cfg: TextConfig) -> _Table:
    return _Table(cfg, _load_hub(cfg), _hub_fingerprint(cfg), cfg.path)


class _HubStream:
    """A hub data set read as a stream, shuffled within a buffer of documents."""

    def __init__(self, cfg: TextConfig) -> None:
        self._cfg = cfg
        self.count: int | None = None
        self.fingerprint = _hub_fingerprint(cfg)

    def read(self, start: int, stop: int | None) -> Iterator[Document]:
        return _read_stream(self._cfg, _load_hub(self._cfg), start, stop)

    def check(self) -> None:
        """See `check_documents`. Unshuffled, for the shuffle reads a buffer of documents first."""
        row = next(iter(_load_hub(self._cfg).skip(self._cfg.held_out_documents)), None)
        if row is None:
            raise UserError(_too_few(self._cfg, None))
        _check_column(self._cfg, list(row))
        _document(self._cfg, row, 0, f"{self._cfg.path} document {self._cfg.held_out_documents}")


def _read_stream(cfg: TextConfig, stream: IterableDataset, start: int, stop: int | None) -> Iterator[Document]:
    """Documents [start, stop) of `stream` in their shuffled order; those before have to be read too."""
    for index, row in enumerate(islice(_scattered(cfg, stream), start, stop), start):
        _check_column(cfg, list(row))
        name = f"{cfg.path} document {index}"
        yield _document(cfg, row, index, name)


def _scattered(cfg: TextConfig, stream: IterableDataset) -> Iterator[dict[str, Any]]:
    """The rows of a stream of unknown length, from several places of it in turn, each shuffled within a buffer.

    A place is a share of the stream's files, which are shuffled too. A stream of one file is read from its beginning.
    """
    places = max(1, min(_STREAM_PLACES, stream.num_shards, cfg.shuffle_buffer))
    parts = [
        iter(stream.shard(places, place).shuffle(seed=cfg.seed, buffer_size=cfg.shuffle_buffer // places))
        for place in range(places)
    ]
    while parts:
        for part in list(parts):
            row = next(part, None)
            if row is None:
                parts.remove(part)
            else:
                yield row


def _check_column(cfg: TextConfig, columns: list[str]) -> None:
    if cfg.column not in columns:
        raise UserError(
            f"text.column={cfg.column} is not a column of {cfg.path}; the columns are {', '.join(sorted(columns))}"
        )


def _document(cfg: TextConfig, row: dict[str, Any], index: int, name: str) -> Document:
    if cfg.chat:
        return Document(index, "", name, messages_of(row[cfg.column], cfg.column, name))
    return Document(index, _text_of(cfg, row, name), name)


def _text_of(cfg: TextConfig, row: dict[str, Any], name: str) -> str:
    text = row[cfg.column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(
            f"text.column={cfg.column} of {name} holds {type(text).__name__}, not text; name a column of strings"
        )
    return text
