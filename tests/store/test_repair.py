"""`store repair` harvests what is damaged again, and the store is what it was; `store remove` deletes stores only."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from activation_store.errors import UserError
from activation_store.harvest import harvest
from activation_store.manifest import StoreManifest, read_commits
from activation_store.remove import remove_store
from activation_store.repair import Places, repair_store
from activation_store.storage import LocalStorage
from activation_store.store import ActivationStore
from activation_store.verify import verify_store
from activation_store.windows import Windows
from tests.store.harvesting import Configs
from tests.store.making import manifest, random_rows, write_store
from tests.store.test_harvest import configs, folder
from tests.store.test_shards import tree
from tests.store.test_verify import cut_short, flip_a_bit

__all__ = ["configs", "folder"]


@pytest.fixture
def store(configs: Configs) -> Path:
    harvest(*configs, device="cpu")
    return Path(configs[2].path)


def recorded(monkeypatch: pytest.MonkeyPatch, method: str) -> list[tuple[Any, ...]]:
    """The arguments of every later call of a method of Windows."""
    calls: list[tuple[Any, ...]] = []
    real = getattr(Windows, method)

    def record(self: Windows, *args: Any) -> Any:
        calls.append(args)
        return real(self, *args)

    monkeypatch.setattr(Windows, method, record)
    return calls


def test_damaged_windows_are_harvested_again_and_only_those(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(store)
    windows = list(read_commits(store))
    assert len(windows) > 4
    keys = [list(commit.files) for commit in windows]
    flip_a_bit(store / keys[1][0])
    cut_short(store / keys[3][-1])
    (store / keys[-1][1]).unlink()
    made, tokenised = recorded(monkeypatch, "text"), recorded(monkeypatch, "_collect")
    untouched = (store / keys[1][1]).stat().st_ino
    summary = repair_store(store, device="cpu")
    assert (summary.windows, summary.changed) == (3, [])
    assert [record.window for (record,) in made] == [1, 3, len(windows) - 1]
    # The text of no other window is looked at.
    assert len(tokenised) == 3
    assert tree(store) == before
    assert (store / keys[1][1]).stat().st_ino == untouched
    assert repair_store(store, device="cpu").windows == 0
    assert tree(store) == before


def lose_a_commit(store: Path) -> None:
    (store / "commits" / "00000002.json").unlink()


def spoil_a_commit_and_its_shard(store: Path) -> None:
    commit = list(read_commits(store))[2]
    flip_a_bit(store / next(iter(commit.files)))
    path = store / "commits" / "00000002.json"
    path.write_text(path.read_text()[:200])


def spoil_the_last_windows(store: Path) -> None:
    for path in sorted((store / "commits").glob("*.json"))[-2:]:
        path.unlink()


def spoil_the_held_out_part(store: Path) -> None:
    flip_a_bit(next((store / "held_out" / "mlp_out").rglob("c/0/0/0")))


@pytest.mark.parametrize(
    "damage", [lose_a_commit, spoil_a_commit_and_its_shard, spoil_the_last_windows, spoil_the_held_out_part]
)
def test_lost_and_unreadable_commits(store: Path, damage: Callable[[Path], None]) -> None:
    before = tree(store)
    damage(store)
    assert not verify_store(store).ok
    summary = repair_store(store, device="cpu")
    assert summary.windows == (2 if damage is spoil_the_last_windows else 1)
    assert summary.changed == []
    assert tree(store) == before


def test_a_repair_that_was_killed_goes_on(store: Path, configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(store)
    key = next(iter(list(read_commits(store))[2].files))
    delete = LocalStorage.delete

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def killed_at_the_shard(self: LocalStorage, name: str) -> None:
        delete(self, name)
        if name == key:
            raise KeyboardInterrupt

    for target, kill in ((LocalStorage, "delete"), (None, "harvest")):
        flip_a_bit(store / key)
        with monkeypatch.context() as patch:
            if kill == "delete":
                patch.setattr(target, kill, killed_at_the_shard)
            else:
                patch.setattr("activation_store.repair.harvest", killed)
            with pytest.raises(KeyboardInterrupt):
                repair_store(store, device="cpu")
        with pytest.raises(UserError, match="half written"):
            ActivationStore.open(store)
        repair_store(store, device="cpu")
        assert tree(store) == before


def test_what_cannot_be_repaired_is_refused_and_left(store: Path, configs: Configs, folder: Path) -> None:
    text = folder / "text"
    shutil.copytree(configs[1].path, text)
    flip_a_bit(store / next(iter(list(read_commits(store))[1].files)))
    before = tree(store)
    (text / "more.txt").write_text("One more document.")
    with pytest.raises(UserError, match=r"cannot be repaired: .*text.fingerprint: 40 files"):
        repair_store(store, Places(text=str(text)), device="cpu")
    (store / "manifest.json").rename(store / "kept")
    (store / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        repair_store(store, device="cpu")
    (store / "kept").rename(store / "manifest.json")
    assert tree(store) == before
    (text / "more.txt").unlink()
    assert repair_store(store, Places(text=str(text)), device="cpu").windows == 1
    assert verify_store(store).ok
    assert StoreManifest.load(store).status == "complete"


def test_remove_deletes_a_store_and_nothing_else(tmp_path: Path) -> None:
    begun, store = manifest(), tmp_path / "store"
    for part in (store, store / "held_out"):
        write_store(part, begun, [random_rows(30, begun, 0)])
    files = len(tree(store))
    said = remove_store(store, confirm=False)
    assert f"a store of {files} files" in said
    assert "confirm=true" in said
    assert len(tree(store)) == files
    (store / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes.txt in it is not the store's"):
        remove_store(store, confirm=True)
    assert len(tree(store)) == files + 1
    (store / "notes.txt").unlink()
    assert remove_store(store, confirm=True).endswith("deleted")
    assert not store.exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    for no_store in (tmp_path / "other", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"is not an activation store|does not exist"):
            remove_store(no_store, confirm=True)
    assert (tmp_path / "other" / "file").exists()
