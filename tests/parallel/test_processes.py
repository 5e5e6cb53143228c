"""The helper that runs tests on real processes."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.parallel.processes import Processes, RankError
from trainer.config import ParallelConfig
from trainer.parallel.mesh import open_mesh


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


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _uses_a_mesh() -> int:
    with open_mesh(ParallelConfig(data=2), torch.device("cpu")) as mesh:
        # All ranks meet in each group, as runs do: else one may end it while another is still connecting to it.
        for group in (mesh.data.group, dist.new_group(backend="gloo")):
            dist.all_reduce(torch.ones(1), group=group)
        return _threads()


def _threads_of_a_mesh() -> tuple[int, int, int]:
    """Of this process before, while a mesh is there, and after."""
    return _threads(), _uses_a_mesh(), _threads()


def test_a_run_in_processes_that_go_on_leaves_no_thread_behind(two_ranks: Processes) -> None:
    """Of many runs, they would take all of a processor."""
    two_ranks.run(_sum_of_ranks, 0)
    for before, inside, after in two_ranks.run(_threads_of_a_mesh):
        assert inside > before == after
