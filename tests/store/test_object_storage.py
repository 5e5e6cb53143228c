"""Object stores over a socket, with a proxy before them that fails: moto's S3 server, a GCS, an Azure."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from activation_store.file_cache import BLOCK_BYTES, cached_bytes
from activation_store.object_storage import ObjectStorage, ObjectStorageOptions, is_url
from activation_store.retries import Retries, StorageError
from tests.store import azure
from tests.store.gcs import gcs_before, service_account
from tests.store.s3 import BUCKET, Proxy, proxy_to, s3_server

QUICK = Retries(seconds=20.0, first_pause=0.01, longest_pause=0.2)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def proxy(endpoint: str) -> Iterator[Proxy]:
    with proxy_to(endpoint) as made:
        yield made


@pytest.fixture(scope="module")
def azurite() -> Iterator[str]:
    with azure.azure_server() as url:
        yield url


@dataclass(frozen=True)
class Cloud:
    """A server of one of the kinds, behind a proxy."""

    scheme: str
    proxy: Proxy

    def at(self, prefix: str, *, cache: Path | None = None, retries: Retries = QUICK) -> ObjectStorage:
        """A folder of its own below `BUCKET`, which S3's and GCS's servers share."""
        there = f"{self.scheme}/{prefix}"
        return storage(self.proxy.endpoint, there, scheme=self.scheme, cache=cache, retries=retries)

    def settings(self) -> tuple[str, str]:
        """The environment variable that leads there, and its value."""
        names = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}
        (value,) = address(self.scheme, self.proxy.endpoint).values()
        return names[self.scheme], value


_AZURE = pytest.param("az", marks=pytest.mark.skipif(azure.PROGRAM is None, reason="no azurite-blob on the PATH"))


@pytest.fixture(params=["s3", "gs", _AZURE])
def cloud(request: pytest.FixtureRequest, endpoint: str) -> Iterator[Cloud]:
    """Each kind of object store in turn."""
    with ExitStack() as stack:
        if request.param == "gs":
            proxy = stack.enter_context(gcs_before(endpoint))
        else:
            server = request.getfixturevalue("azurite") if request.param == "az" else endpoint
            proxy = stack.enter_context(proxy_to(server))
        yield Cloud(request.param, proxy)


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", service_account())
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", azure.ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", azure.KEY)


def address(scheme: str, endpoint: str) -> dict[str, str]:
    """The option that leads to a server."""
    if scheme == "gs":
        return {"base_url": endpoint}
    return {"endpoint": f"{endpoint}/{azure.ACCOUNT}" if scheme == "az" else endpoint}


def storage(
    endpoint: str, prefix: str, *, scheme: str = "s3", cache: Path | None = None, cache_bytes: int = 1 << 30,
    retries: Retries = QUICK, max_requests: int = 16,
) -> ObjectStorage:  # fmt: skip
    options = ObjectStorageOptions(
        options=address(scheme, endpoint),
        cache_bytes=cache_bytes if cache is not None else 0,
        cache_dir=str(cache or ""),
        retries=retries,
        max_requests=max_requests,
    )
    return ObjectStorage(f"{scheme}://{BUCKET}/{prefix}", options)


def pieces_of(buffer: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Consecutive parts of a buffer as addresses."""
    starts = buffer.ctypes.data + np.cumsum([0, *sizes[:-1]])
    return np.stack([starts, sizes], axis=1).astype(np.uint64)


def test_objects_come_back(cloud: Cloud) -> None:
    at = cloud.at("round/trip")
    assert at.size("a/b") is None
    assert list(at.list("a")) == []
    assert at.put_if_absent("a/b", [b"one", memoryview(b"two"), np.arange(3, dtype=np.uint8).data])
    assert at.get("a/b") == b"onetwo\0\1\2"
    assert not at.put_if_absent("a/b", [b"another"])
    assert at.size("a/b") == 9
    at.put("a/b", b"replaced")
    at.put("a/c/d", b"deeper")
    assert at.get("a/b") == b"replaced"
    assert list(at.list("a")) == ["a/b"]
    assert sorted(at.children("a")) == ["a/b", "a/c"]
    assert sorted(at.sizes("a")) == [("a/b", 8), ("a/c/d", 6)]
    assert list(at.below("a/c").list_all("")) == ["d"]
    at.delete("a/b")
    at.delete("a/b")
    with pytest.raises(FileNotFoundError):
        at.get("a/b")
    with pytest.raises(FileNotFoundError):
        at.open("a/b")
    assert is_url(at.url)
    assert not is_url("/s3:/bucket")


