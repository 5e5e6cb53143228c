"""A store on an object store: read by URL as from its folder, and open to zarr-python there."""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import obstore.store
import pytest
import torch
import zarr
from zarr.storage import ObjectStore

from activation_store.config import Compression, StoreDtype
from activation_store.errors import UserError
from activation_store.harvest import harvest
from activation_store.info import store_info
from activation_store.object_storage import ObjectStorageOptions
from activation_store.places import Place, place
from activation_store.retries import Retries
from activation_store.shards import DamagedShardError
from activation_store.shuffle import ShuffledBatches
from activation_store.store import ActivationStore
from launch.main import main
from tests.job import Job
from tests.store.harvesting import Configs
from tests.store.making import manifest, random_rows, write_store
from tests.store.s3 import BUCKET, Proxy
from tests.store.test_harvest import changed, configs, folder
from tests.store.test_object_storage import (
    QUICK,
    Cloud,
    address,
    azurite,
    cloud,
    credentials,
    endpoint,
    proxy,
    storage,
)
from trainer.metrics import read_metrics

__all__ = ["azurite", "cloud", "configs", "credentials", "endpoint", "folder", "proxy"]


def at(url: str, endpoint: str, cache: Path | None = None, retries: Retries = QUICK) -> Place:
    options = ObjectStorageOptions(
        options={"endpoint": endpoint}, cache_bytes=1 << 30 if cache else 0, cache_dir=str(cache or ""), retries=retries
    )
    return place(url, options)


def upload(folder: Path, endpoint: str, prefix: str) -> str:
    to = storage(endpoint, prefix)
    paths = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: to.put(path.relative_to(folder).as_posix(), path.read_bytes()), paths))
    return f"s3://{BUCKET}/{prefix}"


@pytest.fixture(params=["plain", "int8", "lz4"])
def copied(request: pytest.FixtureRequest, tmp_path: Path, endpoint: str) -> tuple[ActivationStore, str]:
    """A store in a folder, and the URL of its copy."""
    kinds = {"plain": {}, "int8": {"dtype": StoreDtype.int8}, "lz4": {"compression": Compression.lz4}}
    begun = manifest(**kinds[request.param])
    local = write_store(
        tmp_path / "store", begun, [random_rows(n, begun, i, outliers=1) for i, n in enumerate((41, 30))]
    )
    return local, upload(tmp_path / "store", endpoint, f"store/{request.param}")


