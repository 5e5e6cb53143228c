"""What launchers say, in their words and ours."""

import pytest

from activation_store.errors import UserError
from trainer.config import EngineConfig, EngineKind, ParallelConfig, RunConfig
from trainer.parallel.engine import engine_name
from trainer.parallel.launcher import adopt_launcher, first_host, launching_words
from trainer.parallel.mesh import Axis, Mesh
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
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert launching_words() == ["srun", "-n", "8", "layerloom"]
    for tasks, said in (("4(x2)", ["--ntasks-per-node", "4"]), ("8", ["--ntasks-per-node", "8"]), ("4(x1),2(x2)", [])):
        monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
        assert launching_words() == ["srun", "-n", "8", *said, "layerloom"]
    monkeypatch.setenv("MASTER_ADDR", "n3")
    monkeypatch.setenv("MASTER_PORT", "29400")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert launching_words() == ["torchrun", "--nproc-per-node", "8", "-m", "launch.main"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "n3:29400"]
    wanted = ["torchrun", "--nnodes", "2", *meeting, "--nproc-per-node", "4", "-m", "launch.main"]
    assert launching_words() == wanted


def test_the_engine_that_is_named_is_the_one_that_runs() -> None:
    fsdp = RunConfig(engine=EngineConfig(kind=EngineKind.fsdp))
    assert engine_name(fsdp, Mesh(data=Axis(2))) == "fsdp"
    said = "plain (fsdp has nothing to shard with parallel.data=1)"
    assert engine_name(fsdp, Mesh(feature=Axis(2))) == said
    assert engine_name(RunConfig(), Mesh(feature=Axis(2))) == "plain"


def test_columns_that_cannot_be_split_evenly_are_refused_with_the_nearest_sizes() -> None:
    check_columns(16, ParallelConfig(feature=4))
    with pytest.raises(UserError, match=r"d_model=18 .* parallel.feature=4.* use parallel.feature=3 or 6, or"):
        check_columns(18, ParallelConfig(feature=4))
