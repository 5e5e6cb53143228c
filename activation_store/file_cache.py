"""A bounded folder of parts of remote files, for any number of processes of one machine.

Each remote file has one sparse file here: its bytes, of which only those that were read are there, and behind them one
byte for each block of `BLOCK_BYTES`, 1 when the block is there. A block is marked after its bytes are written, and what
a reboot may have torn is not looked at again (names hold the boot's id). A file is removed as a whole, least recently
used first; who reads it at that moment has it open and reads on.
"""

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from activation_store.errors import os_error_line
from activation_store.progress import report

BLOCK_BYTES = 1 << 16
# What is kept when room is made, so that it is not made again at once.
_KEPT = 0.875
_SUFFIX = ".blocks"
Fetch = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A remote file's place in the cache."""

    path: Path
    size: int


class FileCache:
    """At most `max_bytes` on disk, besides what is being fetched at the moment when room is made."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Raises OSError if the folder cannot be made or written."""
        self.folder, self.max_bytes = folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._boot = _boot_id()
        self._given_up = False

    def file(self, name: str, size: int) -> CachedFile:
        """`name` is another one for other content (with the remote file's version)."""
        digest = xxhash.xxh3_128_hexdigest(f"{self._boot} {size} {name}".encode())
        return CachedFile(self.folder / f"{digest}{_SUFFIX}", size)

    def holds(self, length: int) -> bool:
        """Whether it is worth keeping so many bytes: they leave room for others."""
        return not self._given_up and 0 < length <= self.max_bytes // 4

    def give_up(self, error: OSError) -> None:
        """Keeps nothing more in this process: the disk is full, or fails. Says so once."""
        if not self._given_up:
            self._given_up = True
            report(f"cache {self.folder}: {os_error_line(error)}; reading goes on without it (store.remote_cache_dir)")

    @contextmanager
    def filled(self, file: CachedFile, offset: int, length: int, fetch: Fetch) -> Iterator[int]:
        """A descriptor of a file with these bytes in their place; `fetch(start, stop)` gets those that are missing."""
        blocks = -(-file.size // BLOCK_BYTES)
        descriptor = os.open(file.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(descriptor).st_size < file.size + blocks:
                os.ftruncate(descriptor, file.size + blocks)
            os.utime(descriptor)
            stop = min(file.size, offset + length)
            if stop > offset:
                self._fill(descriptor, file.size, (offset // BLOCK_BYTES, -(-stop // BLOCK_BYTES)), fetch)
            yield descriptor
        finally:
            os.close(descriptor)

    def _fill(self, descriptor: int, size: int, blocks: tuple[int, int], fetch: Fetch) -> None:
        """Fetches those of blocks [first, last) that are missing."""
        there = os.pread(descriptor, blocks[1] - blocks[0], size + blocks[0])
        for first, last in _missing(there, blocks[0]):
            start, stop = first * BLOCK_BYTES, min(last * BLOCK_BYTES, size)
            self._make_room((last - first) * BLOCK_BYTES)
            _write_at(descriptor, memoryview(fetch(start, stop)), start)
            _write_at(descriptor, memoryview(b"\1" * (last - first)), size + first)

    def _make_room(self, length: int) -> None:
        """Counts bytes that are about to be written, for all processes; removes files when there would be too many."""
        descriptor = os.open(self.folder / "bytes", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            counted = struct.unpack("<q", os.pread(descriptor, 8, 0).ljust(8, b"\0"))[0] + length
            if counted > self.max_bytes:
                counted = self._remove_oldest(int(_KEPT * self.max_bytes) - length) + length
            os.pwrite(descriptor, struct.pack("<q", counted), 0)
        finally:
            os.close(descriptor)

    def _remove_oldest(self, keep: int) -> int:
        """Removes files until at most `keep` bytes are left; returns how many are."""
        found = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(_SUFFIX):
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                found.append((stat.st_mtime_ns, _disk_bytes(stat), entry.path))
        left = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if left <= keep:
                break
            Path(path).unlink(missing_ok=True)
            left -= size
        return left


def cached_bytes(folder: Path) -> int:
    """Bytes that a cache takes on disk."""
    return sum(_disk_bytes(path.stat()) for path in folder.glob(f"*{_SUFFIX}"))


def _disk_bytes(stat: os.stat_result) -> int:
    return stat.st_blocks * 512


def _missing(there: bytes, first: int) -> Iterator[tuple[int, int]]:
    """Runs of blocks that are not there."""
    start = there.find(0)
    while start >= 0:
        stop = there.find(1, start)
        stop = stop if stop >= 0 else len(there)
        yield first + start, first + stop
        start = there.find(0, stop)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data.nbytes:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


def _boot_id() -> str:
    """Of this machine since it was started. A folder shared by machines has each one's own files."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{os.uname().nodename}"
