"""Where a store's files are: a small protocol that an object store can implement, and local folders.

Keys are relative paths with `/`, as zarr's. What the harvest needs of a storage is that an object appears whole, that
one of several creators wins, and that a listing shows what was created before it.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from activation_store.atomic import fsync_file, fsync_folder

Bytes = bytes | memoryview


class Storage(Protocol):
    """Objects by key. Every method may raise OSError (the disk, the network)."""

    def get(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError if there is none."""

    def put(self, key: str, data: Bytes) -> None:
        """Creates or replaces an object; readers see the old or the new one. A power cut may undo it."""

    def put_if_absent(self, key: str, pieces: Sequence[Bytes]) -> bool:
        """Creates an object of these bytes, one piece after another; False if there is one (it stays). Durable."""

    def list(self, folder: str) -> Iterator[str]:
        """Keys of the objects directly in `folder`, in any order; none if there is no such folder."""

    def delete(self, key: str) -> None:
        """Removes an object; nothing happens if there is none."""

    def size(self, key: str) -> int | None:
        """Bytes of an object; None if there is none."""

    def clean(self) -> None:
        """Removes what killed writers left, of whoever they are: only when nobody writes any more."""


class LocalStorage:
    """Files below a folder. Temporary files end with `.partial`; a kill may leave one, `clean` removes them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def put(self, key: str, data: Bytes) -> None:
        with _Temporary(self.root / key) as temporary:
            _write_all(temporary.descriptor, memoryview(data))
            temporary.publish(os.replace)

    def put_if_absent(self, key: str, pieces: Sequence[Bytes]) -> bool:
        path = self.root / key
        if path.exists():
            return False
        self._make_folder(path.parent)
        with _Temporary(path) as temporary:
            for piece in pieces:
                _write_all(temporary.descriptor, memoryview(piece))
            os.fsync(temporary.descriptor)
            try:
                temporary.publish(os.link)
            except FileExistsError:
                return False
        fsync_folder(path.parent)
        return True

    def list(self, folder: str) -> Iterator[str]:
        try:
            names = os.listdir(self.root / folder)
        except FileNotFoundError:
            return
        for name in names:
            if not name.endswith(".partial"):
                yield f"{folder}/{name}"

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def size(self, key: str) -> int | None:
        try:
            return (self.root / key).stat().st_size
        except FileNotFoundError:
            return None

    def clean(self) -> None:
        """Removes temporary files, of whoever they are: only when nobody writes any more."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                if name.startswith(".") and name.endswith(".partial"):
                    (Path(folder) / name).unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        """Makes a folder and what is missing above it, each name durable."""
        if folder.is_dir():
            return
        if folder != self.root:
            self._make_folder(folder.parent)
        folder.mkdir(parents=True, exist_ok=True)
        fsync_file(folder.parent)


class _Temporary:
    """A temporary file beside `path` that is gone at the end, whatever happens."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> "_Temporary":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.descriptor, self._name = tempfile.mkstemp(
            prefix=f".{self._path.name}.", suffix=".partial", dir=self._path.parent
        )
        # mkstemp makes files private; give them the permissions that open() would.
        os.fchmod(self.descriptor, 0o666 & ~_UMASK)
        return self

    def publish(self, operation: Callable[[str, Path], None]) -> None:
        operation(self._name, self._path)

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)
        Path(self._name).unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask, which POSIX can only tell by setting it (of all threads: so once, at import)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()


def _write_all(descriptor: int, data: memoryview) -> None:
    data = data.cast("B") if data.nbytes else data
    while data.nbytes:
        data = data[os.write(descriptor, data) :]
