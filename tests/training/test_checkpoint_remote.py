"""Checkpoints at a URL, on servers over a socket."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.loop
from activation_store.errors import UserError
from activation_store.places import RemotePath
from activation_store.retries import Retries
from launch.main import main
from tests.store.s3 import BUCKET
from tests.store.test_object_storage import Cloud, azurite, cloud, credentials, endpoint
from tests.training.runs import assert_same_bits, checkpoint_tensors, records, tiny_run
from trainer.checkpoint import Checkpointer, checkpoint_paths
from trainer.config import RunConfig
from trainer.train import train

__all__ = ["azurite", "cloud", "credentials", "endpoint"]


class KilledError(Exception):
    """Stands for the end of the process."""


def _save(checkpointer: Checkpointer, step: int) -> None:
    checkpointer.save(step, model={"a": torch.full((3, 4), step)}, optimizer={"a.exp_avg": torch.ones(5)}, state={})
    checkpointer.wait()


def _steps(folder: RemotePath) -> list[str]:
    return [path.name for path in checkpoint_paths(folder)]


def _remove(folder: RemotePath, name: str) -> None:
    folder.storage.delete((folder / name).key)


def test_the_newest_are_kept_and_what_is_not_whole_is_passed_over(
    cloud: Cloud, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RemotePath(cloud.at("kept"))
    checkpointer = Checkpointer(tmp_path, folder=folder, background=True)
    assert checkpointer.to_resume() is None
    for step in (5, 10, 15):
        _save(checkpointer, step)
    assert _steps(folder) == ["step_00000010", "step_00000015"]
    newest = checkpointer.newest_good()
    assert newest is not None
    assert torch.equal(newest.reader().tensor("a"), torch.full((3, 4), 15))
    _remove(folder, "step_00000015/COMPLETE")
    older = checkpointer.newest_good()
    assert older is not None
    assert older.step == 10
    assert "step_00000015 is damaged (COMPLETE is missing)" in capsys.readouterr().err
    (folder / "step_00000010/model_00000.safetensors").storage.put("step_00000010/model_00000.safetensors", b"x")
    with pytest.raises(UserError, match="none that can be used"):
        checkpointer.to_resume()
    assert "model_00000.safetensors has changed" in capsys.readouterr().err
    # Left by a larger mesh that was killed: gone before the step comes again.
    folder.storage.put("step_00000015/model_00007.safetensors", b"x")
    _save(checkpointer, 15)
    newest = checkpointer.newest_good()
    assert newest is not None
    assert newest.step == 15
    assert len(list(folder.storage.list_all("step_00000015"))) == 5


def test_an_upload_that_is_lost_is_sent_again_and_one_that_fails_leaves_nothing(
    cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # That of one part: what is tried again for longer waits for longer.
    monkeypatch.setattr("activation_store.object_storage._PART_RETRIES", 3)
    proxy, folder = cloud.proxy, RemotePath(cloud.at("faults"))
    checkpointer = Checkpointer(tmp_path, folder=folder, background=True)
    faults = ["503", "drop", "", "503", "", "", "drop", "503", "", "drop", "lose"]
    proxy.fault = lambda method, number: faults.pop(0) if faults and method in ("PUT", "POST") else ""
    _save(checkpointer, 5)
    assert (faults, proxy.faults) == ([], 7)
    assert checkpointer.newest_good() is not None
    proxy.fault = lambda method, number: "503" if method in ("PUT", "POST") else ""
    hasty = Retries(seconds=0.2, first_pause=0.1)
    checkpointer = Checkpointer(tmp_path, folder=RemotePath(cloud.at("faults", retries=hasty)), background=True)
    with pytest.raises(UserError, match="the checkpoint of step 10 was not written, older ones are kept") as error:
        _save(checkpointer, 10)
    assert "\n" not in str(error.value)
    proxy.fault = lambda method, number: ""
    assert _steps(folder) == ["step_00000005"]


def test_a_run_goes_on_from_a_url_with_the_same_bits(
    tiny_store: RunConfig, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    config = tiny_run(tiny_store, tmp_path / "local")
    train(config)
    url = f"s3://{BUCKET}/runs/a"
    remote = tiny_run(tiny_store, tmp_path / "remote", {"train.checkpoint_path": url})
    real = trainer.loop.check_finite

    def die(*args: Any, step: int, **kwargs: Any) -> float:
        if step == 8:
            raise KilledError
        return real(*args, step=step, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("trainer.loop.check_finite", die)
        with pytest.raises(KilledError):
            train(remote)
    assert train(remote).resumed_from == 5
    assert not (tmp_path / "remote/checkpoints").exists()
    assert records(remote.run) == records(config.run)
    assert_same_bits(checkpoint_tensors(remote.run, remote), checkpoint_tensors(config.run))
    for words in (["verify", remote.run], ["verify", url], ["info", url]):
        assert main(["checkpoint", *words]) == 0
    assert "step        12, 1,152 tokens" in capsys.readouterr().out
    assert main(["checkpoint", "convert", url, f"output={tmp_path / 'plain'}"]) == 0
    # Another run's are neither gone on from nor removed.
    other = tiny_run(tiny_store, tmp_path / "other", {"train.checkpoint_path": url, "model.seed": 9})
    with pytest.raises(UserError, match=r"holds checkpoints of another config: model.seed: 1 there, 9 asked for"):
        train(other)
    other.train = replace(other.train, fresh=True)
    with pytest.raises(UserError, match="holds checkpoints of run="):
        train(other)
    remote.train = replace(remote.train, fresh=True)
    assert train(remote).resumed_from is None
