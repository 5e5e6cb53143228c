"""What goes wrong on one rank ends all of them, in one line; what stops one stops all, and the run continues."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from activation_store.errors import AgreedError
from tests.parallel.processes import Processes, free_port
from tests.training.runs import checkpoint_tensors, records, tiny_run
from trainer.config import RunConfig
from trainer.metrics import MetricsLog
from trainer.run_folder import save_config
from trainer.train import train

# Kernels that want no compiling.
_MESH = {"parallel.data": 2, "parallel.feature": 2, "parallel.decoder_split": "columns", "kernels.backend": "reference"}


def _error_of(config: RunConfig, full_disk: bool) -> str:
    """The line that this rank's training ends with."""
    real = MetricsLog.write

    def write(log: MetricsLog, record: dict[str, object]) -> None:
        if full_disk and record["step"] == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(log, record)

    MetricsLog.write = write  # type: ignore[method-assign]
    try:
        with pytest.raises(AgreedError) as error:
            train(config)
    finally:
        MetricsLog.write = real  # type: ignore[method-assign]
    return str(error.value)


def test_a_damaged_shard_and_a_full_disk_end_all_ranks_with_one_line(
    tiny_store: RunConfig, four_ranks: Processes, tmp_path: Path
) -> None:
    config = tiny_run(tiny_store, tmp_path / "full", _MESH)
    lines = four_ranks.run(_error_of, config, True)
    assert len(set(lines)) == 1
    assert f"the disk of {config.run} is full" in lines[0]
    assert "continue with `" in lines[0]
    assert "\n" not in lines[0]
    # The one before is as it was: all continue from it.
    assert [summary.resumed_from for summary in four_ranks.run(train, config)] == [5] * 4
    assert [record["step"] for record in records(config.run) if "loss" in record] == [1, 3, 6, 9, 12]

    store = tmp_path / "store"
    shutil.copytree(tiny_store.store.path, store)
    damaged = tiny_run(tiny_store, tmp_path / "damaged", {**_MESH, "store.path": str(store), "source.pool_rows": 32})
    for file in sorted(path for path in (store / "mlp_in/c").rglob("*") if path.is_file())[1:]:
        os.truncate(file, 100)
    lines = four_ranks.run(_error_of, damaged, False)
    assert len(set(lines)) == 1
    assert "layerloom store verify" in lines[0]
    assert "; then " in lines[0]


def test_uneven_meshes_are_refused_before_anything_is_written(
    tiny_store: RunConfig, four_ranks: Processes, tmp_path: Path
) -> None:
    config = tiny_run(tiny_store, tmp_path / "run", {"parallel.feature": 4, "model.n_features": 66})
    lines = four_ranks.run(_refusal_of, config)
    assert lines == ["model.n_features=66 is not divisible by parallel.feature=4; use 64 or 68"] * 4
    assert not (tmp_path / "run").exists()


def _refusal_of(config: RunConfig) -> str:
    with pytest.raises(ValueError, match="parallel") as error:
        train(config)
    return str(error.value)


class _Job:
    """Two processes of the command itself, as torchrun starts them."""

    def __init__(self, run: Path, engine: str) -> None:
        environment = os.environ | {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "PYTHONUNBUFFERED": "1",
        }
        self.run = run
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "launch.main", "train", f"run={run}", "launch.threads=1", f"engine={engine}"],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            for rank in range(2)
        ]

    def wait_for_step(self, step: int) -> None:
        """Until metrics.jsonl has the step."""
        deadline = time.monotonic() + 120
        while not any(record["step"] >= step for record in records(self.run)):
            assert time.monotonic() < deadline, self.end()
            assert all(rank.poll() is None for rank in self.ranks), self.end()
            time.sleep(0.05)

    def end(self) -> list[tuple[int, str]]:
        """Exit code and standard error of each rank."""
        try:
            return [(rank.wait(90), rank.communicate()[1]) for rank in self.ranks]
        finally:
            for rank in self.ranks:
                rank.kill()


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_and_a_killed_rank_ends_the_others(
    tiny_store: RunConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = tiny_run(
        tiny_store,
        run,
        {
            **_MESH,
            "parallel.data": 1,
            "train.tokens": 96 * 100_000,
            "train.log_every": 1,
            "train.checkpoint_every": 0,
        },
    )
    run.mkdir()
    save_config(run, config)
    job = _Job(run, "deepspeed")
    job.wait_for_step(3)
    os.kill(job.ranks[1].pid, signal.SIGINT)
    (first, said), (second, whispered) = job.end()
    assert (first, second, whispered) == (130, 130, "")
    assert "train: stopped at step " in said
    assert f"continue with `torchrun --nproc-per-node 2 -m launch.main train run={run}" in said
    assert said.endswith("layerloom: interrupted\n")
    stopped = records(run)[-1]["step"]
    assert checkpoint_tensors(run)

    job = _Job(run, "plain")
    job.wait_for_step(stopped + 3)
    os.kill(job.ranks[1].pid, signal.SIGKILL)
    (first, said), (second, _) = job.end()
    assert (first, second) == (2, -signal.SIGKILL)
    assert f"continuing {run} from step {stopped} of" in said
    last = [line for line in said.splitlines() if line.startswith("layerloom: ")]
    assert len(last) == 1
    assert "another process of this run ended" in last[0]
    assert f"train run={run}" in last[0]
    assert "Traceback" not in said
