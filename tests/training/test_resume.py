"""A run that is stopped in whatever way and continued ends with the same bits as one that never was."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from activation_store.errors import UserError
from tests.training.runs import ACTIVATIONS, assert_same_bits, checkpoint_tensors, records, tiny_run
from trainer.config import RunConfig
from trainer.parallel.plain import PlainEngine
from trainer.run_folder import save_config
from trainer.train import train


class KilledError(Exception):
    """Stands for the end of the process: nothing in the trainer catches it."""


@pytest.fixture(scope="module")
def uninterrupted(tiny_store: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunConfig, Any]]:
    """For every activation a finished run: its config and the tensors of its last checkpoint."""
    done = {}
    for name, overrides in ACTIVATIONS.items():
        config = tiny_run(tiny_store, tmp_path_factory.mktemp(name) / "run", overrides)
        train(config)
        done[name] = (config, checkpoint_tensors(config.run))
    return done


def _die_in_update(monkeypatch: pytest.MonkeyPatch, step: int, first_step: int = 1) -> None:
    """Ends the run in the middle of update `step`, after its gradients."""
    steps = iter(range(first_step, 10_000))
    real = PlainEngine.update

    def update(self: PlainEngine, norm: float) -> None:
        if next(steps) == step:
            raise KilledError
        real(self, norm)

    monkeypatch.setattr(PlainEngine, "update", update)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_killed_and_resumed_gives_the_same_bits(
    uninterrupted: dict[str, tuple[RunConfig, dict[str, Tensor]]],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, tensors = uninterrupted[name]
    again = tiny_run(config, tmp_path / "run", ACTIVATIONS[name])
    with monkeypatch.context() as patch:
        _die_in_update(patch, step=8)
        with pytest.raises(KilledError):
            train(again)
    summary = train(again)
    assert summary.resumed_from == 5
    assert_same_bits(checkpoint_tensors(again.run), tensors)
    assert records(again.run) == records(config.run)


def test_the_fixtures_exercise_what_they_are_for(uninterrupted: dict[str, tuple[RunConfig, Any]]) -> None:
    for name, (config, tensors) in uninterrupted.items():
        last = [record for record in records(config.run) if "loss" in record][-1]
        if name != "relu":  # with so few features, all of relu's stay alive
            assert last["dead_fraction"] > 0, name
            assert last["auxk"] > 0, name
        if name == "jumprelu":
            assert last["penalty"] > 0
        if "batchtopk" in name:
            assert tensors["running_threshold_L"].isfinite().all()


@pytest.mark.parametrize(("step", "every"), [(1, 1), (6, 1), (2, 4), (9, 4), (12, 4)])
def test_killed_at_any_step_and_twice(
    uninterrupted: dict[str, tuple[RunConfig, dict[str, Tensor]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    every: int,
) -> None:
    config, tensors = uninterrupted["topk"]
    again = tiny_run(config, tmp_path / "run", ACTIVATIONS["topk"])
    again.train.checkpoint_every = every
    for _ in range(2):
        saved = (step - 1) // every * every
        with monkeypatch.context() as patch:
            _die_in_update(patch, step, first_step=1 if not _ else saved + 1)
            with pytest.raises(KilledError):
                train(again)
    summary = train(again)
    assert summary.resumed_from == (saved or None)
    assert_same_bits(checkpoint_tensors(again.run), tensors)
    assert records(again.run) == records(config.run)


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(
    uninterrupted: dict[str, tuple[RunConfig, dict[str, Tensor]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, tensors = uninterrupted["batchtopk"]
    again = tiny_run(config, tmp_path / "run", ACTIVATIONS["batchtopk"])
    shutil.copytree(config.run, again.run)
    newest = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    os.truncate(newest / "optimizer_00000.safetensors", 100)
    summary = train(again)
    assert summary.resumed_from == 10
    assert "step_00000012 is damaged (optimizer_00000.safetensors has changed)" in capsys.readouterr().err
    assert_same_bits(checkpoint_tensors(again.run), tensors)
    assert records(again.run) == records(config.run)


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_continue(
    uninterrupted: dict[str, tuple[RunConfig, dict[str, Tensor]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, tensors = uninterrupted["jumprelu"]
    again = tiny_run(config, tmp_path / "run", ACTIVATIONS["jumprelu"])
    real = PlainEngine.update
    steps = iter(range(1, 100))

    def update(self: PlainEngine, norm: float) -> None:
        if next(steps) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        real(self, norm)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(PlainEngine, "update", update)
        with pytest.raises(KeyboardInterrupt):
            train(again)
    assert signal.getsignal(signal.SIGINT) is before
    said = capsys.readouterr().err
    assert f"train: stopped at step 7 of 12; continue with `layerloom train run={again.run}`" in said
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "step_00000005",
        "step_00000007",
    ]
    assert train(again).resumed_from == 7
    assert_same_bits(checkpoint_tensors(again.run), tensors)
    assert records(again.run) == records(config.run)


def test_ctrl_c_in_the_last_step_saves_and_still_interrupts(
    uninterrupted: dict[str, tuple[RunConfig, dict[str, Tensor]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, tensors = uninterrupted["topk"]
    again = tiny_run(config, tmp_path / "run", ACTIVATIONS["topk"])
    real, steps = PlainEngine.update, iter(range(1, 100))

    def update(self: PlainEngine, norm: float) -> None:
        if next(steps) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, norm)

    monkeypatch.setattr(PlainEngine, "update", update)
    with pytest.raises(KeyboardInterrupt):
        train(again)
    assert "train: stopped at step 12 of 12; training is complete" in capsys.readouterr().err
    assert_same_bits(checkpoint_tensors(again.run), tensors)


def test_damage_to_every_checkpoint_is_refused_unless_fresh(
    uninterrupted: dict[str, tuple[RunConfig, dict[str, Tensor]]], tmp_path: Path
) -> None:
    config, tensors = uninterrupted["topk"]
    again = tiny_run(config, tmp_path / "run", ACTIVATIONS["topk"])
    shutil.copytree(config.run, again.run)
    for file in (tmp_path / "run/checkpoints").glob("*/model_*.safetensors"):
        os.truncate(file, 100)
    with pytest.raises(UserError, match=r"none that can be used .*train\.fresh=true"):
        train(again)
    assert records(again.run) == records(config.run)
    again.train.fresh = True
    train(again)
    assert_same_bits(checkpoint_tensors(again.run), tensors)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_disk_that_fills_under_the_metrics_is_told_in_one_line(run: RunConfig) -> None:
    Path(run.run).mkdir()
    save_config(run.run, run)
    metrics = Path(run.run) / "metrics.jsonl"
    metrics.symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"disk of .* is full .*`layerloom train run={run.run}`") as error:
        train(run)
    assert "\n" not in str(error.value)
    metrics.unlink()
    assert train(run).resumed_from is None


def test_other_errors_of_the_disk_stay_what_they_are(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("trainer.metrics.MetricsLog.write", fail)
    with pytest.raises(OSError, match="Input/output error"):
        train(run)


_CHILD = """
import sys, torch
torch.set_num_threads(1)
from trainer.run_folder import load_config
from trainer.train import train
train(load_config(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_process_killed_for_real(tiny_store: RunConfig, tmp_path: Path, number: signal.Signals) -> None:
    overrides = {"train.tokens": 96 * 40, "train.checkpoint_every": 4, "train.log_every": 1, "train.eval_every": 0}
    config = tiny_run(tiny_store, tmp_path / "whole", overrides)
    train(config)
    again = tiny_run(tiny_store, tmp_path / "killed", overrides)
    Path(again.run).mkdir()
    save_config(again.run, again)
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, again.run],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
    )
    # Its second checkpoint is whole when the third is begun; and well before the end.
    deadline = time.monotonic() + 120
    while len(records(again.run)) < 13 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    reached = len(records(again.run))
    assert 13 <= reached < 40, said
    if number == signal.SIGTERM:
        assert f"continue with `layerloom train run={again.run}`" in said
        assert "AgreedInterruptError" in said
    else:
        assert child.returncode == -signal.SIGKILL
    summary = train(again)
    assert summary.resumed_from is not None
    assert summary.resumed_from >= 8
    if number == signal.SIGTERM:
        assert summary.resumed_from == reached
    assert_same_bits(checkpoint_tensors(again.run), checkpoint_tensors(config.run))
    assert records(again.run) == records(config.run)


