"""`layerloom store verify`: whether every byte of a store is as it was committed, and what is damaged if not."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from activation_store.manifest import (
    COMPLETE,
    HELD_OUT,
    MANIFEST,
    Commit,
    DamagedRecordError,
    StoreManifest,
    commit_path,
    committed_windows,
)
from activation_store.progress import Progress
from activation_store.shards import ShardRecord

_READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Damage:
    """A file of the store in `folder` that is not what was committed; `window` is the one that it belongs to.

    `key` is relative to `folder`; it is the commit itself where that is gone or unreadable. Window -1: the manifest.
    """

    folder: Path
    key: str
    window: int
    reason: str

    def __str__(self) -> str:
        return f"{self.folder / self.key}: {self.reason}"


@dataclass(slots=True)
class VerifyReport:
    """How much was read, and what was found damaged: nothing when all is well."""

    files: int = 0
    bytes: int = 0
    found: list[Damage] = field(default_factory=list)

    @property
    def damaged(self) -> list[str]:
        """The damage as "PATH: REASON" lines."""
        return [str(damage) for damage in self.found]

    @property
    def ok(self) -> bool:
        return not self.found


def store_folders(path: Path | str) -> list[Path]:
    """The folder of a store, and that of its held-out part if there is one."""
    held_out = Path(path) / HELD_OUT
    return [Path(path), held_out] if (held_out / MANIFEST).is_file() else [Path(path)]


def verify_store(path: Path | str) -> VerifyReport:
    """Reads every committed shard, of the held-out store too, and compares it with its commit's checksum.

    Raises UserError if `path` is not a store.
    """
    report = VerifyReport()
    commits = {folder: _commits(folder, report) for folder in store_folders(path)}
    total = sum(record.bytes for found in commits.values() for commit in found for record in commit.files.values())
    with Progress("verify", total=total, unit="B") as progress:
        for folder, window, key, record in _records(commits):
            report.files += 1
            report.bytes += record.bytes
            if reason := shard_damage(folder / key, record):
                report.found.append(Damage(folder, key, window, reason))
            progress.advance(record.bytes)
    return report


def shard_damage(file: Path, record: ShardRecord) -> str:
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


def _records(commits: dict[Path, list[Commit]]) -> Iterator[tuple[Path, int, str, ShardRecord]]:
    for folder, found in commits.items():
        for commit in found:
            for key, record in commit.files.items():
                yield folder, commit.window, key, record


def _commits(folder: Path, report: VerifyReport) -> list[Commit]:
    """The commits that can be read; a manifest or commit that cannot, or a commit that is gone, goes to the report."""
    windows = committed_windows(folder)
    try:
        manifest = StoreManifest.load(folder)
        if manifest.status == COMPLETE:
            # A complete store names all its windows, numbered from 0.
            windows = sorted({*windows, *range(len(manifest.blocks))})
    except DamagedRecordError as error:
        report.found.append(Damage(folder, MANIFEST, -1, error.reason))
    commits = []
    for window in windows:
        path = commit_path(folder, window)
        try:
            commits.append(Commit.load(path))
        except FileNotFoundError:
            report.found.append(Damage(folder, f"{path.parent.name}/{path.name}", window, "missing"))
        except DamagedRecordError as error:
            report.found.append(Damage(folder, f"{path.parent.name}/{path.name}", window, error.reason))
    return commits
