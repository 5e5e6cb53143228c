"""A store on an object store: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, through obstore.

Credentials and endpoint come from the environment variables that other tools use (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL; GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME; ...). A
commit is a conditional PUT (`If-None-Match: *`; on GCS `x-goog-if-generation-match: 0`). Objects are uploaded whole,
read by ranges.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import from_url

from activation_store.errors import UserError
from activation_store.file_cache import CachedFile, FileCache
from activation_store.files import Pieces, copy_to_pieces, read_descriptor
from activation_store.object_errors import check_options, connect_error, endpoints, request_error
from activation_store.retries import Retries, StorageError, TransientError
from activation_store.storage import Bytes

T = TypeVar("T")
# One request reads at most so much: a dropped connection loses no more.
REQUEST_BYTES = 1 << 25
# Of a large upload; S3 takes at most 10,000 parts.
_PART_BYTES = 1 << 26
_PART_RETRIES = 10
_CLIENT_OPTIONS = {
    # Without a byte for so long, a connection counts as dropped; a large upload may take its time.
    "read_timeout": "30s",
    "connect_timeout": "5s",
    "timeout": "3600s",
}


def is_url(place: object) -> bool:
    """Whether a `store.path` names an object store."""
    return isinstance(place, str) and "://" in place


@dataclass(frozen=True, kw_only=True)
class ObjectStorageOptions:
    """How to reach an object store. `options`: obstore's configuration (endpoint, region, ...), no secrets."""

    options: dict[str, str] = field(default_factory=dict)
    # Of the local copies of what was read; 0: none.
    cache_bytes: int = 10_000_000_000
    # Empty: $LAYERLOOM_CACHE or ~/.cache/layerloom.
    cache_dir: str = ""
    retries: Retries = field(default_factory=Retries)
    # Requests at a time of one process.
    max_requests: int = 16

    def cache(self) -> FileCache | None:
        """The local cache, made if need be."""
        if self.cache_bytes <= 0:
            return None
        root = self.cache_dir or os.environ.get("LAYERLOOM_CACHE") or "~/.cache/layerloom"
        folder = Path(root).expanduser() / "objects"
        try:
            return FileCache(folder, self.cache_bytes)
        except OSError as error:
            raise UserError(
                f"the cache folder {folder} cannot be made ({error.strerror}); give another store.remote_cache_dir, or "
                "store.remote_cache_bytes=0 for no cache"
            ) from error


