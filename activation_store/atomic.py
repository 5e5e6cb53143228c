"""Files that are there whole or not at all: temporary file in the same folder, fsync, rename, fsync of the folder."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_bytes(path: Path | str, data: bytes) -> None:
    """Writes `data` to `path` (parents are created), replacing what was there; a kill leaves the old or the new."""
    _write(Path(path), data, os.replace)


def write_text(path: Path | str, text: str) -> None:
    """`write_bytes` of the text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """`write_bytes` of indented JSON. NaN and infinity are refused (ValueError): they are not JSON."""
    write_bytes(path, json_bytes(value))


def create_json(path: Path | str, value: Any) -> bool:
    """Like `write_json`, but only if `path` does not exist yet; False if it does (what is there stays)."""
    target = Path(path)
    try:
        _write(target, json_bytes(value), os.link)
    except FileExistsError:
        return False
    return True


def read_json(path: Path | str) -> Any:
    """The parsed JSON of `path`. Raises OSError or json.JSONDecodeError."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def fsync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable (a rename survives a power cut only after this)."""
    fsync_file(folder)


def fsync_file(path: Path) -> None:
    """Makes what was written to `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path | str) -> int:
    """Bytes that this user may still write to the file system of `path`, or of its nearest existing parent."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def json_bytes(value: Any) -> bytes:
    """Indented JSON. NaN and infinity are refused (ValueError): they are not JSON."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _write(path: Path, data: bytes, publish: Callable[[str, Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            # mkstemp makes files private; give them the permissions that open() would.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
        fsync_folder(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask, which POSIX can only tell by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
