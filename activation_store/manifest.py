"""`manifest.json` (what a store is) and `commits/NNNNNNNN.json` (one per window that is wholly on disk)."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from activation_store.atomic import json_bytes
from activation_store.config import Compression, StoreConfig, StoreDtype, SubjectConfig, TextConfig
from activation_store.errors import UserError
from activation_store.layout import FORMAT_VERSION, StoreLayout
from activation_store.places import Place, create_whole, write_whole
from activation_store.shards import ShardRecord, repair
from activation_store.statistics import RowSums, ScalingStatistics

MANIFEST = "manifest.json"
COMMITS = "commits"
HELD_OUT = "held_out"
HARVESTING, COMPLETE = "harvesting", "complete"
# What may differ between a store and the config that asks for it: names and places, not content. Paths are compared
# through the fingerprints of what they lead to.
_FREE_SUBJECT = ("path", "revision", "base_model", "model_name", "license", "cache_dir")
_FREE_TEXT = ("path", "license")
FREE_STORE = (
    "path",
    "scratch",
    "claim_seconds",
    "remote_options",
    "remote_requests",
    "remote_retry_seconds",
    "remote_cache_bytes",
    "remote_cache_dir",
)


class DamagedRecordError(UserError):
    """A manifest or commit that is not what was written."""

    def __init__(self, path: Place, reason: str) -> None:
        remedy = (
            repair(path.parent.parent)
            if path.parent.name == COMMITS
            else f"nothing else says what to harvest: put a copy of it back, or delete {path.parent} and harvest again"
        )
        super().__init__(f"{path} is damaged ({reason}); {remedy}")
        self.path, self.reason = path, reason


@contextmanager
def _readable(path: Place) -> Iterator[None]:
    """JSON that is cut short, or is no record of ours, is damage."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedRecordError(path, f"{type(error).__name__}: {str(error).splitlines()[0]}") from error


@dataclass(kw_only=True, slots=True)
class StoreManifest:
    """What a store holds and how it came to be. `rows`, `blocks`, `statistics` are set when it is complete."""

    format_version: int = FORMAT_VERSION
    status: str = HARVESTING
    # "train" or "held_out".
    part: str = "train"
    # `SubjectInfo.to_dict()`.
    subject: dict[str, Any]
    bos_token_id: int | None
    special_token_ids: list[int]
    input_hook: str
    # Layers of the subject that were captured, in the order of the arrays' second axis.
    layers: list[int]
    d_model: int
    dtype: StoreDtype
    # What the store was asked to be, for comparison: see `identity`.
    config: dict[str, Any]
    # `dataclasses.asdict` of the TextConfig.
    text: dict[str, Any]
    chunk_rows: int
    shard_rows: int
    outlier_factor: float
    provenance: dict[str, str]
    compression: Compression = Compression.none
    # Rows of all blocks, and of those the ones that training leaves out as outliers.
    rows: int = 0
    outlier_rows: int = 0
    documents: int = 0
    # [first row in the arrays, rows] of each window, in order.
    blocks: list[list[int]] = field(default_factory=list)
    statistics: ScalingStatistics | None = None
    # Of a mixture, {label, rows, documents} of each source.
    sources: list[dict[str, Any]] = field(default_factory=list)

    @property
    def layout(self) -> StoreLayout:
        """Shapes of the arrays."""
        return StoreLayout(
            len(self.layers), self.d_model, self.dtype, self.chunk_rows, self.shard_rows, self.compression
        )

    def save(self, folder: Place) -> None:
        """Writes `manifest.json`, whole or not at all."""
        write_whole(folder / MANIFEST, json_bytes(self._to_dict()))

    def create(self, folder: Place) -> bool:
        """Like `save`, but only where there is none yet; False if there is one (it stays)."""
        return create_whole(folder / MANIFEST, json_bytes(self._to_dict()))

    def _to_dict(self) -> dict[str, Any]:
        data = {name.name: getattr(self, name.name) for name in fields(self)}
        data["statistics"] = None if self.statistics is None else self.statistics.to_dict()
        return data

    @classmethod
    def load(cls, folder: Place) -> "StoreManifest":
        """Reads a store's manifest. Raises UserError for a folder that is not a store, or of a later format."""
        if not (folder / MANIFEST).is_file():
            what = "is not an activation store (no manifest.json)" if folder.exists() else "does not exist"
            raise UserError(f"store {folder} {what}; give the folder of a store, or make one with: layerloom harvest")
        with _readable(folder / MANIFEST):
            data = json.loads((folder / MANIFEST).read_bytes())
            found = data["format_version"]
        if found != FORMAT_VERSION:
            raise UserError(
                f"store {folder} has format version {found}, this Layerloom reads {FORMAT_VERSION}; harvest it again"
            )
        with _readable(folder / MANIFEST):
            statistics = data["statistics"]
            return cls(
                **data
                | {
                    "dtype": StoreDtype(data["dtype"]),
                    "compression": Compression(data["compression"]),
                    "statistics": None if statistics is None else ScalingStatistics.from_dict(statistics),
                }
            )