@pytest.mark.parametrize("cached", [True, False])
def test_parts_are_read(cloud: Cloud, tmp_path: Path, cached: bool) -> None:
    at = cloud.at(f"parts{cached}", cache=tmp_path if cached else None)
    data = np.random.default_rng(0).integers(0, 256, 5 * BLOCK_BYTES + 17, dtype=np.uint8)
    at.put("x", data.data)
    file = at.open("x")
    assert file.size == len(data)
    rng = np.random.default_rng(1)
    for _ in range(20):
        start, stop = sorted(rng.integers(0, len(data), 2).tolist())
        assert file.read(start, stop - start) == data[start:stop].tobytes()
        out = np.zeros(stop - start, dtype=np.uint8)
        cut = (stop - start) // 3
        assert file.read_pieces(pieces_of(out, [cut, len(out) - cut]), start)
        assert np.array_equal(out, data[start:stop])
    assert file.read(len(data) - 5, 100) == data[-5:].tobytes()
    assert not file.read_pieces(pieces_of(np.zeros(6, dtype=np.uint8), [6]), len(data) - 5)


def test_of_many_who_create_one_wins(cloud: Cloud) -> None:
    at = [cloud.at("race") for _ in range(8)]
    for number in range(5):
        barrier = threading.Barrier(len(at))

        def create(i: int, key: str = f"commits/{number}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return at[i].put_if_absent(key, [f"writer {i}".encode() * 1000])

        with ThreadPoolExecutor(len(at)) as pool:
            won = list(pool.map(create, range(len(at))))
        assert sum(won) == 1
        assert at[0].get(f"commits/{number}") == f"writer {won.index(True)}".encode() * 1000


def test_large_objects_go_up_in_parts(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are lost on the way are sent again; the object is there whole, or what was there before."""
    # The least that a server takes.
    monkeypatch.setattr("activation_store.object_storage._PART_BYTES", 5 << 20)
    at, data = cloud.at("large"), np.random.default_rng(0).bytes(11 << 20)
    pieces = [data[: 4 << 20], memoryview(data)[4 << 20 : 9 << 20], data[9 << 20 :]]
    faults = ["503", "drop", "", "503", "lose"]
    cloud.proxy.fault = lambda method, number: faults.pop(0) if faults and method in ("PUT", "POST") else ""
    at.put("x", b"before")
    at.put_stream("x", pieces)
    assert (faults, at.size("x")) == ([], len(data))
    assert at.get("x") == data
    assert max(size for _, _, size in cloud.proxy.answered) == len(data)


def test_one_request_in_ten_fails(cloud: Cloud) -> None:
    proxy = cloud.proxy
    rng = np.random.default_rng(0)
    draws = rng.random(10_000)
    kinds = rng.integers(0, 3, 10_000)
    proxy.fault = lambda method, number: ("503", "drop", "lose")[kinds[number]] if draws[number] < 0.1 else ""
    at = cloud.at("faulty")
    values = {f"k/{i}": rng.bytes(int(rng.integers(1, 5000))) for i in range(40)}

    def create(item: tuple[str, bytes]) -> bool:
        return at.put_if_absent(item[0], [item[1]])

    with ThreadPoolExecutor(8) as pool:
        # A created object whose answer was lost is known again for one's own.
        assert all(pool.map(create, values.items()))
        assert list(pool.map(at.get, values)) == list(values.values())
        assert [at.open(key).read(0, 10) for key in values] == [value[:10] for value in values.values()]
    assert sorted(at.list("k")) == sorted(values)
    assert not any(at.put_if_absent(key, [b"late"]) for key in values)
    assert proxy.faults > 8


def test_a_server_that_goes_away_and_comes_back(proxy: Proxy) -> None:
    at = storage(proxy.endpoint, "away")
    at.put("x", b"there")
    back = time.monotonic() + 2.0
    proxy.fault = lambda method, number: "drop" if time.monotonic() < back else ""
    assert at.get("x") == b"there"
    assert time.monotonic() >= back
    assert proxy.faults > 3
    # By default it may be away for longer than ten seconds, from the first failure on.
    assert Retries().seconds > 10 + Retries().longest_pause


def test_a_server_that_stays_away_is_one_clear_line(proxy: Proxy) -> None:
    at = storage(proxy.endpoint, "gone", retries=Retries(seconds=0.3, first_pause=0.05))
    proxy.fault = lambda method, number: "503"
    with pytest.raises(StorageError, match=r"503 Service Unavailable.*tried [3-9] times in 0.3 s") as caught:
        at.get("x")
    assert "\n" not in str(caught.value)
    # What will not pass is not tried again.
    proxy.fault, proxy.number = lambda method, number: "", 0
    with pytest.raises(FileNotFoundError):
        at.get("x")
    assert proxy.number == 1


def test_requests_at_a_time_are_bounded(proxy: Proxy) -> None:
    proxy.delay = 0.02
    at = storage(proxy.endpoint, "bounded", max_requests=3)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda i: at.put_if_absent(f"k/{i}", [bytes(100)]), range(30)))
        list(pool.map(lambda i: at.get(f"k/{i}"), range(30)))
    assert proxy.most_at_once == 3


def test_what_is_in_the_cache_is_not_fetched_again(proxy: Proxy, tmp_path: Path) -> None:
    at = storage(proxy.endpoint, "again", cache=tmp_path)
    data = np.random.default_rng(0).integers(0, 256, 40 * BLOCK_BYTES, dtype=np.uint8)
    at.put("x", data.data)
    proxy.answered.clear()
    file = at.open("x")
    for _ in range(2):
        assert file.read(10 * BLOCK_BYTES + 1, 100) == data[10 * BLOCK_BYTES + 1 :][:100].tobytes()
        assert file.read(12 * BLOCK_BYTES - 50, 100) == data[12 * BLOCK_BYTES - 50 :][:100].tobytes()
    # Only the blocks that hold what was read, each once.
    assert sum(size for method, _, size in proxy.answered if method == "GET") == 3 * BLOCK_BYTES
    # Other content under the same name is another file.
    at.put("x", data[::-1].copy().data)
    assert at.open("x").read(0, 9) == data[::-1][:9].tobytes()


def test_the_cache_is_bounded_and_drops_the_oldest_first(proxy: Proxy, tmp_path: Path) -> None:
    bound, n = 20 * BLOCK_BYTES, 16
    at = storage(proxy.endpoint, "lru", cache=tmp_path, cache_bytes=bound)
    data = {f"k{i}": np.random.default_rng(i).bytes(4 * BLOCK_BYTES) for i in range(n)}
    for key, value in data.items():
        at.put(key, value)
    largest = 0
    for i in [0, *(i for j in range(1, n) for i in (j, 0))]:
        assert at.open(f"k{i}").read(0, 4 * BLOCK_BYTES) == data[f"k{i}"]
        largest = max(largest, cached_bytes(tmp_path / "objects"))
    # The byte for each block takes a page of its own.
    assert 10 * BLOCK_BYTES < largest <= bound + 5 * 4096
    gets = [path.rsplit("/", 1)[1] for method, path, _ in proxy.answered if method == "GET"]
    # k0 was read in between all others and stayed.
    assert gets.count("k0") == 1
    proxy.answered.clear()
    at.open("k1").read(0, 10)
    assert "GET" in [method for method, _, _ in proxy.answered]


def test_processes_share_a_cache(endpoint: str, tmp_path: Path) -> None:
    at = storage(endpoint, "shared")
    for i in range(6):
        at.put(f"k{i}", _content(i))
    context = get_context("spawn")
    workers = [context.Process(target=_read_at_random, args=(endpoint, tmp_path, seed)) for seed in range(2)]
    for worker in workers:
        worker.start()
    _read_at_random(endpoint, tmp_path, 2)
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    # Each process may be fetching one part when room is made.
    assert cached_bytes(tmp_path / "objects") <= _SHARED_BYTES + 3 * 4 * BLOCK_BYTES


_SHARED_BYTES = 16 * BLOCK_BYTES


def _content(i: int) -> bytes:
    return np.random.default_rng(i).bytes(8 * BLOCK_BYTES + i)


def _read_at_random(endpoint: str, cache: Path, seed: int) -> None:
    rng, content = np.random.default_rng(seed), {i: _content(i) for i in range(6)}
    at = storage(endpoint, "shared", cache=cache, cache_bytes=_SHARED_BYTES)
    for _ in range(80):
        i = int(rng.integers(6))
        start = int(rng.integers(len(content[i]) - 100))
        length = int(rng.integers(1, 3 * BLOCK_BYTES))
        assert at.open(f"k{i}").read(start, length) == content[i][start : start + length]
