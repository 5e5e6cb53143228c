"""Where a store is: a folder, or a URL of an object store that reads like a folder.

`ActivationStore.open("s3://bucket/prefix")`, or with options
`ActivationStore.open(place("s3://bucket/prefix", ObjectStorageOptions(cache_bytes=10**11)))`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from activation_store.files import LocalFile, OpenFile
from activation_store.object_storage import ObjectStorage, ObjectStorageOptions, is_url


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
        """Whether there is such an object, or one right below."""
        return (bool(self.key) and self.is_file()) or next(self.storage.list(self.key), None) is not None

    def read_bytes(self) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        return self.storage.get(self.key)

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
