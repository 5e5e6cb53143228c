"""Batches without a store: where rows come from, their order, bounds, and harvesters that die."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from activation_store.config import SourceConfig, SourceKind, StoreConfig, SubjectConfig, TextConfig
from activation_store.errors import UserError
from activation_store.harvest import harvest
from activation_store.live import LiveActivations, LiveText
from activation_store.mixing import begin
from activation_store.ring import row_bytes
from activation_store.store import ActivationStore

# Two contexts of 32 tokens in a forward; the ring holds 16 of those.
_RING_ROWS = 1_024


@pytest.fixture(scope="module")
def live(tiny_llama: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveText:
    """The whole text, a store of which is the sample here: so that every row can be compared."""
    subject = SubjectConfig(path=str(tiny_llama))
    text = TextConfig(
        path=f"{tiny_text}/*.txt",
        context_length=32,
        held_out_documents=4,
        documents_per_block=4,
        contexts_per_document=4,
    )
    store = StoreConfig(
        path=str(tmp_path_factory.mktemp("live") / "sample"),
        tokens=100_000, held_out_tokens=0, chunk_rows=32, shard_rows=128, batch_contexts=2,
        # Some rows are outliers then.
        outlier_factor=2.0,
    )  # fmt: skip
    harvest(subject, text, store, device="cpu")
    return LiveText(subject, text, store, ActivationStore.open(store.path))


@pytest.fixture(scope="module")
def rows_by_origin(live: LiveText) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """mlp_in and mlp_out of every row that training uses, by where it is from."""
    store = live.sample
    rows, used = store[:], store.used_rows()
    pieces = torch.from_numpy(store.read_small("pieces", 0, store.n_rows).astype("int64"))
    origins = (rows.document_ids << 32) | (pieces << 16) | rows.positions
    return {int(origins[i]): (rows.mlp_in[i], rows.mlp_out[i]) for i in range(len(rows)) if used[i]}


def source(live: LiveText, **changes: Any) -> SourceConfig:
    settings = {"ring_bytes": _RING_ROWS * row_bytes(live.sample.layout), "fill_fraction": 0.5, "seed": 3}
    return SourceConfig(kind=SourceKind.live, prefetch_bytes=0, **(settings | changes))


def take(batches: LiveActivations, count: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Copies, for the memory of a batch is used again."""
    return [(b.mlp_in.clone(), b.mlp_out.clone(), b.rows.clone()) for b in (next(batches) for _ in range(count))]


