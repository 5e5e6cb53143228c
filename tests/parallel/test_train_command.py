"""The commands under torchrun: a run on a mesh is evaluated and published by one process, as any run; a run of one
process is evaluated on a mesh.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.main import main
from tests.job import Job, working_in
from tests.parallel.processes import free_port
from tests.training.runs import assert_close


def test_a_run_under_torchrun_is_evaluated_and_published_as_that_of_one_process(
    job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(job.folder / "store", tmp_path / "store")
    words = job.words_with(parallel__feature="2", train__profile="true", kernels__backend="reference")
    with working_in(tmp_path):
        done = _torchrun("train", *words)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("train: wrote 12 steps to run") == 1
        mesh = "train: 2 processes, data=1 x feature=2; engine plain; decoders by rows: about "
        line = next(line for line in done.stderr.splitlines() if line.startswith(mesh))
        assert "(two CPU processes of one machine)" in line
        assert main(["evaluate", "run=run", "eval.documents=6", "launch.threads=1"]) == 0
        assert main(["publish", "run=run", "output=published", "launch.threads=1"]) == 0
    capfd.readouterr()
    _same_figures(tmp_path / "run/evaluation.json", job.folder / "run/evaluation.json")
    files = sorted(path.name for path in (job.folder / "published").glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "published").glob("*.safetensors")) == files
    for name in files:
        _same_weights(tmp_path / "published" / name, job.folder / "published" / name)
    for rank in range(2):
        _shows_the_work(tmp_path / f"run/profile/rank_{rank:05d}.json.gz")


def test_evaluation_under_torchrun_is_that_of_one_process(
    job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In float32, as a user has it: rounding shows."""
    for name in ("store", "run"):
        shutil.copytree(job.folder / name, tmp_path / name)
    for path in (tmp_path / "run/evaluation.json", tmp_path / "run/plots/summary.png"):
        path.unlink()
    words = ["run=run", "eval.documents=6", "launch.threads=1"]
    with working_in(tmp_path):
        done = _torchrun("evaluate", "parallel.feature=2", *words)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("wrote run/evaluation.json and 5 plots in run/plots") == 1
        assert done.stderr.count("6 held-out documents") == 1
        assert main(["publish", "run=run", "output=published", "launch.threads=1"]) == 0
    capfd.readouterr()
    found, wanted = (json.loads((folder / "run/evaluation.json").read_text()) for folder in (tmp_path, job.folder))
    assert_close(found, wanted, "evaluation.json", rel=1e-3, absolute=1e-6)
    assert (tmp_path / "run/plots/summary.png").is_file()


def _torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    """The command on two processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, "--master-port", str(free_port()), "-m", "launch.main", *words],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
        check=False,
    )


def _same_figures(found: Path, wanted: Path) -> None:
    ours, theirs = (json.loads(path.read_text()) for path in (found, wanted))
    assert ours["fvu"] == pytest.approx(theirs["fvu"], rel=1e-3)
    assert ours["l0"] == pytest.approx(theirs["l0"], rel=1e-2)
    assert ours["replacement"]["kl"] == pytest.approx(theirs["replacement"]["kl"], rel=1e-2)


def _same_weights(found: Path, wanted: Path) -> None:
    """But for what a selection that rounding has turned moves."""
    ours, theirs = load_file(found), load_file(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        away = (ours[name] - tensor).abs() > 1e-3 * tensor.abs().max()
        assert float(away.to(torch.float32).mean()) < 0.02, f"{found.name} {name}"


def _shows_the_work(trace: Path) -> None:
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    threads = {event["name"]: event["tid"] for event in events if "tid" in event}
    wanted = {"step: forward and backward", "step: update", "feed: spread"}
    assert wanted <= threads.keys()
    assert threads["feed: spread"] != threads["step: update"]
    assert sum(event["name"] == "step: update" for event in events) >= 3
    assert any(event["name"].startswith("gloo:") for event in events)
