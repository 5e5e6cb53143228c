"""`manifest.json` (what a store is) and `commits/NNNNNNNN.json` (one per block that is wholly on disk)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from activation_store.atomic import create_json, read_json, write_json
from activation_store.config import Dtype, StoreConfig, SubjectConfig, TextConfig
from activation_store.errors import UserError
from activation_store.layout import FORMAT_VERSION, StoreLayout
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
_FREE_STORE = ("path",)


class DamagedRecordError(UserError):
    """A manifest or commit that is not what was written."""

    def __init__(self, path: Path, reason: str) -> None:
        root = path.parent.parent if path.parent.name == COMMITS else path.parent
        super().__init__(f"{path} is damaged ({reason}); {repair(root)}")
        self.path, self.reason = path, reason


@contextmanager
def _readable(path: Path) -> Iterator[None]:
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
    dtype: Dtype
    # What the store was asked to be, for comparison: see `identity`.
    config: dict[str, Any]
    # `dataclasses.asdict` of the TextConfig.
    text: dict[str, Any]
    chunk_rows: int
    shard_rows: int
    outlier_factor: float
    provenance: dict[str, str]
    # Rows of all blocks, and of those the ones that training leaves out as outliers.
    rows: int = 0
    outlier_rows: int = 0
    documents: int = 0
    # [first row in the arrays, rows] of each block, in order.
    blocks: list[list[int]] = field(default_factory=list)
    statistics: ScalingStatistics | None = None

    @property
    def layout(self) -> StoreLayout:
        """Shapes of the arrays."""
        return StoreLayout(len(self.layers), self.d_model, self.dtype, self.chunk_rows, self.shard_rows)

    def save(self, folder: Path) -> None:
        """Writes `manifest.json`, whole or not at all."""
        data = {name.name: getattr(self, name.name) for name in fields(self)}
        data["statistics"] = None if self.statistics is None else self.statistics.to_dict()
        write_json(folder / MANIFEST, data)

    @classmethod
    def load(cls, folder: Path) -> "StoreManifest":
        """Reads a store's manifest. Raises UserError for a folder that is not a store, or of a later format."""
        if not (folder / MANIFEST).is_file():
            what = "is not an activation store (no manifest.json)" if folder.exists() else "does not exist"
            raise UserError(f"store {folder} {what}; give the folder of a store, or make one with: layerloom harvest")
        with _readable(folder / MANIFEST):
            data = read_json(folder / MANIFEST)
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
                    "dtype": Dtype(data["dtype"]),
                    "statistics": None if statistics is None else ScalingStatistics.from_dict(statistics),
                }
            )


@dataclass(frozen=True, slots=True)
class CommittedDocument:
    """A document of a block: `index` is what `document_ids` holds, `rows` how many of its tokens are in the store."""

    index: int
    name: str
    rows: int


@dataclass(frozen=True, slots=True)
class Commit:
    """A block that is wholly on disk. `files` are its shards, relative to the store's folder."""

    block: int
    start_row: int
    rows: int
    documents: list[CommittedDocument]
    files: dict[str, ShardRecord]
    sums: RowSums

    def create(self, folder: Path) -> bool:
        """Publishes the commit; False if another one of this block is there already."""
        return create_json(commit_path(folder, self.block), asdict(self) | {"sums": self.sums.to_dict()})

    @classmethod
    def load(cls, path: Path) -> "Commit":
        with _readable(path):
            data = read_json(path)
            return cls(
                block=data["block"],
                start_row=data["start_row"],
                rows=data["rows"],
                documents=[CommittedDocument(**document) for document in data["documents"]],
                files={key: ShardRecord(**record) for key, record in data["files"].items()},
                sums=RowSums.from_dict(data["sums"]),
            )


def commit_path(folder: Path, block: int) -> Path:
    return folder / COMMITS / f"{block:08d}.json"


def read_commits(folder: Path) -> Iterator[Commit]:
    """The commits from block 0 up to the first that is missing, one at a time (each may be a megabyte)."""
    block = 0
    while (path := commit_path(folder, block)).exists():
        yield Commit.load(path)
        block += 1


def identity(
    subject: SubjectConfig, text: TextConfig, store: StoreConfig, *, layers: range, subject_fingerprint: str, files: str
) -> dict[str, Any]:
    """What two configs must agree on to mean the same store, keyed as in the configs."""
    asked_store = _without(asdict(store), _FREE_STORE) | {"layer_start": layers.start, "layer_stop": layers.stop}
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