def test_an_epoch_is_every_used_row_once_with_the_values_of_a_store(
    live: LiveText, rows_by_origin: dict[int, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    n_used = len(rows_by_origin)
    assert n_used < live.sample.n_rows
    # A pool, half of the ring, may reach over the end of the text.
    before, over = n_used // 64 - 8, 17
    with LiveActivations(live, source(live, deterministic=True), batch_size_tokens=64) as batches:
        found = take(batches, before)
        assert batches.epochs == 0.0
        rest = take(batches, over)
        assert batches.epochs == 1.0
    origins = [int(row) for _, _, rows in found for row in rows]
    assert len(set(origins)) == len(origins)
    assert {*origins, *(int(row) for _, _, rows in rest for row in rows)} == set(rows_by_origin)
    for mlp_in, mlp_out, rows in found:
        expected = [rows_by_origin[int(row)] for row in rows]
        torch.testing.assert_close(mlp_in, torch.stack([x for x, _ in expected]), rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(mlp_out, torch.stack([y for _, y in expected]), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("harvesters", [0, 2])
def test_deterministic_batches_are_a_function_of_their_number(live: LiveText, harvesters: int) -> None:
    settings = source(live, deterministic=True, harvesters=harvesters)
    states = []
    with LiveActivations(live, settings, batch_size_tokens=96) as batches:
        whole = []
        for _ in range(14):
            whole += take(batches, 1)
            states.append(batches.state())
    assert states[-1]["pool"] > states[0]["pool"]
    # Processes take seconds to start.
    for done in (1, 9) if harvesters == 0 else (9,):
        with LiveActivations(
            live, settings, batch_size_tokens=96, start_batch=done, states=[states[done - 1]]
        ) as resumed:
            assert resumed.position == done
            for ours, theirs in zip(whole[done:], take(resumed, 14 - done), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_ranks_have_different_documents(live: LiveText) -> None:
    documents = []
    for rank in range(2):
        settings = source(live, deterministic=True)
        with LiveActivations(live, settings, batch_size_tokens=64, rank=rank, ranks=2) as batches:
            found = take(batches, 12)
        assert all(len(rows) == 32 for _, _, rows in found)
        documents.append({int(row) >> 32 for _, _, rows in found for row in rows})
    assert documents[0].isdisjoint(documents[1])


def test_states_of_other_ranks_are_refused_or_begun_at_the_lowest_place() -> None:
    states = [{"places": [[0, 6, 1], [0, 9, 0]]}, {"places": [[0, 4, 2], [0, 7, 0]]}]
    assert begin(states, rank=1, ranks=2, harvesters=2, exact=True) == ([(0, 4, 2), (0, 7, 0)], states[1])
    assert begin([], rank=1, ranks=2, harvesters=2, exact=True) == ([(0, 2, 0), (0, 3, 0)], {})
    assert begin(states, rank=2, ranks=3, harvesters=1, exact=False) == ([(0, 5, 0)], {})
    with pytest.raises(UserError, match="of 2 ranks and 4 harvesters in all, not 3 and 3"):
        begin(states, rank=2, ranks=3, harvesters=1, exact=True)


def test_the_default_draws_at_random_from_a_ring_that_is_full_enough(live: LiveText) -> None:
    with LiveActivations(live, source(live, fill_fraction=1.0), batch_size_tokens=64) as batches:
        found = take(batches, 20)
        state = batches.state()
    rows = [int(row) for _, _, numbers in found for row in numbers]
    assert len(set(rows)) == len(rows) or state["places"][0][0] > 0
    # The first batch is drawn when the whole ring is filled: rows of many documents, not in their order.
    first = [row >> 32 for row in rows[:64]]
    assert len(set(first)) >= 6
    assert first != sorted(first)
    # A resume goes on behind what had come.
    place = tuple(state["places"][0])
    with LiveActivations(live, source(live), batch_size_tokens=64, start_batch=20, states=[state]) as batches:
        next(batches)
        assert tuple(batches.state()["places"][0]) > place


def test_memory_is_the_ring_whatever_the_harvester_could_do(live: LiveText) -> None:
    settings = source(live, harvesters=1, deterministic=False)
    with LiveActivations(live, settings, batch_size_tokens=64) as batches:
        next(batches)
        assert batches.ring_bytes <= settings.ring_bytes
        process = psutil.Process(batches.harvesters[0].pid)
        # Nobody draws: the harvester fills what is free, and then waits.
        busy, rest = None, 0
        while rest < 3:
            time.sleep(0.2)
            now = process.cpu_times().user
            rest, busy = (rest + 1 if now == busy else 0), now
        shared = process.memory_info().shared
        place = batches.state()["places"]
        take(batches, 2)
        assert batches.state()["places"] >= place
        assert os.fstat(batches._ring.descriptor).st_size == batches.ring_bytes
        assert shared >= batches.ring_bytes // 2
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_killed_harvester_is_named_even_while_rows_are_left(live: LiveText) -> None:
    with LiveActivations(live, source(live, harvesters=2), batch_size_tokens=32) as batches:
        next(batches)
        victim = batches.harvesters[1]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        wanted = rf"harvester 2 of 2 \(process {victim.pid}, on cpu\) was killed by SIGKILL .*memory"
        with pytest.raises(UserError, match=wanted):
            take(batches, 100)


def test_what_stops_a_harvester_is_told_in_one_line(live: LiveText) -> None:
    # The subject is loaded by the harvester.
    gone = replace(live, subject=SubjectConfig(path="nowhere/at/all"))
    with (
        LiveActivations(gone, source(live, harvesters=1), batch_size_tokens=32) as batches,
        pytest.raises(UserError, match=r"harvester 1 of 1 .* stopped: .*nowhere/at/all") as told,
    ):
        next(batches)
    assert "\n" not in str(told.value)
    few = replace(live, text=replace(live.text, documents_per_block=64))
    with (
        LiveActivations(few, source(live), batch_size_tokens=32, rank=1, ranks=2) as batches,
        pytest.raises(UserError, match=r"has no text for harvester 2 of 2.*lower source.harvesters"),
    ):
        take(batches, 100)


def test_a_ring_that_is_too_small_is_refused_with_the_least_that_works(live: LiveText) -> None:
    small = source(live, ring_bytes=1_000)
    with pytest.raises(UserError, match=r"source.ring_bytes=1000 holds .*; use at least (\d+)") as told:
        LiveActivations(live, small, batch_size_tokens=32)
    least = int(str(told.value).rsplit(" ", 1)[1])
    with pytest.raises(UserError, match=f"use at least {least}"):
        LiveActivations(live, replace(small, ring_bytes=least - 1), batch_size_tokens=32)
    with LiveActivations(live, replace(small, ring_bytes=least), batch_size_tokens=32) as batches:
        take(batches, 3)
