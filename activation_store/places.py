"""Where a store is: a folder, or a URL of an object store that reads like a folder.

`ActivationStore.open("s3://bucket/prefix")`, or with options
`ActivationStore.open(place("s3://bucket/prefix", ObjectStorageOptions(cache_bytes=10**11)))`.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from activation_store.atomic import write_bytes
from activation_store.config import StoreConfig
from activation_store.files import LocalFile, OpenFile
from activation_store.object_storage import REQUEST_BYTES, ObjectStorage, ObjectStorageOptions, is_url
from activation_store.retries import Retries
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
        return bool(self.storage.children(self.key))

    def iterdir(self) -> Iterator["RemotePath"]:
        """What is right below: objects, and what has objects below."""
        return iter([RemotePath(self.storage, key) for key in sorted(self.storage.children(self.key))])

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


def store_place(config: StoreConfig, path: str = "") -> Place:
    """The place of `store.path` (or of another store, reached alike). Raises UserError."""
    options = ObjectStorageOptions(
        options=dict(config.remote_options),
        cache_bytes=config.remote_cache_bytes,
        cache_dir=config.remote_cache_dir,
        retries=Retries(seconds=config.remote_retry_seconds),
        max_requests=config.remote_requests,
    )
    return place(path or config.path, options)


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


def stored_bytes(folder: Place) -> int:
    """Bytes of all files below a place."""
    return sum(size for _, size in file_sizes(folder))


def file_sizes(folder: Place) -> Iterator[tuple[str, int]]:
    """Name and bytes of every file below a place, links not followed."""
    if isinstance(folder, RemotePath):
        yield from folder.storage.sizes(folder.key)
        return
    for where, _, names in os.walk(folder):
        for name in names:
            file = Path(where) / name
            yield file.relative_to(folder).as_posix(), file.lstat().st_size


def read_parts(file: Place, part_bytes: int = 1 << 22) -> Iterator[bytes]:
    """A whole file, some bytes at a time, from where it is: not from the cache. Raises FileNotFoundError."""
    if isinstance(file, RemotePath):
        size = file.storage.size(file.key)
        if size is None:
            raise FileNotFoundError(str(file))
        # Fewer and larger requests.
        step = max(part_bytes, REQUEST_BYTES)
        for start in range(0, size, step):
            yield file.storage.read_range(file.key, start, min(size, start + step))
        return
    with open(file, "rb", buffering=0) as stream:
        while data := stream.read(part_bytes):
            yield data


def remove_all(path: Place) -> None:
    """Removes a file, or a folder with all that is in it; nothing happens if there is none.

    Others may remove the same meanwhile. Raises OSError for what cannot be removed.
    """
    if isinstance(path, RemotePath):
        for key in (path.key, *path.storage.list_all(path.key)):
            path.storage.delete(key)
    elif path.is_dir() and not path.is_symlink():
        while path.exists():
            # Again where somebody else was quicker.
            with suppress(FileNotFoundError):
                shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
