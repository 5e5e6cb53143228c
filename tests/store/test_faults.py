"""What may befall a store, really done to it: kills, full disks, a server that goes away, clocks that jump."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from activation_store.config import StoreConfig
from activation_store.errors import UserError
from activation_store.harvest import harvest
from activation_store.manifest import read_commits
from activation_store.places import store_place
from activation_store.shuffle import ShuffledBatches
from activation_store.store import ActivationStore
from activation_store.verify import verify_store
from tests.store.harvesting import Configs, harvest_in_child, in_child
from tests.store.making import manifest, random_rows, write_store
from tests.store.s3 import BUCKET, Proxy, proxy_to
from tests.store.test_harvest import changed, configs, folder, wait_for
from tests.store.test_object_storage import credentials, endpoint, proxy, storage
from tests.store.test_remote_store import upload
from tests.store.test_shards import tree
from tests.store.test_workers import slowly

__all__ = ["configs", "credentials", "endpoint", "folder", "proxy"]


def reach(endpoint: str, url: str, cache: Path | None = None, cache_bytes: int = 1 << 30) -> StoreConfig:
    return StoreConfig(
        path=url,
        remote_options={"endpoint": endpoint},
        remote_cache_bytes=cache_bytes if cache else 0,
        remote_cache_dir=str(cache or ""),
    )


def medium_store(folder: Path) -> ActivationStore:
    """1,600 rows of 4 layers in 8 shards of each array."""
    begun = manifest(n_layers=4, d_model=64, chunk_rows=64, shard_rows=256)
    return write_store(folder, begun, [random_rows(800, begun, seed) for seed in range(2)], pieces=800)


def open_batches(store: ActivationStore, start: int = 0) -> ShuffledBatches:
    return ShuffledBatches(store, batch_size_tokens=64, pool_rows=256, threads=4, start_batch=start, prefetch_bytes=0)


def few_shards(configs: Configs) -> Configs:
    """A window is a shard of each array: a server of one's own takes its time for each request."""
    return slowly(configs, shard_rows=144, tokens=700)


def check_batches(theirs: ActivationStore, ours: ActivationStore, count: int, start: int = 0) -> None:
    with open_batches(theirs, start) as remote, open_batches(ours, start) as local:
        for mine, other in zip(islice(remote, count), local, strict=False):
            assert torch.equal(mine.rows, other.rows)
            assert torch.equal(mine.mlp_in, other.mlp_in)
            assert torch.equal(mine.mlp_out, other.mlp_out)


def read_and_count(config: StoreConfig, start: int, counter: Path) -> None:
    """Reads batches until it is killed, and writes after each which one comes next."""
    with open_batches(ActivationStore.open(store_place(config)), start) as batches:
        for number, batch in enumerate(batches, start=start + 1):
            assert torch.isfinite(batch.mlp_in).all()
            counter.write_text(str(number))


