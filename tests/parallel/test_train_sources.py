"""Whole runs without a store that stays, on two ranks: they end, and train on the rows that they should."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from activation_store.manifest import committed_windows
from activation_store.ring import row_bytes
from activation_store.rolling import RollingFolder, budget_for
from activation_store.rolling_harvest import bytes_per_window, rolling_plan
from tests.parallel import source_cases as cases
from tests.parallel.processes import Processes
from tests.store.harvesting import in_child
from tests.store.watching import watched
from tests.training.runs import assert_close, records, tiny_run
from trainer.config import RunConfig

_ROWS, _STEPS, _LIVE_STEPS = 48, 20, 10
_SHORT = {
    "train.tokens": _STEPS * _ROWS,
    "train.batch_size_tokens": _ROWS,
    "train.checkpoint_every": 2,
    "train.eval_every": 0,
    "train.log_every": 1,
    "source.statistics_tokens": 512,
    "store.held_out_tokens": 64,
}
_MIXED, _WINDOWS = 2, 6
Run = tuple[RunConfig, list[cases.Seen]]


def _mesh(data: int, feature: int) -> dict[str, Any]:
    return {"parallel.data": data, "parallel.feature": feature}


@pytest.fixture(scope="module")
def live(tiny_store: RunConfig, two_ranks: Processes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Live runs on two ranks, and of one process on what both ranks read."""
    folder = tmp_path_factory.mktemp("live")
    forward_rows = tiny_store.store.batch_contexts * tiny_store.text.context_length
    ring = {"source.kind": "live", "source.ring_bytes": 4 * forward_rows * row_bytes(_layout(tiny_store))}
    exact = {**_SHORT, **ring, "train.tokens": _LIVE_STEPS * _ROWS, "source.deterministic": True}
    runs = {
        "2x1": tiny_run(tiny_store, folder / "2x1", {**exact, **_mesh(2, 1)}),
        "1x2": tiny_run(tiny_store, folder / "1x2", {**exact, **_mesh(1, 2)}),
        "as they come": tiny_run(
            tiny_store, folder / "as_they_come", {**exact, "source.deterministic": False, **_mesh(1, 2)}
        ),
    }
    seen = two_ranks.run(cases.train_all_seen, list(runs.values()), timeout=240)
    one = tiny_run(tiny_store, folder / "one", exact)
    cases.train_on_shares(one, 2)
    return {name: (runs[name], list(each)) for name, each in zip(runs, zip(*seen, strict=True), strict=True)} | {
        "one": (one, [])
    }


def _layout(config: RunConfig) -> Any:
    return rolling_plan(config.subject, config.text, config.store).layout


@pytest.mark.parametrize("mesh", ["2x1", "1x2"])
def test_a_deterministic_live_run_on_two_ranks_is_that_of_one_process_on_their_rows(
    live: dict[str, Run], mesh: str
) -> None:
    wanted = records(live["one"][0].run)
    assert len(wanted) == _LIVE_STEPS + 1
    for line, other in zip(wanted, records(live[mesh][0].run), strict=True):
        assert_close(other, line, f"{mesh} step {line['step']}", rel=1e-6, absolute=1e-9)


@pytest.mark.parametrize("name", ["2x1", "1x2", "as they come"])
def test_a_live_run_on_two_ranks_trains_on_as_many_rows_as_was_said(live: dict[str, Run], name: str) -> None:
    config, seen = live[name]
    assert [line["tokens"] for line in records(config.run) if "loss" in line][-1] == _LIVE_STEPS * _ROWS
    rows = [[row for batch in of_rank.batches[:_LIVE_STEPS] for row in batch] for of_rank in seen]
    assert [len(each) for each in rows] == [_LIVE_STEPS * _ROWS // 2] * 2
    # Each rank reads documents that the other does not.
    assert {row >> 32 for row in rows[0]}.isdisjoint({row >> 32 for row in rows[1]})


@dataclass(frozen=True)
class Rolling:
    """Rolling runs: of one process, and on two ranks, which are killed once and go on."""

    one: RunConfig
    two: RunConfig
    of_one: cases.Seen
    killed: list[cases.Seen]
    ended: list[cases.Seen]
    most_bytes: int
    left: int


@pytest.fixture(scope="module")
def rolling(tiny_store: RunConfig, two_ranks: Processes, tmp_path_factory: pytest.TempPathFactory) -> Rolling:
    folder = tmp_path_factory.mktemp("rolling")

    def run(name: str, **mesh: int) -> RunConfig:
        store = {
            "store.path": str(folder / name / "store"),
            "store.window_bytes": 128 * 2 * 3 * 16 * 4,
            "store.shard_rows": 64,
            "store.batch_contexts": 2,
            "store.claim_seconds": 2.0,
        }
        config = tiny_run(tiny_store, folder / name / "run", {**_SHORT, **store, "source.kind": "rolling", **mesh})
        of_window = bytes_per_window(rolling_plan(config.subject, config.text, config.store))
        config.source = replace(
            config.source, lanes=4, mixed_windows=_MIXED, budget_bytes=budget_for(_WINDOWS, of_window)
        )
        return config

    one, two = run("one"), run("two", **_mesh(1, 2))
    with _harvesting(one):
        of_one = cases.train_seen(one)
    with watched(Path(two.store.path)) as largest, _harvesting(two):
        killed = two_ranks.run(cases.train_seen, two, killed_in=12, timeout=240)
        ended = two_ranks.run(cases.train_seen, two, timeout=240)
    left = len(list(committed_windows(Path(two.store.path))))
    return Rolling(one, two, of_one, killed, ended, largest[0], left)


@contextmanager
def _harvesting(config: RunConfig) -> Iterator[None]:
    """A harvest beside training; it must end with it."""
    child = in_child(cases.harvest_beside, config)
    try:
        yield
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()


def test_a_rolling_run_on_two_ranks_that_is_killed_once_is_that_of_one_process(rolling: Rolling) -> None:
    step = rolling.ended[0].resumed_from[0]
    assert step == 10
    wanted = rolling.of_one.batches[:_STEPS]
    for rank, (before, after) in enumerate(zip(rolling.killed, rolling.ended, strict=True)):
        share = slice(rank * _ROWS // 2, (rank + 1) * _ROWS // 2)
        found = [*before.batches[:step], *after.batches[: _STEPS - step]]
        assert found == [batch[share] for batch in wanted]
    for line, other in zip(records(rolling.one.run), records(rolling.two.run), strict=True):
        assert_close(other, line, f"step {line['step']}", rel=1e-6, absolute=1e-9)


def test_a_rolling_run_on_two_ranks_stays_within_its_bytes_and_frees_what_a_checkpoint_is_past(
    rolling: Rolling,
) -> None:
    assert rolling.two.source.budget_bytes // 2 < rolling.most_bytes <= rolling.two.source.budget_bytes
    assert RollingFolder(Path(rolling.two.store.path)).read().finished
    assert 0 < rolling.left <= _WINDOWS
    for of_rank in rolling.killed[1:] + rolling.ended[1:]:
        assert not of_rank.freed, "rank 0 alone frees"
    freed = rolling.killed[0].freed + rolling.ended[0].freed
    assert max(first for first, _ in freed) >= _WINDOWS
    for first, checkpoints in freed:
        assert first in {0, *(group * _MIXED for _, group in checkpoints)}
