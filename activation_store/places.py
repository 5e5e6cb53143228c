"""Where a store is: a folder, or a URL of an object store that reads like a folder.

`ActivationStore.open("s3://bucket/prefix")`, or with options
`ActivationStore.open(place("s3://bucket/prefix", ObjectStorageOptions(cache_bytes=10**11)))`.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from activation_store.atomic import write_bytes
from activation_store.files import LocalFile, OpenFile
from activation_store.object_storage import ObjectStorage, ObjectStorageOptions, is_url
from activation_store.storage import LocalStorage, Storage


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A key below a URL, with those of pathlib's methods that a store needs. They raise OSError and UserError."""

    storage: ObjectStorage
    key: str = ""

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.storage, str(PurePosixPath(self.key) / name))

    def __str__(self) -> str:
        return f"{self.storage.url}/{self.key}" if self.key else self.storage.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return str(self).rsplit("/", 1)[-1]

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> "RemotePath":
        """One level up; the URL itself at the top."""
        above = str(PurePosixPath(self.key).parent)
        return RemotePath(self.storage, "" if above == "." else above)

    def is_file(self) -> bool:
        """Whether there is such an object."""
        return self.storage.size(self.key) is not None

    def exists(self) -> bool:
        """Whether there is such an object, or one below."""
        return (bool(self.key) and self.is_file()) or self.is_dir()

    def read_bytes(self) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        return self.storage.get(self.key)

    def is_dir(self) -> bool:
        """Whether there is an object below."""
        return next(self.storage.list_all(self.key), None) is not None

    def iterdir(self) -> Iterator["RemotePath"]:
        """What is right below: objects, and what has objects below."""
        depth = len(PurePosixPath(self.key).parts)
        names = {PurePosixPath(key).parts[depth] for key in self.storage.list_all(self.key)}
        return (self / name for name in sorted(names))

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Objects right below whose names match."""
        for key in self.storage.list(self.key):
            if fnmatch(key.rsplit("/", 1)[-1], pattern):
                yield RemotePath(self.storage, key)


Place = Path | RemotePath


def place(path: Place | str, options: ObjectStorageOptions | None = None) -> Place:
    """The place that a `store.path` names. Raises UserError for a URL or options that cannot be."""
    if isinstance(path, str) and is_url(path):
        return RemotePath(ObjectStorage(path, options))
    return Path(path) if isinstance(path, str) else path


def open_file(path: Place) -> OpenFile:
    """A file to read parts of. Raises FileNotFoundError."""
    return path.storage.open(path.key) if isinstance(path, RemotePath) else LocalFile(path)


def storage_at(folder: Place) -> Storage:
    """The objects below a place."""
    return folder.storage.below(folder.key) if isinstance(folder, RemotePath) else LocalStorage(folder)


def write_whole(path: Place, data: bytes) -> None:
    """Creates or replaces a file, durably; readers see the old or the new one."""
    if isinstance(path, RemotePath):
        path.storage.put(path.key, data)
    else:
        write_bytes(path, data)


def create_whole(path: Place, data: bytes) -> bool:
    """Creates a file, durably; False if there is one (it stays)."""
    return storage_at(path.parent).put_if_absent(path.name, [data])


def remove_all(path: Place) -> None:
    """Removes a file, or a folder with all that is in it; nothing happens if there is none."""
    if isinstance(path, RemotePath):
        for key in (path.key, *path.storage.list_all(path.key)):
            path.storage.delete(key)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