def test_readers_killed_at_random_harm_nothing(proxy: Proxy, tmp_path: Path) -> None:
    """They share a local cache, which they are filling, and emptying, when they are killed."""
    local = medium_store(tmp_path / "store")
    url = upload(tmp_path / "store", proxy.endpoint, "killed_readers")
    # An epoch of the store does not fit.
    config = reach(proxy.endpoint, url, tmp_path / "cache", cache_bytes=10 << 16)
    counter, rng, start = tmp_path / "next", np.random.default_rng(0), 0
    before = tree(tmp_path / "store")
    for _ in range(3):
        process = in_child(read_and_count, config, start, counter)
        counter.unlink(missing_ok=True)
        assert wait_for(counter.exists, process)
        time.sleep(rng.uniform(0.0, 0.15))
        assert process.is_alive()
        process.kill()
        process.join()
        start = int(counter.read_text() or start + 1)
    remote = ActivationStore.open(store_place(config))
    # What a reader that goes on gets, and all that the cache holds now.
    check_batches(remote, local, local.used.count // 64, start)
    assert tree(tmp_path / "store") == before
    assert verify_store(store_place(config)).ok


def test_harvests_into_a_url_killed_at_random(configs: Configs, proxy: Proxy) -> None:
    """Of a server that loses one request in ten: what is committed stays, and the end is that of one left alone."""
    local = few_shards(configs)
    draws = np.random.default_rng(4).random(100_000)
    proxy.fault = lambda method, number: ("503", "drop", "lose")[number % 3] if draws[number] < 0.1 else ""
    remote = reach(proxy.endpoint, f"s3://{BUCKET}/killed_harvests")
    asked = changed(local, store={"path": remote.path, "remote_options": remote.remote_options})
    there, rng = storage(proxy.endpoint, "killed_harvests"), np.random.default_rng(5)
    commits: list[int] = []
    for number in range(2):
        process = harvest_in_child(asked)
        assert wait_for(lambda: len(list(there.list("commits"))) > (commits[-1] if commits else 0), process) or number
        time.sleep(rng.uniform(0.0, 0.2))
        process.kill()
        process.join()
        assert verify_store(store_place(asked[2])).ok
        commits.append(len(list(read_commits(store_place(asked[2])))))
        assert commits == sorted(commits)
    harvest(*asked, device="cpu")
    harvest(*local, device="cpu")
    assert proxy.faults > 10
    assert commits[0] < len(list(read_commits(Path(local[2].path))))
    same_files(there, Path(local[2].path))


def same_files(there: object, local: Path) -> None:
    """The objects are the files, but for the paths that manifests name."""
    files = tree(local)
    assert set(there.list_all("")) == set(files)
    for key, data in files.items():
        if not key.endswith("manifest.json"):
            assert there.get(key) == data, key


def test_a_server_that_is_away_for_ten_seconds(configs: Configs, endpoint: str, tmp_path: Path) -> None:
    """Its socket is closed, while a harvest writes to it and a reader reads from it: both go on when it is back."""
    local = few_shards(configs)
    source = medium_store(tmp_path / "store")
    url = upload(tmp_path / "store", endpoint, "away_read")
    with proxy_to(endpoint) as proxy:
        asked = changed(
            local,
            store={"path": f"s3://{BUCKET}/away_written", "remote_options": {"endpoint": proxy.endpoint}},
        )
        remote = ActivationStore.open(store_place(reach(proxy.endpoint, url)))
        there = storage(endpoint, "away_written")
        with open_batches(remote) as ours, open_batches(source) as theirs:
            assert torch.equal(next(ours).mlp_in, next(theirs).mlp_in)
            process = harvest_in_child(asked)
            assert wait_for(lambda: next(there.list("commits"), None) is not None, process)
            proxy.stop()
            gone = time.monotonic()
            back = Thread(target=lambda: (time.sleep(10.0), proxy.start()))
            back.start()
            # More than what is read ahead.
            for mine, other in zip(islice(ours, 20), theirs, strict=False):
                assert torch.equal(mine.mlp_in, other.mlp_in)
            assert time.monotonic() - gone > 10.0
            back.join()
        process.join()
        assert process.exitcode == 0
    harvest(*local, device="cpu")
    same_files(there, Path(local[2].path))


def test_two_configs_started_at_once_into_one_store(configs: Configs, folder: Path) -> None:
    """Both see an empty folder: one fills it, the other says in one line what differs."""
    first = slowly(configs, claim_seconds=1.0)
    second = changed(first, text={"seed": 5})
    logs = [folder / "first", folder / "second"]
    workers = [harvest_in_child(asked, stderr=log) for asked, log in zip((first, second), logs, strict=True)]
    for worker in workers:
        worker.join()
    assert sorted(worker.exitcode or 0 for worker in workers) == [0, 2]
    loser = next(i for i, worker in enumerate(workers) if worker.exitcode == 2)
    last = logs[loser].read_text().splitlines()[-1]
    assert "made with another config (text.seed: " in last
    winner = (first, second)[1 - loser]
    alone = changed(winner, store={"path": configs[2].path + "_alone"})
    harvest(*alone, device="cpu")
    assert tree(Path(winner[2].path)) == tree(Path(alone[2].path))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small disk: mounting a tmpfs needs root ({mounted.stderr.decode().strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_cache_disk_is_said_and_reading_goes_on(
    endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = medium_store(tmp_path / "store")
    url = upload(tmp_path / "store", endpoint, "full_cache")
    with small_disk(tmp_path / "disk", "300k") as disk:
        remote = ActivationStore.open(store_place(reach(endpoint, url, disk)))
        check_batches(remote, local, local.used.count // 64)
        said = [line for line in capsys.readouterr().err.splitlines() if "cache" in line]
        assert len(said) == 1
        assert "No space left on device; reading goes on without it" in said[0]


def test_a_full_scratch_disk_is_one_line(configs: Configs, tmp_path: Path) -> None:
    """Room for one window of two: a hole in a mapped file that finds none would end the process without a word."""
    with small_disk(tmp_path / "disk", "60k") as disk:
        asked = changed(configs, store={"scratch": str(disk), "held_out_tokens": 0})
        with pytest.raises(UserError, match=r"store.scratch=.* has no room for a window .*No space left") as caught:
            harvest(*asked, device="cpu")
        assert "\n" not in str(caught.value)
    store = Path(asked[2].path)
    assert verify_store(store).ok
    harvest(*changed(asked, store={"scratch": ""}), device="cpu")
    assert ActivationStore.open(store).n_rows >= 1500


JUMPING_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long jump(void) {
    static __thread unsigned seed = 7;
    return (long)(rand_r(&seed) % 2000000) - 1000000;
}
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, at);
    if (id == CLOCK_REALTIME) at->tv_sec += jump();
    return result;
}
time_t time(time_t *out) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    if (out) *out = at.tv_sec;
    return at.tv_sec;
}
int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    out->tv_sec = at.tv_sec;
    out->tv_usec = at.tv_nsec / 1000;
    return 0;
}
"""
WITH_JUMPS = """
import pickle, sys, time
times = [time.time() for _ in range(50)]
assert max(times) - min(times) > 1e5, "the clock does not jump"
from activation_store.harvest import harvest
harvest(*pickle.loads(bytes.fromhex(sys.argv[1])), device="cpu")
"""


def test_a_clock_that_jumps_by_days(configs: Configs, tmp_path: Path) -> None:
    """libc's clock itself, in one of two workers, forwards and backwards at every look."""
    import pickle

    (tmp_path / "clock.c").write_text(JUMPING_CLOCK)
    library = tmp_path / "clock.so"
    try:
        compile_ = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(tmp_path / "clock.c"), "-ldl"]
        subprocess.run(compile_, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no C compiler to make a clock with: {error}")
    asked = slowly(configs, claim_seconds=1.0)
    words = [sys.executable, "-c", WITH_JUMPS, pickle.dumps(asked).hex()]
    jumping = subprocess.Popen(words, env=os.environ | {"LD_PRELOAD": str(library)}, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not Path(asked[2].path, "commits").exists() and jumping.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    steady = harvest_in_child(asked)
    said = jumping.communicate()[1]
    steady.join()
    assert (jumping.returncode, steady.exitcode) == (0, 0), said
    alone = changed(asked, store={"path": configs[2].path + "_alone"})
    harvest(*alone, device="cpu")
    assert tree(Path(asked[2].path)) == tree(Path(alone[2].path))
