"""Many workers on one store: the same bytes whatever becomes of them, and claims that need no clock."""

import json
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from activation_store import work
from activation_store.claims import PATIENCE, Claims
from activation_store.documents import DocumentIndex, read_scattered
from activation_store.errors import UserError
from activation_store.harvest import harvest
from activation_store.manifest import read_commits
from activation_store.storage import LocalStorage
from activation_store.store import ActivationStore
from activation_store.verify import verify_store
from activation_store.windows import WindowRecord
from tests.store.harvesting import Configs, harvest_in_child
from tests.store.making import manifest, random_rows, write_store
from tests.store.test_harvest import changed, configs, folder, wait_for
from tests.store.test_shards import tree

__all__ = ["configs", "folder"]


def slowly(configs: Configs, **store: object) -> Configs:
    """One context at a time, in many small windows."""
    small = {"tokens": 1500, "held_out_tokens": 60, "batch_contexts": 1, "window_bytes": 6 * 24 * 3 * 16 * 2 * 4}
    return changed(configs, text={"documents_per_block": 4}, store={**small, **store})


def test_workers_killed_at_random_leave_what_one_alone_makes(configs: Configs) -> None:
    rng = np.random.default_rng(3)
    alone = slowly(configs, path=configs[2].path + "_alone")
    harvest(*alone, device="cpu")
    asked = slowly(configs)
    store = Path(asked[2].path)
    workers = [harvest_in_child(asked) for _ in range(2)]
    kills = 0
    while kills < 4:
        assert wait_for((store / "windows").is_dir, workers[0]) or kills
        time.sleep(rng.uniform(0.0, 0.25))
        victim = int(rng.integers(len(workers)))
        if workers[victim].is_alive():
            kills += 1
        workers[victim].kill()
        workers[victim].join()
        # Whatever is committed is whole, at any moment.
        assert verify_store(store).ok
        if is_complete(store):
            break
        workers[victim] = harvest_in_child(asked)
    for worker in workers:
        worker.join()
    assert is_complete(store)
    assert [worker.exitcode for worker in workers].count(0) >= 1
    assert kills
    assert tree(store) == tree(Path(alone[2].path))


def is_complete(store: Path) -> bool:
    return all(
        (part / "manifest.json").exists() and json.loads((part / "manifest.json").read_text())["status"] == "complete"
        for part in (store, store / "held_out")
    )


def test_three_workers_share_the_windows(configs: Configs, folder: Path) -> None:
    asked = slowly(configs)
    alone = changed(asked, store={"path": configs[2].path + "_alone"})
    harvest(*alone, device="cpu")
    logs = [folder / f"log{i}" for i in range(3)]
    workers: list[ForkServerProcess] = [harvest_in_child(asked, stderr=log) for log in logs]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert tree(Path(asked[2].path)) == tree(Path(alone[2].path))
    assert any("the subject ran" in log.read_text() and "for the disk" in log.read_text() for log in logs)


def test_a_harvest_of_another_config_is_told_the_difference_while_one_runs(configs: Configs) -> None:
    asked = slowly(configs, claim_seconds=2.0)
    process = harvest_in_child(asked)
    assert wait_for((Path(asked[2].path) / "manifest.json").exists, process)
    other = changed(asked, text={"seed": 5})
    with pytest.raises(UserError, match=r"text.seed: 0 there, 5 asked for") as caught:
        harvest(*other, device="cpu")
    assert "\n" not in str(caught.value)
    process.join()
    assert process.exitcode == 0
    assert verify_store(asked[2].path).ok


