"""What launchers say, in their words and ours."""

import pytest

from activation_store.errors import UserError
from trainer.config import ParallelConfig
from trainer.parallel.launcher import adopt_launcher, first_host, launching_words
from trainer.rules import check_columns

_STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "8",
}


def test_srun_is_translated_once_and_torchrun_goes_first() -> None:
    environment = dict(_STEP)
    adopt_launcher(environment)
    assert {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu07",
    }
    assert 15_000 <= int(environment["MASTER_PORT"]) < 30_000
    other = {**_STEP, "SLURM_STEP_ID": "3"}
    adopt_launcher(other)
    assert other["MASTER_PORT"] != environment["MASTER_PORT"]
    torchrun = {**_STEP, "WORLD_SIZE": "2", "RANK": "1"}
    adopt_launcher(torchrun)
    assert torchrun["RANK"] == "1"


def test_a_batch_script_of_many_tasks_is_one_process() -> None:
    environment = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "4711"}
    adopt_launcher(environment)
    assert "WORLD_SIZE" not in environment


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n3", "n3"), ("n[3-5,8]", "n3"), ("n[08,10]-ib", "n08-ib"), ("n3,m1", "n3"), ("a[1-2],b[3-4]", "a1")],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_the_command_that_starts_a_job_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launching_words() == ["layerloom"]
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert launching_words() == ["srun", "-n", "8", "layerloom"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    wanted = ["torchrun", "--nnodes", "2", "--nproc-per-node", "4", "-m", "launch.main"]
    assert launching_words() == wanted


def test_columns_that_cannot_be_split_evenly_are_refused_with_the_nearest_sizes() -> None:
    check_columns(16, ParallelConfig(feature=4))
    with pytest.raises(UserError, match=r"d_model=18 .* parallel.feature=4.* use parallel.feature=3 or 6, or"):
        check_columns(18, ParallelConfig(feature=4))
