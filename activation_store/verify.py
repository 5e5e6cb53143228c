"""`layerloom store verify`: whether every byte of a store is as it was committed, and what is damaged if not."""

from dataclasses import dataclass, field

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
from activation_store.places import Place, place, read_parts
from activation_store.progress import Progress, human_bytes
from activation_store.progress import report as report_line
from activation_store.shards import ShardRecord


@dataclass(frozen=True, slots=True)
class Damage:
    """A file of the store in `folder` that is not what was committed; `window` is the one that it belongs to.

    `key` is relative to `folder`; it is the commit itself where that is gone or unreadable. Window -1: the manifest.
    """

    folder: Place
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

    def add(self, damage: Damage) -> None:
        """Names it at once: a large store takes hours."""
        self.found.append(damage)
        report_line(f"damaged: {damage}")

    @property
    def damaged(self) -> list[str]:
        """The damage as "PATH: REASON" lines."""
        return [str(damage) for damage in self.found]

    @property
    def ok(self) -> bool:
        return not self.found


def store_folders(path: Place | str) -> list[Place]:
    """The folder of a store, and that of its held-out part if there is one."""
    folder = place(path)
    held_out = folder / HELD_OUT
    return [folder, held_out] if (held_out / MANIFEST).is_file() else [folder]


def verify_store(path: Place | str) -> VerifyReport:
    """Reads every committed shard, of the held-out store too, and compares it with its commit's checksum.

    One commit is in memory at a time. Raises UserError if `path` is not a store.
    """
    report = VerifyReport()
    windows = {folder: _windows(folder, report) for folder in store_folders(path)}
    # By windows, each of which is about as large as any other: how large only its commit tells.
    with Progress("verify", total=sum(map(len, windows.values())), unit="window") as progress:
        for folder, numbers in windows.items():
            for window in numbers:
                if (commit := _commit(folder, window, report)) is not None:
                    _check_window(folder, commit, report)
                progress.advance(1, note=f"{human_bytes(report.bytes)} read, {len(report.found)} damaged")
    return report


def _check_window(folder: Place, commit: Commit, report: VerifyReport) -> None:
    for key, record in commit.files.items():
        report.files += 1
        report.bytes += record.bytes
        if reason := shard_damage(folder / key, record):
            report.add(Damage(folder, key, commit.window, reason))


def shard_damage(file: Place, record: ShardRecord) -> str:
    """Why a shard file is not what was committed; "" if it is."""
    digest, size = xxhash.xxh3_64(), 0
    try:
        for data in read_parts(file):
            digest.update(data)
            size += len(data)
    except FileNotFoundError:
        return "missing"
    if size != record.bytes:
        return f"{size} bytes, {record.bytes} were committed"
    return "" if digest.hexdigest() == record.xxh3_64 else "its checksum differs"


def _windows(folder: Place, report: VerifyReport) -> list[int]:
    """The windows whose commits are to be there. A manifest that cannot be read goes to the report."""
    windows = committed_windows(folder)
    try:
        manifest = StoreManifest.load(folder)
        if manifest.status == COMPLETE:
            # A complete store names all its windows, numbered from 0.
            windows = sorted({*windows, *range(len(manifest.blocks))})
    except DamagedRecordError as error:
        report.add(Damage(folder, MANIFEST, -1, error.reason))
    return windows


def _commit(folder: Place, window: int, report: VerifyReport) -> Commit | None:
    """A commit; one that is gone or cannot be read goes to the report."""
    path = commit_path(folder, window)
    try:
        return Commit.load(path)
    except FileNotFoundError:
        reason = "missing"
    except DamagedRecordError as error:
        reason = error.reason
    report.add(Damage(folder, f"{path.parent.name}/{path.name}", window, reason))
    return None
