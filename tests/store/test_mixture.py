"""Mixtures of texts: the weights are met, every document comes once, and its place is known without reading."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from activation_store.config import TextConfig, TextSource
from activation_store.errors import UserError
from activation_store.harvest import harvest
from activation_store.info import store_info
from activation_store.manifest import StoreManifest
from activation_store.mixture import MixtureOrder, cycle_quotas
from activation_store.repair import repair_store
from activation_store.store import ActivationStore
from activation_store.text import open_documents, stream_documents, text_fingerprint
from tests.store.harvesting import Configs
from tests.store.test_harvest import changed, configs, folder
from tests.store.test_shards import tree
from tests.tiny import tiny_text_folder

__all__ = ["configs", "folder"]


@pytest.mark.parametrize(
    ("weights", "counts"), [([1, 1], [7, 20]), ([0.7, 0.2, 0.1], [70, 3, 200]), ([5, 0.01], [30, 2]), ([2], [9])]
)
def test_every_document_comes_once_and_in_its_source_s_order(weights: list[float], counts: list[int | None]) -> None:
    order = MixtureOrder(weights, counts, seed=3)
    total = sum(count or 0 for count in counts)
    assert order.count == total
    assert order.place(total) is None
    seen: dict[int, list[int]] = {}
    for index in range(total):
        place = order.place(index)
        assert place is not None
        seen.setdefault(place[0], []).append(place[1])
    assert seen == {source: list(range(count or 0)) for source, count in enumerate(counts)}


def test_weights_are_met_at_every_length_and_depend_on_the_seed() -> None:
    weights = [0.62, 0.3, 0.08]
    orders = [MixtureOrder(weights, [None] * 3, seed=seed) for seed in (0, 1)]
    quotas = cycle_quotas(weights)
    assert quotas == [31, 15, 4]
    places = [[order.place(i) for i in range(5_000)] for order in orders]
    assert places[0] != places[1]
    for found in places:
        sources = np.array([place[0] for place in found if place is not None])
        for length in (100, 1_000, 5_000):
            shares = np.bincount(sources[:length], minlength=3) / length
            # Off by less than one cycle's documents.
            assert (abs(shares - weights) <= np.array(quotas) / length + 0.0005).all()


@pytest.fixture
def mixed(folder: Path) -> TextConfig:
    for name, documents in (("a", 30), ("b", 12)):
        tiny_text_folder(folder / name, documents=documents, seed=len(name) + documents)
    sources = [
        TextSource(path=str(folder / "a"), weight=3),
        TextSource(path=str(folder / "b"), weight=1, label="short"),
    ]
    return TextConfig(sources=sources, context_length=24, held_out_documents=8, documents_per_block=6, seed=1)


def test_documents_are_the_sources_own_from_any_start(mixed: TextConfig) -> None:
    train = list(stream_documents(mixed, held_out=False))
    held_out = list(stream_documents(mixed, held_out=True))
    assert Counter(document.name.split(": ")[0] for document in held_out) == {"a": 6, "short": 2}
    names = [document.name for document in held_out + train]
    assert len(set(names)) == len(names) == open_documents(mixed).count == 42
    assert [document.index for document in held_out + train] == list(range(42))
    folders = {"a": mixed.sources[0].path, "short": mixed.sources[1].path}
    for document in train:
        label, name = document.name.split(": ")
        assert document.text == (Path(folders[label]) / name).read_text()
    for start in (1, 9, 30):
        assert list(islice(stream_documents(mixed, held_out=False, start=start), 40)) == train[start:]


def test_a_mixture_is_harvested_counted_and_repaired(configs: Configs, mixed: TextConfig) -> None:
    asked = (configs[0], mixed, changed(configs, store={"tokens": 100_000})[2])
    harvest(*asked, device="cpu")
    store = Path(asked[2].path)
    manifest, opened = StoreManifest.load(store), ActivationStore.open(store)
    assert [(source["label"], source["documents"]) for source in manifest.sources] == [("a", 24), ("short", 10)]
    assert sum(source["rows"] for source in manifest.sources) == len(opened)
    info = store_info(store)
    assert "a mixture of 2 sources" in info
    assert f"short: {manifest.sources[1]['rows']:,} rows" in info
    before = tree(store)
    next((store / "mlp_in").rglob("c/1/0/0")).unlink()
    assert repair_store(store, device="cpu").windows == 1
    assert tree(store) == before


def test_mixtures_that_cannot_be_are_refused(mixed: TextConfig) -> None:
    path = mixed.sources[0].path
    for sources, named in (
        ([TextSource(path=path), TextSource(path=path)], "two sources are called a"),
        ([TextSource(path=path, weight=0)], "a has weight=0"),
        ([TextSource(path=path), TextSource(path="/nowhere")], "text.path=/nowhere does not exist"),
    ):
        with pytest.raises(UserError, match=named):
            open_documents(TextConfig(sources=sources))
    other = TextConfig(sources=[TextSource(path=path, weight=2), mixed.sources[1]], held_out_documents=8)
    assert text_fingerprint(other) != text_fingerprint(mixed)
