"""The helper that runs tests on real processes."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel.processes import Processes, RankError


def _sum_of_ranks(add: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([dist.get_rank() + add])
    dist.all_reduce(total)
    return dist.get_rank(), total


def _fails_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} fails on purpose")
    dist.barrier()


def _sleeps_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def test_results_errors_and_hanging_ranks(two_ranks: Processes) -> None:
    assert [(rank, int(total)) for rank, total in two_ranks.run(_sum_of_ranks, 5)] == [(0, 11), (1, 11)]
    with pytest.raises(RankError, match=r"(?s)rank 1:.*rank 1 fails on purpose"):
        two_ranks.run(_fails_on, 1)
    # New processes were started.
    assert [int(total) for _, total in two_ranks.run(_sum_of_ranks, 0)] == [1, 1]
    with pytest.raises(RankError, match=r"no answer from ranks \[0\]"):
        two_ranks.run(_sleeps_on, 0, timeout=1)
