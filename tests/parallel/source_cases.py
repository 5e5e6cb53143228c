"""What the processes of test_train_sources.py run."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest import mock

import torch

from activation_store.background import BackgroundBatches
from activation_store.batch import ActivationBatch
from activation_store.rolling import RollingFolder, RollingState
from activation_store.rolling_harvest import harvest_rolling
from tests.parallel.resume_cases import train_until
from tests.parallel.training import in_double
from trainer.config import RunConfig
from trainer.sources import Batches, LiveSource
from trainer.train import train


@dataclass(frozen=True)
class Seen:
    """What a rank's call of `train` saw: the rows of its source's batches, also of those that were read ahead, and of
    each freeing the first window that stays and where the checkpoints that there were then begin: (batch, group).
    """

    batches: list[list[int]] = field(default_factory=list)
    freed: list[tuple[int, list[tuple[int, int]]]] = field(default_factory=list)
    resumed_from: list[int | None] = field(default_factory=list)


def train_seen(config: RunConfig, *, killed_in: int | None = None) -> Seen:
    """Trains in float64; with `killed_in`, until that step."""
    seen = Seen()
    with in_double(), _recorded(config, seen):
        if killed_in is not None:
            train_until(config, killed_in)
        else:
            seen.resumed_from.append(train(config).resumed_from)
    return seen


def train_all_seen(configs: Sequence[RunConfig]) -> list[Seen]:
    """One after another."""
    return [train_seen(config) for config in configs]


@contextmanager
def _recorded(config: RunConfig, seen: Seen) -> Iterator[None]:
    take, free = BackgroundBatches.__next__, RollingFolder.free

    def take_and_tell(batches: BackgroundBatches) -> ActivationBatch:
        batch = take(batches)
        seen.batches.append(batch.rows.tolist())
        return batch

    def tell_and_free(folder: RollingFolder, first: int) -> RollingState:
        seen.freed.append((first, _checkpoints(Path(config.run))))
        return free(folder, first)

    with (
        mock.patch.object(BackgroundBatches, "__next__", take_and_tell),
        mock.patch.object(RollingFolder, "free", tell_and_free),
    ):
        yield


def _checkpoints(run: Path) -> list[tuple[int, int]]:
    """Of those that are complete: the next batch and its group."""
    found = []
    for complete in run.glob("checkpoints/step_*/COMPLETE"):
        data = json.loads((complete.parent / "state.json").read_text())["data"]
        found.append((int(data["next_microbatch"]), int(data["source"][0]["group"])))
    return found


class _Joined(Batches):
    """The shares of the ranks of a live run, in one process: what rank 0 reads, then what rank 1 does."""

    def __init__(self, shares: Sequence[Batches]) -> None:
        self._shares = shares

    @property
    def position(self) -> int:
        return self._shares[0].position

    @property
    def epochs(self) -> float:
        return self._shares[0].epochs

    def state(self) -> dict[str, Any]:
        return self._shares[0].state()

    def __next__(self) -> ActivationBatch:
        parts = [next(share) for share in self._shares]
        mlp_in, mlp_out, rows = (torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS)
        return ActivationBatch(mlp_in, mlp_out, rows, parts[0].epoch)

    def close(self) -> None:
        for share in self._shares:
            share.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_TENSORS = ("mlp_in", "mlp_out", "rows")


def train_on_shares(config: RunConfig, ranks: int) -> None:
    """One process trains in float64 on the rows that so many ranks of a live run would read."""
    real = LiveSource.batches

    def batches(source: LiveSource, position: int, states: Any, **kwargs: Any) -> Batches:
        kwargs.pop("rank"), kwargs.pop("ranks")
        return _Joined([real(source, position, states, rank=rank, ranks=ranks, **kwargs) for rank in range(ranks)])

    with mock.patch.object(LiveSource, "batches", batches), in_double():
        train(config)


def harvest_beside(config: RunConfig) -> None:
    """Fills the rolling store of a run, until training is done."""
    torch.set_num_threads(1)
    harvest_rolling(config.subject, config.text, config.store, config.source, device="cpu")
