"""The script that compares two commits: the same commit is identical, and a difference is seen."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare_commits
from benchmarks.compare_commits import RUNS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/compare_commits.py"


def test_every_activation_is_compared() -> None:
    words = " ".join(word for overrides in RUNS.values() for word in overrides)
    assert [kind for kind in ("topk", "batchtopk", "jumprelu", "relu") if f"activation={kind}" not in words] == []


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = iter([{"store": "a" * 64, "topk": "b" * 64}, {"store": "a" * 64, "topk": "c" * 64}])
    monkeypatch.setattr(compare_commits, "_hashes", lambda *_: next(found))
    monkeypatch.setattr(compare_commits, "_make_inputs", lambda folder: (folder, folder))
    monkeypatch.setattr("sys.argv", ["compare_commits", ".", "."])
    assert compare_commits.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["identical", "DIFFERENT"]


@pytest.mark.slow
def test_a_commit_is_identical_to_itself() -> None:
    command = [sys.executable, str(SCRIPT), "HEAD", "HEAD", "--only", "L0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("identical") == 2  # the store, and the run
    listed = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "layerloom-compare" not in listed.stdout
