"""Object stores over a socket: moto's S3 server, with a proxy before it that fails."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from activation_store.errors import UserError
from activation_store.file_cache import BLOCK_BYTES, cached_bytes
from activation_store.object_storage import ObjectStorage, ObjectStorageOptions, is_url
from activation_store.retries import Retries, StorageError
from tests.store.s3 import BUCKET, Proxy, post, proxy_to, s3_server

QUICK = Retries(seconds=20.0, first_pause=0.01, longest_pause=0.2)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def proxy(endpoint: str) -> Iterator[Proxy]:
    with proxy_to(endpoint) as made:
        yield made


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def storage(
    endpoint: str, prefix: str, *, cache: Path | None = None, cache_bytes: int = 1 << 30, retries: Retries = QUICK,
    max_requests: int = 16,
) -> ObjectStorage:  # fmt: skip
    options = ObjectStorageOptions(
        options={"endpoint": endpoint},
        cache_bytes=cache_bytes if cache is not None else 0,
        cache_dir=str(cache or ""),
        retries=retries,
        max_requests=max_requests,
    )
    return ObjectStorage(f"s3://{BUCKET}/{prefix}", options)


def pieces_of(buffer: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Consecutive parts of a buffer as addresses."""
    starts = buffer.ctypes.data + np.cumsum([0, *sizes[:-1]])
    return np.stack([starts, sizes], axis=1).astype(np.uint64)


def test_objects_come_back(endpoint: str) -> None:
    at = storage(endpoint, "round/trip")
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
    at.delete("a/b")
    at.delete("a/b")
    with pytest.raises(FileNotFoundError):
        at.get("a/b")
    with pytest.raises(FileNotFoundError):
        at.open("a/b")
    assert is_url(at.url)
    assert not is_url("/s3:/bucket")


@pytest.mark.parametrize("cached", [True, False])
def test_parts_are_read(endpoint: str, tmp_path: Path, cached: bool) -> None:
    at = storage(endpoint, f"parts{cached}", cache=tmp_path if cached else None)
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


def test_of_many_who_create_one_wins(endpoint: str) -> None:
    at = [storage(endpoint, "race") for _ in range(8)]
    for number in range(5):
        barrier = threading.Barrier(len(at))

        def create(i: int, key: str = f"commits/{number}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return at[i].put_if_absent(key, [f"writer {i}".encode() * 1000])

        with ThreadPoolExecutor(len(at)) as pool:
            won = list(pool.map(create, range(len(at))))
        assert sum(won) == 1
        assert at[0].get(f"commits/{number}") == f"writer {won.index(True)}".encode() * 1000


def test_credentials_that_are_missing_or_wrong_are_one_clear_line(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no such bucket") as caught:
        ObjectStorage("s3://nobody", ObjectStorageOptions(options={"endpoint": endpoint}, cache_bytes=0)).get("x")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="endpoit"):
        ObjectStorage("s3://bucket", ObjectStorageOptions(options={"endpoit": endpoint}, cache_bytes=0))
    with pytest.raises(UserError, match="secret_access_key is a secret"):
        ObjectStorage("s3://bucket", ObjectStorageOptions(options={"secret_access_key": "x"}, cache_bytes=0))
    with pytest.raises(UserError, match="give s3://BUCKET"):
        ObjectStorage("nonsense://bucket", ObjectStorageOptions(cache_bytes=0))
    post(f"{endpoint}/moto-api/reset-auth", b"0")
    try:
        with pytest.raises(UserError, match="refused these credentials") as caught:
            storage(endpoint, "wrong").put_if_absent("x", [b"x"])
    finally:
        post(f"{endpoint}/moto-api/reset-auth", b"inf")
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, both"):
        storage(endpoint, "half")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    # Where a machine of the cloud would be asked for its own: nobody answers here.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="no credentials; set AWS_ACCESS_KEY_ID") as caught:
        storage(endpoint, "none").get("x")
    assert "\n" not in str(caught.value)


def test_one_request_in_ten_fails(proxy: Proxy) -> None:
    rng = np.random.default_rng(0)
    draws = rng.random(10_000)
    kinds = rng.integers(0, 3, 10_000)
    proxy.fault = lambda method, number: ("503", "drop", "lose")[kinds[number]] if draws[number] < 0.1 else ""
    at = storage(proxy.endpoint, "faulty")
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