@dataclass(frozen=True, slots=True)
class CommittedDocument:
    """A document of a window: `index` is what `document_ids` holds, `rows` how many of its tokens are in the window."""

    index: int
    name: str
    rows: int


@dataclass(frozen=True, slots=True)
class Commit:
    """A window that is wholly on disk. `files` are its shards, relative to the store's folder.

    Its text: `contexts` contexts from context `first_context` of block `first_block` on.
    """

    window: int
    first_block: int
    first_context: int
    contexts: int
    start_row: int
    rows: int
    documents: list[CommittedDocument]
    files: dict[str, ShardRecord]
    sums: RowSums

    def create(self, folder: Place) -> bool:
        """Publishes the commit; False if another one of this window is there already."""
        data = json_bytes(asdict(self) | {"sums": self.sums.to_dict()})
        return create_whole(folder / COMMITS / commit_name(self.window), data)

    @classmethod
    def load(cls, path: Place) -> "Commit":
        with _readable(path):
            data = json.loads(path.read_bytes())
            return cls(
                window=data["window"],
                first_block=data["first_block"],
                first_context=data["first_context"],
                contexts=data["contexts"],
                start_row=data["start_row"],
                rows=data["rows"],
                documents=[CommittedDocument(**document) for document in data["documents"]],
                files={key: ShardRecord(**record) for key, record in data["files"].items()},
                sums=RowSums.from_dict(data["sums"]),
            )


def commit_path(folder: Place, window: int) -> Place:
    return folder / COMMITS / commit_name(window)


def commit_name(window: int) -> str:
    return f"{window:08d}.json"


def committed_windows(folder: Place) -> list[int]:
    """The windows that are committed, in order. Those between them are still to be harvested."""
    return sorted(int(path.stem) for path in (folder / COMMITS).glob("*.json") if path.stem.isdecimal())


def read_commits(folder: Place) -> Iterator[Commit]:
    """The commits in the order of their windows, one at a time (each may be a megabyte)."""
    for window in committed_windows(folder):
        yield Commit.load(folder / COMMITS / commit_name(window))


def count_documents(commits: Iterable[Commit]) -> int:
    """Documents of all windows together; a document may be in several."""
    found = [np.array([d.index for d in commit.documents], dtype=np.int64) for commit in commits]
    return len(np.unique(np.concatenate(found))) if found else 0


def identity(
    subject: SubjectConfig, text: TextConfig, store: StoreConfig, *, layers: range, subject_fingerprint: str, files: str
) -> dict[str, Any]:
    """What two configs must agree on to mean the same store, keyed as in the configs."""
    asked_store = _without(asdict(store), FREE_STORE) | {"layer_start": layers.start, "layer_stop": layers.stop}
    return {
        "subject": _without(asdict(subject), _FREE_SUBJECT) | {"fingerprint": subject_fingerprint},
        "text": _without(asdict(text), _FREE_TEXT) | {"fingerprint": files},
        "store": asked_store,
    }


def _without(values: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def provenance(**more: str) -> dict[str, str]:
    """Versions of what shaped the numbers, and what the caller adds."""
    return {name: _version(name) for name in ("layerloom", "torch", "transformers", "datasets", "zarr")} | more


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