def test_a_claim_is_taken_over_only_when_its_counter_stands_still(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    with Claims(pause_seconds=0.02) as owner:
        assert owner.take(storage, "a")
        watcher = Claims(pause_seconds=0.02)
        assert not watcher.take(storage, "a")
        for _ in range(5 * PATIENCE):
            assert not watcher.observe(storage, "a")
            watcher.pause()
    # Given up at the end: free.
    assert watcher.observe(storage, "a")
    watcher.close()
    # Left by a process that was killed: taken after PATIENCE looks that see no change, neither before nor by waiting.
    storage.put("claims/b", b'{"worker": "gone", "counter": 7}')
    with Claims(pause_seconds=0.02) as heir:
        time.sleep(0.1)
        assert [heir.observe(storage, "b") for _ in range(PATIENCE + 1)] == [False] * PATIENCE + [True]
        # The one before wakes up: its claim is not its own any more, and it leaves it alone.
        assert json.loads(storage.get("claims/b"))["worker"] == heir.worker


def test_claims_do_not_look_at_a_clock(configs: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's clock jumps by days, forwards and backwards, while two workers harvest."""
    asked = slowly(configs, claim_seconds=1.0)
    alone = changed(asked, store={"path": configs[2].path + "_alone"})
    harvest(*alone, device="cpu")
    process = harvest_in_child(asked)
    assert wait_for((Path(asked[2].path) / "manifest.json").exists, process)
    rng, real = np.random.default_rng(0), time.time

    def jumping() -> float:
        return real() + float(rng.uniform(-1e6, 1e6))

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    harvest(*asked, device="cpu")
    process.join()
    assert process.exitcode == 0
    assert tree(Path(asked[2].path)) == tree(Path(alone[2].path))


def test_a_worker_that_began_while_the_last_window_was_committed_leaves_no_records(
    configs: Configs, folder: Path
) -> None:
    """It finds all windows committed, having made their records anew."""
    harvest(*configs, device="cpu")
    before = tree(folder)
    real = work._uncommitted

    def as_before_completion(part: work.PartWork) -> Iterator[WindowRecord]:
        part.manifest.status = "harvesting"
        return real(part)

    unseen = patch("activation_store.harvest.is_complete", lambda plan: False)
    with patch.object(work, "_uncommitted", as_before_completion), unseen:
        harvest(*configs, device="cpu")
    assert tree(folder) == before


def test_rows_are_mixed_over_their_window_and_found_again(configs: Configs) -> None:
    harvest(*configs, device="cpu")
    store = ActivationStore.open(configs[2].path)
    rows, first = store[:], 0
    for commit in list(read_commits(store.path))[:-1]:
        ids = rows.document_ids[first : first + commit.rows].numpy()
        assert len(commit.documents) > 3
        # Neighbours are of one document about as often as any two rows of the window are.
        shares = np.unique(ids, return_counts=True)[1] / len(ids)
        neighbours = (ids[1:] == ids[:-1]).mean()
        assert abs(neighbours - (shares**2).sum()) < 5 * np.sqrt(0.25 / len(ids))
        # Row number and place in the document are unrelated: |r| of 288 independent rows is below 0.3 (5 sigma).
        position = rows.positions[first : first + commit.rows].numpy()
        assert abs(np.corrcoef(np.arange(len(ids)), position)[0, 1]) < 0.3
        first += commit.rows
    index = DocumentIndex(store)
    assert set(index.names) == set(rows.document_ids.tolist())
    with pytest.raises(UserError, match="has no row of document 0"):
        index.rows(0)


def test_scattered_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    begun = manifest()
    store = write_store(tmp_path, begun, [random_rows(30, begun, 0), random_rows(20, begun, 1)])
    whole, wanted = store[:], np.random.default_rng(0).permutation(50)[:17]
    read = read_scattered(store, wanted)
    for name in ("mlp_in", "mlp_out", "token_ids", "document_ids", "positions"):
        assert torch.equal(getattr(read, name), getattr(whole, name)[torch.from_numpy(wanted)])
    assert len(read_scattered(store, wanted[:0])) == 0


def test_a_window_in_scratch_has_the_same_bytes(configs: Configs, folder: Path) -> None:
    harvest(*configs, device="cpu")
    asked = changed(configs, store={"path": configs[2].path + "_scratch", "scratch": str(folder / "scratch")})
    harvest(*asked, device="cpu")
    assert tree(Path(asked[2].path)) == tree(Path(configs[2].path))
    assert list((folder / "scratch").iterdir()) == []
