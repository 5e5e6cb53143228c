"""`layerloom store info | verify`: what a store holds, and whether every byte of it is as it was committed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from activation_store.manifest import (
    COMMITS,
    HELD_OUT,
    MANIFEST,
    Commit,
    DamagedRecordError,
    StoreManifest,
    count_documents,
    read_commits,
)
from activation_store.progress import Progress, human_bytes
from activation_store.shards import ShardRecord
from activation_store.store import ActivationStore

_READ_BYTES = 1 << 22


@dataclass(slots=True)
class VerifyReport:
    """`damaged`: shard files with the reason, as "PATH: REASON" lines; empty when all is well."""

    files: int = 0
    bytes: int = 0
    damaged: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.damaged


def verify_store(path: Path | str) -> VerifyReport:
    """Reads every committed shard, of the held-out store too, and compares it with its commit's checksum.

    Raises UserError if `path` is not a store.
    """
    folders = [folder for folder in (Path(path), Path(path) / HELD_OUT) if folder == Path(path) or _is_store(folder)]
    report = VerifyReport()
    commits = {folder: _commits(folder, report) for folder in folders}
    total = sum(record.bytes for folder in folders for _, record in _records(folder, commits[folder]))
    with Progress("verify", total=total, unit="B") as progress:
        for folder in folders:
            for file, record in _records(folder, commits[folder]):
                report.files += 1
                report.bytes += record.bytes
                if reason := _damage(file, record):
                    report.damaged.append(f"{file}: {reason}")
                progress.advance(record.bytes)
    return report


def store_info(path: Path | str) -> str:
    """A page about a store, complete or not. Raises UserError if `path` is not a store."""
    store = ActivationStore.open(path, allow_incomplete=True)
    lines = [*_described(store), *_scaled(store)]
    if _is_store(store.path / HELD_OUT):
        held_out = ActivationStore.open(store.path / HELD_OUT, allow_incomplete=True)
        lines.append(f"held out    {held_out.manifest.status}, {held_out.n_rows:,} rows in held_out/")
    return "\n".join(lines)


def _described(store: ActivationStore) -> list[str]:
    m = store.manifest
    layers = f"{m.layers[0]}-{m.layers[-1]}"
    size = human_bytes(store.n_rows * store.layout.row_bytes)
    commits: list[Commit] = list(read_commits(store.path))
    documents = count_documents(commits)
    return [
        f"store       {store.path} ({m.status}, format {m.format_version})",
        f"rows        {store.n_rows:,} in {len(commits)} windows, {documents} documents, {size}",
        f"arrays      mlp_in, mlp_out (rows, {len(m.layers)} layers, {m.d_model}) {m.dtype.value}",
        f"layers      {layers}, {m.input_hook} -> mlp_out",
        f"subject     {m.subject['path']} ({m.subject['architecture']}, {m.subject['dtype']})",
        f"            {m.subject['provenance']}",
        f"text        {m.text['path']}, contexts of {m.text['context_length']} tokens, seed {m.text['seed']}",
        "made with   " + ", ".join(f"{name} {value}" for name, value in m.provenance.items()),
    ]


def _scaled(store: ActivationStore) -> list[str]:
    """Used rows and mean norms by layer."""
    statistics = store.manifest.statistics
    if statistics is None:
        return ["statistics  not final: run the harvest again to finish the store"]
    share = statistics.count / max(1, store.n_rows)
    lines = [
        f"used rows   {statistics.count:,} ({share:.1%}): without first tokens of a piece, special tokens and "
        f"{store.manifest.outlier_rows} outliers above {store.manifest.outlier_factor:g} x the mean norm",
        "layer       mean |mlp_in|  mean |mlp_out|",
    ]
    norms = zip(store.layers, statistics.input_norm_mean_L, statistics.output_norm_mean_L, strict=True)
    return lines + [
        f"{layer:5d}       {float(mlp_in):13.4g}  {float(mlp_out):14.4g}" for layer, mlp_in, mlp_out in norms
    ]


def _is_store(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _records(folder: Path, commits: list[Commit]) -> Iterator[tuple[Path, ShardRecord]]:
    for commit in commits:
        for key, record in commit.files.items():
            yield folder / key, record


def _commits(folder: Path, report: VerifyReport) -> list[Commit]:
    """The commits that can be read; a manifest or commit that cannot, or a commit that is gone, goes to the report."""
    commits = []
    for path in sorted((folder / COMMITS).glob("*.json")):
        try:
            commits.append(Commit.load(path))
        except DamagedRecordError as error:
            report.damaged.append(f"{error.path}: {error.reason}")
    try:
        windows = len(StoreManifest.load(folder).blocks)
    except DamagedRecordError as error:
        report.damaged.append(f"{error.path}: {error.reason}")
        return commits
    # A complete store names all its windows; a commit that is gone hides one.
    if len(commits) < windows:
        report.damaged.append(f"{folder / COMMITS}: {len(commits)} readable commits, {windows} in the manifest")
    return commits


def _damage(file: Path, record: ShardRecord) -> str:
    """Why a shard file is not what was committed; "" if it is."""
    if not file.is_file():
        return "missing"
    size = file.stat().st_size
    if size != record.bytes:
        return f"{size} bytes, {record.bytes} were committed"
    digest = xxhash.xxh3_64()
    with open(file, "rb") as stream:
        while data := stream.read(_READ_BYTES):
            digest.update(data)
    return "" if digest.hexdigest() == record.xxh3_64 else "its checksum differs"
