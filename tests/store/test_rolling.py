"""A store within a byte budget: its order, its bytes on disk, and what a resume sees."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from activation_store.config import SourceConfig, SourceKind, StoreConfig, SubjectConfig, TextConfig
from activation_store.errors import UserError
from activation_store.harvest import harvest
from activation_store.manifest import committed_windows
from activation_store.repair import repair_store
from activation_store.rolling import RollingFolder, RollingState, budget_for, windows_within
from activation_store.rolling_batches import RollingBatches, RollingBudget
from activation_store.rolling_harvest import RollingWorker, bytes_per_window, harvest_rolling, rolling_plan
from activation_store.store import ActivationStore
from activation_store.subject import Subject, load_subject
from tests.store.watching import watched

_BATCH, _MIXED = 48, 2
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Rolling:
    """Windows of four contexts of 32 tokens. `whole`: the text as a store that stays, which is the sample here."""

    subject: SubjectConfig
    text: TextConfig
    store: StoreConfig
    whole: ActivationStore

    def at(self, path: Path, windows: int) -> "tuple[StoreConfig, SourceConfig, RollingBudget]":
        store = replace(self.store, path=str(path))
        of_window = bytes_per_window(rolling_plan(self.subject, self.text, store))
        source = SourceConfig(
            kind=SourceKind.rolling, seed=3, pool_rows=128, lanes=4, run_rows=2, prefetch_bytes=0,
            budget_bytes=budget_for(windows, of_window), mixed_windows=_MIXED,
        )  # fmt: skip
        return store, source, RollingBudget(windows, of_window, 2)


@pytest.fixture(scope="module")
def rolling(tiny_llama: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Rolling:
    subject = SubjectConfig(path=str(tiny_llama))
    text = TextConfig(
        path=f"{tiny_text}/*.txt", context_length=32, held_out_documents=4, documents_per_block=4,
        contexts_per_document=2,
    )  # fmt: skip
    store = StoreConfig(
        path=str(tmp_path_factory.mktemp("rolling") / "whole"), tokens=100_000, held_out_tokens=0, chunk_rows=32,
        shard_rows=64, batch_contexts=2, window_bytes=4 * 32 * 2 * 3 * 16 * 4, claim_seconds=0.8, outlier_factor=2.0,
    )  # fmt: skip
    harvest(subject, text, store, device="cpu")
    return Rolling(subject, text, store, ActivationStore.open(store.path))


_LOADING = threading.Lock()


@pytest.fixture(scope="module", autouse=True)
def _one_loads_at_a_time() -> Iterator[None]:
    """Workers are processes elsewhere: transformers loads one model at a time in a process."""

    def load(*args: Any, **kwargs: Any) -> Subject:
        with _LOADING:
            return load_subject(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("activation_store.rolling_harvest.load_subject", load)
        yield


@contextmanager
def harvesting(rolling: Rolling, store: StoreConfig, source: SourceConfig, workers: int = 1) -> Iterator[None]:
    """Workers in threads; they end when training says that it is done."""
    threads = [
        threading.Thread(
            target=harvest_rolling, args=(rolling.subject, rolling.text, store, source), kwargs={"device": "cpu"}
        )
        for _ in range(workers)
    ]
    folder = RollingFolder(Path(store.path))
    if folder.exists():
        # Done, said what was before.
        folder.begin(folder.read().first, folder.read().windows)
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        folder.finish()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()


def consume(
    rolling: Rolling, store: StoreConfig, source: SourceConfig, budget: RollingBudget, count: int, *,
    start: int = 0, states: Sequence[dict[str, int]] = (), ranks: tuple[int, int] = (0, 1),
) -> tuple[list[Batch], list[dict[str, int]]]:  # fmt: skip
    """So many batches, with a checkpoint after every second one; and the states after each."""
    folder = RollingFolder(Path(store.path))
    state = states[start - 1] if start else {}
    folder.begin(state.get("group", 0) * _MIXED, budget.windows)
    found, after = [], []
    with RollingBatches(
        folder, rolling.whole, source, budget, batch_size_tokens=_BATCH, start_batch=start, state=state,
        rank=ranks[0], ranks=ranks[1],
    ) as batches:  # fmt: skip
        for number in range(start, count):
            batch = next(batches)
            found.append((batch.mlp_in.clone(), batch.mlp_out.clone(), batch.rows.clone()))
            after.append(batches.state())
            if (number + 1) % 2 == 0:
                batches.checkpointed(number + 1)
    return found, after


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for ours, theirs in zip(left, right, strict=True) for a, b in zip(ours, theirs, strict=True)
    )


@pytest.fixture(scope="module")
def told(rolling: Rolling, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Batch], list[dict[str, int]], int]:
    """Batches of more than an epoch from a budget of 6 windows, one worker; and the most bytes there were."""
    store, source, budget = rolling.at(tmp_path_factory.mktemp("told") / "store", 6)
    count = rolling.whole.used.count // _BATCH + 6
    with watched(Path(store.path)) as largest, harvesting(rolling, store, source):
        batches, states = consume(rolling, store, source, budget, count)
    return batches, states, largest[0]


def test_every_used_row_comes_once_in_an_epoch_as_a_store_holds_it(
    rolling: Rolling, told: tuple[list[Batch], list[dict[str, int]], int]
) -> None:
    whole, batches = rolling.whole, told[0]
    rows, used = whole[:], whole.used_rows()
    expected = {}
    for number in range(len(whole.chunks)):
        chunk = whole.chunks[number]
        first = chunk.shard * whole.layout.shard_rows + chunk.row_chunk * whole.layout.chunk_rows
        expected |= {first + i: chunk.first_row + i for i in range(chunk.rows) if used[chunk.first_row + i]}
    assert 0 < len(expected) < whole.n_rows
    found = [int(row) for _, _, numbers in batches for row in numbers]
    assert len(set(found)) == len(found)
    # The windows of the first epoch are those of the store that stays; the last group may reach into the second.
    last = max(expected)
    assert {row for row in found if row <= last} == set(expected)
    assert told[1][-1]["epoch"] == 1
    for mlp_in, mlp_out, numbers in batches:
        for i, row in enumerate(numbers.tolist()):
            if row <= last:
                assert torch.equal(mlp_in[i], rows.mlp_in[expected[row]])
                assert torch.equal(mlp_out[i], rows.mlp_out[expected[row]])


def test_bytes_on_disk_never_exceed_the_budget(
    rolling: Rolling, told: tuple[list[Batch], list[dict[str, int]], int], tmp_path: Path
) -> None:
    _, source, budget = rolling.at(tmp_path / "store", 6)
    groups = told[1][-1]["group"]
    assert groups * _MIXED > 2 * budget.windows
    assert 3 * budget.window_bytes < told[2] <= source.budget_bytes


def test_the_order_is_the_same_for_any_budget_and_any_workers_and_ranks_share_it(
    rolling: Rolling, told: tuple[list[Batch], list[dict[str, int]], int], tmp_path: Path
) -> None:
    store, source, budget = rolling.at(tmp_path / "store", 9)
    with harvesting(rolling, store, source, workers=2):
        batches, _ = consume(rolling, store, source, budget, 9)
    assert same(batches, told[0][:9])
    # Rows are mixed over a group.
    shards = [int(row) // rolling.store.shard_rows for row in batches[0][2]]
    assert len(set(shards)) > 1
    assert shards != sorted(shards)
    with harvesting(rolling, store, source):
        for rank in range(2):
            part, _ = consume(rolling, store, source, budget, 3, ranks=(rank, 2))
            half = slice(rank * _BATCH // 2, (rank + 1) * _BATCH // 2)
            assert same(part, [(x[half], y[half], rows[half]) for x, y, rows in told[0][:3]])


def test_a_resume_sees_the_same_rows_also_from_a_checkpoint_whose_windows_are_gone(
    rolling: Rolling, told: tuple[list[Batch], list[dict[str, int]], int], tmp_path: Path
) -> None:
    store, source, budget = rolling.at(tmp_path / "store", 6)
    with watched(Path(store.path)) as largest, harvesting(rolling, store, source):
        _, states = consume(rolling, store, source, budget, 12)
        assert states == told[1][:12]
        freed = RollingFolder(Path(store.path)).read().freed
        assert freed > 0
        # Read ahead of the last checkpoint, and not freed.
        again, _ = consume(rolling, store, source, budget, 15, start=12, states=states)
        assert same(again, told[0][12:15])
        # An older checkpoint: those windows are harvested again.
        assert states[1]["group"] * _MIXED < freed
        again, _ = consume(rolling, store, source, budget, 9, start=2, states=states)
        assert same(again, told[0][2:9])
    assert largest[0] <= source.budget_bytes


def test_what_must_fit_and_does_not_is_told_with_the_least_that_works(rolling: Rolling, tmp_path: Path) -> None:
    store, source, budget = rolling.at(tmp_path / "store", 3)
    # The rows of many batches reach over several groups.
    wanted = r"holds 3 windows .* must be on disk at once .*use at least \d+"
    with harvesting(rolling, store, source), pytest.raises(UserError, match=wanted) as refused:
        consume(rolling, store, source, replace(budget, checkpoint_batches=100), 100)
    assert "\n" not in str(refused.value)
    assert windows_within(source.budget_bytes, budget.window_bytes) == 3
    with pytest.raises(UserError, match="use at least"):
        harvest_rolling(rolling.subject, rolling.text, store, replace(source, budget_bytes=1_000), device="cpu")


class _FreedLate(RollingFolder):
    """Frees only after the readers have looked twice more at what is free."""

    looks = 0

    def read(self) -> RollingState:
        self.looks += threading.current_thread().name == "store-reader"
        return RollingFolder.read(self)

    def free(self, first: int) -> RollingState:
        self.wait_for_looks(2)
        return RollingFolder.free(self, first)

    def wait_for_looks(self, count: int) -> None:
        wanted, deadline = self.looks + count, time.monotonic() + 60
        while self.looks < wanted:
            assert time.monotonic() < deadline, "nobody waits for room"
            time.sleep(0.01)


def test_a_reader_waits_while_room_is_made_by_rank_0_though_all_know_of_the_checkpoint(
    rolling: Rolling, told: tuple[list[Batch], list[dict[str, int]], int], tmp_path: Path
) -> None:
    store, source, budget = rolling.at(tmp_path / "store", 10)
    folder, source = _FreedLate(Path(store.path)), replace(source, prefetch_bytes=1 << 24)
    folder.join(budget.windows)
    with harvesting(rolling, store, source), ExitStack() as stack:
        ranks = [
            stack.enter_context(
                RollingBatches(
                    folder, rolling.whole, source, replace(budget, checkpoint_batches=12), batch_size_tokens=_BATCH,
                    rank=rank, ranks=2,
                )
            )
            for rank in range(2)
        ]  # fmt: skip
        for number in range(24):
            parts = [next(batches).rows.clone() for batches in ranks]
            assert torch.equal(torch.cat(parts), told[0][number][2])
            if number == 11:
                while len(list(committed_windows(folder.folder))) < budget.windows:
                    time.sleep(0.01)
                folder.wait_for_looks(4)
                assert folder.read().freed == 0
                for batches in reversed(ranks):
                    batches.checkpointed(number + 1)
    assert folder.read().freed == told[1][11]["group"] * _MIXED > 0


class _NeverFrees(RollingFolder):
    def free(self, first: int) -> RollingState:
        raise OSError(28, "No space left on device", str(self.folder))


def test_room_that_cannot_be_made_ends_the_wait_for_it(rolling: Rolling, tmp_path: Path) -> None:
    store, source, budget = rolling.at(tmp_path / "store", 10)
    folder, budget = _NeverFrees(Path(store.path)), replace(budget, checkpoint_batches=12)
    folder.join(budget.windows)
    with (
        harvesting(rolling, store, source),
        RollingBatches(folder, rolling.whole, source, budget, batch_size_tokens=_BATCH) as batches,
    ):
        for _ in range(12):
            next(batches)
        # As in the thread that writes checkpoints, whose error training hears of when it comes to the next one.
        with pytest.raises(OSError, match="No space"):
            batches.checkpointed(12)
        with pytest.raises(OSError, match="No space"):
            list(zip(range(24), iter(lambda: next(batches), None), strict=False))


def test_a_rolling_store_is_not_taken_for_another(rolling: Rolling, tmp_path: Path) -> None:
    store, source, budget = rolling.at(tmp_path / "store", 6)
    with harvesting(rolling, store, source):
        consume(rolling, store, source, budget, 2)
        folder = RollingFolder(Path(store.path))
        with folder.locked(), pytest.raises(UserError, match="emptied by another run"), folder.locked():
            pass
        other = replace(source, seed=4)
        with pytest.raises(UserError, match=r"another config \(text.seed"):
            harvest_rolling(rolling.subject, replace(rolling.text, seed=9), store, other, device="cpu")
    with pytest.raises(UserError, match="source=rolling"):
        harvest(rolling.subject, rolling.text, store, device="cpu")
    with pytest.raises(UserError, match="source=rolling"):
        repair_store(store.path, device="cpu")
    with pytest.raises(UserError, match="a store that stays"):
        harvest_rolling(rolling.subject, rolling.text, rolling.store, source, device="cpu")


def test_a_wide_budget_costs_no_look_at_every_window_it_has_room_for() -> None:
    """The default one has room for a million of a small store's windows."""
    asked: list[int] = []

    def committed(window: int) -> bool:
        asked.append(window)
        return window < 3

    worker = SimpleNamespace(
        parts=[SimpleNamespace(committed=committed)],
        _stopped=threading.Event(),
        folder=SimpleNamespace(read=lambda: SimpleNamespace(finished=False, first=1, freed=1, windows=10**9)),
        # Another worker has claimed window 3.
        _take=lambda window: None if window == 3 else window,
    )
    assert next(RollingWorker._jobs(worker)) == 4  # type: ignore[arg-type]
    assert asked == [1, 2, 3, 4]
