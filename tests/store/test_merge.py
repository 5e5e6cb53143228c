"""`store merge` joins stores that were harvested apart: every row once, exact statistics, shards linked."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from activation_store.config import StoreDtype
from activation_store.documents import DocumentIndex
from activation_store.errors import UserError
from activation_store.harvest import harvest
from activation_store.info import store_info
from activation_store.manifest import read_commits
from activation_store.merge import merge_stores
from activation_store.statistics import RowSums, sum_rows
from activation_store.storage import LocalStorage
from activation_store.store import ActivationStore
from activation_store.verify import verify_store
from launch.main import main
from tests.store.harvesting import Configs
from tests.store.making import manifest, random_rows, write_store
from tests.store.test_harvest import changed, configs, folder
from tests.store.test_shards import tree
from tests.tiny import tiny_text_folder

__all__ = ["configs", "folder"]


def two_stores(root: Path, **kwargs: Any) -> list[Path]:
    for name, sizes, seed in (("a", (30, 13), 1), ("b", (20, 7, 25), 5)):
        begun = manifest(**kwargs)
        write_store(
            root / name, begun, [random_rows(size, begun, seed + i, outliers=1) for i, size in enumerate(sizes)]
        )
    return [root / "a", root / "b"]


@pytest.mark.parametrize("dtype", [StoreDtype.float16, StoreDtype.int8])
def test_a_merged_store_has_the_rows_of_all_and_exact_statistics(tmp_path: Path, dtype: StoreDtype) -> None:
    folders = two_stores(tmp_path, dtype=dtype)
    summary = merge_stores(folders, tmp_path / "merged")
    merged, parts = ActivationStore.open(tmp_path / "merged"), [ActivationStore.open(path) for path in folders]
    assert verify_store(tmp_path / "merged").ok
    assert (summary.rows, summary.shared) == (len(merged), 0) == (95, 0)
    rows, apart = merged[:], [part[:] for part in parts]
    for name in ("mlp_in", "mlp_out", "token_ids", "positions"):
        assert torch.equal(getattr(rows, name), torch.cat([getattr(part, name) for part in apart]))
    offset = int(apart[0].document_ids.max()) + 1
    assert torch.equal(rows.document_ids, torch.cat([apart[0].document_ids, apart[1].document_ids + offset]))
    # Against sums over the rows that training uses, in one go.
    used = torch.from_numpy(merged.used_rows())
    expected, found = sum_rows(rows.mlp_in[used], rows.mlp_out[used]), merged.statistics()
    assert found.count == expected.count == int(used.sum())
    assert merged.manifest.outlier_rows > 0
    torch.testing.assert_close(found.in_mean_LD, expected.in_sum_LD / found.count, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.out_mean_square_LD, expected.out_square_sum_LD / found.count, rtol=1e-9, atol=0)
    # To the last bit those of the windows' sums in their order.
    sums = RowSums.zeros(merged.n_layers, merged.d_model)
    for part in parts:
        for commit in read_commits(part.path):
            sums.add(commit.sums)
    assert torch.equal(merged._committed_sums().in_square_sum_LD, sums.in_square_sum_LD)
    # Linked, not copied.
    assert (folders[0] / "mlp_in/c/0/0/0").stat().st_ino == (tmp_path / "merged/mlp_in/c/0/0/0").stat().st_ino
    assert summary.copied < summary.linked
    names = DocumentIndex(merged).names
    assert names[int(rows.document_ids[50])] == f"document {int(apart[1].document_ids[50 - 43])}"


def test_without_links_it_copies_and_the_bytes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = two_stores(tmp_path)
    merge_stores(folders, tmp_path / "linked")
    link = os.link

    def no_links(source: Any, target: Any) -> None:
        if not str(source).endswith(".partial"):
            raise OSError(18, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr(os, "link", no_links)
    summary = merge_stores(folders, tmp_path / "copied")
    assert summary.linked == 0
    assert tree(tmp_path / "copied") == tree(tmp_path / "linked")


def test_a_merge_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = two_stores(tmp_path)
    merge_stores(folders, tmp_path / "whole")
    put, calls = LocalStorage.put_if_absent, []

    def killed(self: LocalStorage, key: str, pieces: list[Any]) -> bool:
        calls.append(key)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return put(self, key, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "put_if_absent", killed)
        with pytest.raises(KeyboardInterrupt):
            merge_stores(folders, tmp_path / "merged")
    with pytest.raises(UserError, match="half written"):
        ActivationStore.open(tmp_path / "merged")
    with pytest.raises(UserError, match="is not a merge of these stores"):
        merge_stores(folders[::-1], tmp_path / "merged")
    merge_stores(folders, tmp_path / "merged")
    assert tree(tmp_path / "merged") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"dtype": StoreDtype.bfloat16}, r"store.dtype: float16 in .*/a, bfloat16 in .*/c"),
        ({"first_layer": 1}, r"layers: \[0, 1, 2\] in .*/a, \[1, 2, 3\] in .*/c"),
        ({"d_model": 6}, "d_model: 5 in"),
        ({"shard_rows": 8}, "store.shard_rows: 12 in"),
    ],
)
def test_stores_that_differ_are_refused_by_name(tmp_path: Path, other: dict[str, Any], named: str) -> None:
    (first, _), begun = two_stores(tmp_path), manifest(**other)
    write_store(tmp_path / "c", begun, [random_rows(30, begun, 0)])
    with pytest.raises(UserError, match=named) as caught:
        merge_stores([first, tmp_path / "c"], tmp_path / "merged")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_overlap_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = two_stores(tmp_path)
    begun = manifest()
    write_store(tmp_path / "c", begun, [random_rows(30, begun, 1)])
    assert merge_stores([first, tmp_path / "c"], tmp_path / "merged").shared == 2
    assert "2 documents are in more than one of the stores" in capsys.readouterr().err


def test_harvests_of_two_texts_merge_with_their_held_out_parts(
    configs: Configs, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harvest(*configs, device="cpu")
    text = tiny_text_folder(folder / "other", documents=25, seed=9)
    second = changed(configs, text={"path": str(text), "seed": 3}, store={"path": str(folder / "b"), "tokens": 700})
    harvest(*second, device="cpu")
    stores = [configs[2].path, second[2].path]
    assert main(["store", "merge", *stores, f"output={folder / 'merged'}"]) == 0
    merged = ActivationStore.open(folder / "merged")
    held_out = merged.held_out()
    assert held_out is not None
    parts = [ActivationStore.open(path) for path in stores]
    assert len(merged) == sum(len(part) for part in parts)
    assert len(held_out) == sum(len(part.held_out() or ()) for part in parts)
    info = store_info(folder / "merged")
    for part in parts:
        assert f"{part.manifest.text['path']}, seed {part.manifest.text['seed']}: {len(part):,} rows" in info
    capsys.readouterr()
    assert main(["store", "repair", str(folder / "merged")]) == 2
    assert "was merged from others" in capsys.readouterr().err
    # Held out here, trained on there.
    third = changed(configs, text={"seed": 4}, store={"path": str(folder / "c")})
    harvest(*third, device="cpu")
    with pytest.raises(UserError, match=r"holds out \d documents that .* trains on"):
        merge_stores([Path(configs[2].path), folder / "c"], folder / "no")


def test_the_commands_repair_and_remove(configs: Configs, capsys: pytest.CaptureFixture[str]) -> None:
    harvest(*configs, device="cpu")
    store = Path(configs[2].path)
    before = tree(store)
    next((store / "mlp_in").rglob("c/1/0/0")).unlink()
    assert main(["store", "verify", str(store)]) == 1
    assert f"layerloom store repair {store}" in capsys.readouterr().out
    words = ["store", "repair", str(store), f"subject.cache_dir={configs[0].cache_dir}", "device=cpu"]
    assert main(words) == 0
    assert "1 window harvested again, all as they were" in capsys.readouterr().out
    assert tree(store) == before
    assert main(["store", "remove", str(store)]) == 1
    assert store.exists()
    assert main(["store", "remove", str(store), "confirm=true"]) == 0
    assert not store.exists()