def test_a_complete_run_is_left_alone(
    uninterrupted: dict[str, tuple[RunConfig, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = uninterrupted["topk"]
    monkeypatch.delattr("trainer.train.Loop")  # nothing may be built
    before = {path: path.stat().st_mtime_ns for path in Path(config.run).rglob("*.safetensors")}
    summary = train(config)
    assert (summary.resumed_from, summary.steps) == (12, 12)
    assert summary.metrics["step"] == 12
    assert 0 < summary.metrics["eval"]["fvu"] < 1.5
    assert "is complete (12 steps); nothing to do" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in Path(config.run).rglob("*.safetensors")}


def test_fresh_starts_over(run: RunConfig) -> None:
    train(run)
    first = checkpoint_tensors(run.run)
    run.model.seed = 5
    with pytest.raises(UserError, match=r"model.seed: 1 there, 5 asked for"):
        train(run)
    run.train.fresh = True
    summary = train(run)
    assert summary.resumed_from is None
    second = checkpoint_tensors(run.run)
    assert not first["layers.0.W_enc"].equal(second["layers.0.W_enc"])
    assert [record["step"] for record in records(run.run)] == [1, 3, 4, 6, 8, 9, 12, 12]


def test_another_thread_count_is_warned_of(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        _die_in_update(patch, step=6)
        with pytest.raises(KilledError):
            train(run)
    with monkeypatch.context() as patch:
        patch.setattr("torch.get_num_threads", lambda: 7)
        train(run)
    assert "the same bits are promised only on the same set-up; threads: 1 then, 7 now" in capsys.readouterr().err