@pytest.mark.parametrize(
    ("copied", "cached"), [("plain", True), ("plain", False), ("int8", True), ("lz4", True)], indirect=["copied"]
)
def test_a_store_is_read_by_url_as_from_its_folder(
    copied: tuple[ActivationStore, str], endpoint: str, tmp_path: Path, cached: bool
) -> None:
    local, url = copied
    remote = ActivationStore.open(at(url, endpoint, tmp_path / "cache" if cached else None))
    for ours, theirs in ((remote[:], local[:]), (remote[17:55], local[17:55])):
        for name in ("mlp_in", "mlp_out", "token_ids", "document_ids", "positions"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert np.array_equal(remote.used_rows(), local.used_rows())
    assert remote.held_out() is None
    assert url in repr(remote)
    with (
        ShuffledBatches(remote, batch_size_tokens=8, pool_rows=16, threads=3) as ours,
        ShuffledBatches(local, batch_size_tokens=8, pool_rows=16) as theirs,
    ):
        for mine, other in zip(islice(ours, 9), theirs, strict=False):
            assert torch.equal(mine.rows, other.rows)
            assert torch.equal(mine.mlp_in, other.mlp_in)
            assert torch.equal(mine.mlp_out, other.mlp_out)


def test_zarr_opens_the_same_url(copied: tuple[ActivationStore, str], endpoint: str) -> None:
    local, url = copied
    server = obstore.store.from_url(url, config={"endpoint": endpoint}, client_options={"allow_http": True})
    group = zarr.open_group(ObjectStore(server, read_only=True), mode="r")
    there = zarr.open_group(str(local.path), mode="r")
    for name in [array.name for array in local.layout.arrays()]:
        assert np.array_equal(group[name][:], there[name][:])


def test_one_layer_reads_only_its_bytes(endpoint: str, proxy: Proxy, tmp_path: Path) -> None:
    begun = manifest(n_layers=4, d_model=64, chunk_rows=16, shard_rows=32)
    write_store(tmp_path / "store", begun, [random_rows(64, begun, 0)])
    store = ActivationStore.open(at(upload(tmp_path / "store", endpoint, "layer"), proxy.endpoint))
    proxy.answered.clear()
    store.read_rows(0, 16, layers=[2])
    sizes = [size for method, path, size in proxy.answered if method == "GET" and "/mlp_in/" in path]
    # The index of the shard's 8 chunks, and one chunk.
    assert sorted(sizes) == [8 * 16 + 4, 16 * 64 * 2]


@pytest.mark.parametrize("copied", ["plain"], indirect=True)
def test_a_faulty_server_changes_no_batch(copied: tuple[ActivationStore, str], proxy: Proxy) -> None:
    local, url = copied
    draws = np.random.default_rng(1).random(10_000)
    proxy.fault = lambda method, number: ("503", "drop")[number % 2] if draws[number] < 0.1 else ""
    remote = ActivationStore.open(at(url, proxy.endpoint))
    with (
        ShuffledBatches(remote, batch_size_tokens=8, pool_rows=16, threads=4) as ours,
        ShuffledBatches(local, batch_size_tokens=8, pool_rows=16) as theirs,
    ):
        for mine, other in zip(islice(ours, 2), theirs, strict=False):
            assert torch.equal(mine.rows, other.rows)
            assert torch.equal(mine.mlp_in, other.mlp_in)
    assert proxy.faults > 3


def test_what_is_wrong_with_a_remote_store_is_one_line(copied: tuple[ActivationStore, str], endpoint: str) -> None:
    _, url = copied
    with pytest.raises(UserError, match="nowhere does not exist") as caught:
        ActivationStore.open(at(f"s3://{BUCKET}/nowhere", endpoint))
    assert "\n" not in str(caught.value)
    storage(endpoint, url.removeprefix(f"s3://{BUCKET}/")).delete("mlp_in/c/1/0/0")
    store = ActivationStore.open(at(url, endpoint))
    with pytest.raises(DamagedShardError, match=rf"{url}/mlp_in/c/1/0/0 is damaged \(missing\)"):
        store.read_rows(0, store.n_rows)


def test_a_harvest_into_a_url_is_that_into_a_folder(
    configs: Configs, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(*cloud.settings())
    monkeypatch.setenv("LAYERLOOM_CACHE", str(tmp_path / "cache"))
    configs = changed(configs, store={"tokens": 300, "held_out_tokens": 40, "shard_rows": 288, "claim_seconds": 2.0})
    harvest(*configs, device="cpu")
    draws = np.random.default_rng(2).random(10_000)
    cloud.proxy.fault = lambda method, number: ("503", "drop", "lose")[number % 3] if draws[number] < 0.1 else ""
    there, local = cloud.at("harvested"), Path(configs[2].path)
    asked = changed(configs, store={"path": there.url})
    summary = harvest(*asked, device="cpu")
    assert cloud.proxy.faults > 3
    assert not summary.skipped
    assert harvest(*asked, device="cpu").skipped
    with pytest.raises(UserError, match=r"text.seed: 0 there, 1 asked for"):
        harvest(*changed(asked, text={"seed": 1}), device="cpu")
    files = {path.relative_to(local).as_posix(): path for path in local.rglob("*") if path.is_file()}
    assert set(there.list_all("")) == set(files)
    same = [key for key in files if not key.endswith("manifest.json")]
    with ThreadPoolExecutor(8) as pool:
        for key, data in zip(same, pool.map(there.get, same), strict=True):
            assert data == files[key].read_bytes(), key


def test_info_of_a_url(
    copied: tuple[ActivationStore, str], endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With nothing but the usual environment variables."""
    local, url = copied
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("LAYERLOOM_CACHE", str(tmp_path / "cache"))
    assert store_info(url) == store_info(local.path).replace(str(local.path), url)


def test_the_commands_take_urls(
    job: Job, cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """harvest, train and every verb of `store`, on a server that fails one request in twenty."""
    monkeypatch.chdir(tmp_path)
    url, draws = f"{cloud.scheme}://{BUCKET}/{cloud.scheme}/commands", np.random.default_rng(7).random(100_000)
    cloud.proxy.fault = lambda method, number: ("503", "drop", "lose")[number % 3] if draws[number] < 0.05 else ""
    ((option, server),) = address(cloud.scheme, cloud.proxy.endpoint).items()
    reach = [f"store.remote_options={{{option}: '{server}'}}", f"store.remote_cache_dir={tmp_path / 'cache'}"]
    words = [*job.words_with(store__path=url), *reach]
    assert main(["harvest", *words]) == 0
    assert main(["train", *words]) == 0
    # To the last bit what the folder gave.
    ours, theirs = (list(read_metrics(folder / "run/metrics.jsonl")) for folder in (tmp_path, job.folder))
    assert [record.get("loss") for record in ours] == [record.get("loss") for record in theirs]
    assert ours[-1]["eval"] == theirs[-1]["eval"]
    assert main(["store", "verify", url, *reach]) == 0
    cloud.at("commands").delete("mlp_out/c/0/0/0")
    capsys.readouterr()
    assert main(["store", "verify", url, *reach]) == 1
    assert f"damaged: {url}/mlp_out/c/0/0/0: missing" in capsys.readouterr().out
    assert main(["store", "repair", url, *reach, "device=cpu"]) == 0
    assert "1 window harvested again, all as they were" in capsys.readouterr().out
    assert main(["store", "merge", url, str(job.folder / "store"), f"output={url}_merged", *reach]) == 0
    assert main(["store", "info", f"{url}_merged", *reach]) == 0
    assert "2 sources, merged" in capsys.readouterr().out
    assert main(["store", "verify", f"{url}_merged", *reach]) == 0
    for made in (url, f"{url}_merged"):
        assert main(["store", "remove", made, "confirm=true", *reach]) == 0
    assert cloud.proxy.faults > 5
    assert not list(cloud.at("commands").list_all("")) + list(cloud.at("commands_merged").list_all(""))