class ObjectStorage:
    """Objects below a URL: `activation_store.storage.Storage`. Any number of threads may use it.

    What fails for a passing reason (5xx, too many requests, a dropped connection) is tried again. Raises StorageError
    when that did not help, UserError for credentials, a bucket or an option that is wrong.
    """

    def __init__(self, url: str, options: ObjectStorageOptions | None = None) -> None:
        """Does not talk to the server. Raises UserError."""
        self.url = url.rstrip("/")
        options = self._options = options or ObjectStorageOptions()
        self._retries, self._cache = options.retries, options.cache()
        self._store = _connect(self.url, options.options)
        self._slots = threading.BoundedSemaphore(options.max_requests)
        # Whether a request has succeeded: what credentials there are have served.
        self._answered = threading.Event()

    def __str__(self) -> str:
        return self.url

    def below(self, folder: str) -> "ObjectStorage":
        """The objects whose keys begin with `folder/`, without that; both share the bound on requests."""
        if not folder:
            return self
        inner = ObjectStorage(f"{self.url}/{folder}", self._options)
        inner._slots, inner._answered = self._slots, self._answered
        return inner

    def get(self, key: str) -> bytes:
        """The whole object, in one request."""
        return self._request(key, lambda _: bytes(obstore.get(self._store, key).bytes()))

    def put(self, key: str, data: Bytes) -> None:
        """One request. What was acknowledged is durable."""
        self._request(key, lambda _: obstore.put(self._store, key, data, use_multipart=False))

    def put_stream(self, key: str, pieces: Iterable[Bytes]) -> None:
        """An object of any size from pieces that are asked for as they are sent; once more for each further attempt.

        It appears whole, when all were sent (a multipart upload). What was acknowledged is durable.
        """

        def upload(_: int) -> None:
            obstore.put(uploads, key, iter(pieces), use_multipart=True, chunk_size=_PART_BYTES, max_concurrency=2)

        # A part that fails is sent again by obstore, for nothing depends on whether it was there; only when that does
        # not help, all of them.
        uploads = _connect(self.url, self._options.options, max_retries=_PART_RETRIES)

        self._request(key, upload)

    def put_if_absent(self, key: str, pieces: Sequence[Bytes]) -> bool:
        """One conditional request, of at most 5 GB on S3."""

        def create(attempt: int) -> bool:
            try:
                obstore.put(self._store, key, list(pieces), mode="create", use_multipart=False)
            except AlreadyExistsError:
                # An attempt whose answer was lost may have succeeded.
                return attempt > 0 and bytes(obstore.get(self._store, key).bytes()) == b"".join(pieces)
            return True

        return self._request(key, create)

    def list(self, folder: str) -> Iterator[str]:
        """All that was created before is there: object stores list consistently."""
        found = self._request(folder, lambda _: obstore.list_with_delimiter(self._store, folder))
        return iter([item["path"] for item in found["objects"]])

    def children(self, folder: str) -> Sequence[str]:
        """What is right below `folder`: keys of objects, and beginnings of keys of those that are deeper."""
        found = self._request(folder, lambda _: obstore.list_with_delimiter(self._store, folder or None))
        return [*(item["path"] for item in found["objects"]), *found["common_prefixes"]]

    def list_all(self, folder: str) -> Iterator[str]:
        """Keys of all objects below `folder`, however deep."""
        return (key for key, _ in self.sizes(folder))

    def sizes(self, folder: str) -> Iterator[tuple[str, int]]:
        """Keys and bytes of all objects below `folder`, however deep."""
        found = self._request(folder, lambda _: obstore.list(self._store, folder or None).collect())
        return iter([(item["path"], int(item["size"])) for item in found])

    def delete(self, key: str) -> None:
        """One request."""
        try:
            self._request(key, lambda _: obstore.delete(self._store, key))
        except FileNotFoundError:
            return

    def size(self, key: str) -> int | None:
        """By a HEAD request."""
        try:
            return int(self._request(key, lambda _: obstore.head(self._store, key))["size"])
        except FileNotFoundError:
            return None

    def clean(self) -> None:
        """Nothing to do: an object is there whole or not at all."""

    def open(self, key: str) -> "ObjectFile":
        """An object to read parts of. Raises FileNotFoundError."""
        meta = self._request(key, lambda _: obstore.head(self._store, key))
        cached = None
        if self._cache is not None:
            name = f"{self.url}/{key} {meta['e_tag'] or meta['last_modified']}"
            cached = self._cache.file(name, int(meta["size"]))
        return ObjectFile(self, key, int(meta["size"]), self._cache, cached)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object that has them, in requests of bounded size."""
        parts = []
        for first in range(start, stop, REQUEST_BYTES):
            last = min(stop, first + REQUEST_BYTES)
            parts.append(self._request(key, partial(self._range, key, first, last)))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _range(self, key: str, start: int, stop: int, _attempt: int) -> bytes:
        data = bytes(obstore.get_range(self._store, key, start=start, end=stop))
        if len(data) != stop - start:
            raise TransientError(f"{self.url}/{key}: {len(data)} bytes came of {stop - start}")
        return data

    def _request(self, key: str, request: Callable[[int], T]) -> T:
        """Makes a request, one of `max_requests` at a time, and says what went wrong in one line."""

        def attempt(number: int) -> T:
            with self._slots:
                try:
                    answer = request(number)
                except (BaseError, FileNotFoundError) as error:
                    failure = request_error(self.url, key, error, answered=self._answered.is_set())
                    if failure is error:
                        raise
                    raise failure from error
                self._answered.set()
                return answer

        return self._retries.run(attempt)


class ObjectFile:
    """An object of which parts are read, by way of the cache if there is one: `activation_store.files.OpenFile`."""

    # The cache may have any part, or none.
    descriptor = None

    def __init__(
        self, storage: ObjectStorage, key: str, size: int, cache: FileCache | None, cached: CachedFile | None
    ) -> None:
        self._storage, self._key, self.size = storage, key, size
        self._cache, self._cached = cache, cached

    def read(self, offset: int, length: int) -> bytes:
        stop = min(self.size, offset + length)
        if stop <= offset:
            return b""
        found = self._from_cache(offset, stop, lambda descriptor: os.pread(descriptor, stop - offset, offset))
        return self._fetch(offset, stop) if found is None else found

    def read_pieces(self, pieces: Pieces, offset: int) -> bool:
        length = int(pieces[:, 1].sum())
        if offset + length > self.size:
            return False
        stop = offset + length
        found = self._from_cache(offset, stop, lambda descriptor: read_descriptor(descriptor, pieces, offset))
        if found is None:
            copy_to_pieces(np.frombuffer(self._fetch(offset, stop), dtype=np.uint8), 0, pieces)
        return found is not False

    def at_hand(self, offset: int) -> bool:
        """Says so, for a hint would do nothing: the threads that read fetch several parts at once."""
        return True

    def hint(self, offset: int, length: int) -> None:
        """Does nothing."""

    def _from_cache(self, start: int, stop: int, read: Callable[[int], T]) -> T | None:
        """What `read` makes of the local copy, which has these bytes then; None if they are not to be kept there."""
        if self._cache is None or self._cached is None or not self._cache.holds(stop - start):
            return None
        try:
            with self._cache.filled(self._cached, start, stop - start, self._fetch) as descriptor:
                return read(descriptor)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            # The local disk's fault, not the server's: without the cache all is still to be had.
            self._cache.give_up(error)
            return None

    def _fetch(self, start: int, stop: int) -> bytes:
        return self._storage.read_range(self._key, start, stop)


def _connect(url: str, options: dict[str, str], *, max_retries: int = 0) -> Any:
    check_options(url, options)
    client: dict[str, Any] = dict(_CLIENT_OPTIONS)
    if any(endpoint.startswith("http://") for endpoint in endpoints(url, options)):
        client["allow_http"] = True
    # Other retries are ours: a conditional request may only be repeated by who knows what its answer then means.
    try:
        connect: Any = from_url
        return connect(url, config=options, client_options=client, retry_config={"max_retries": max_retries})
    except BaseError as error:
        raise connect_error(url, error) from error
