"""Checkpoints: the file format against the safetensors library, damage, retention, full disks."""

import errno
import json
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from activation_store.errors import UserError
from trainer.checkpoint import Checkpoint, Checkpointer, check_space
from trainer.saving.storage import PartsWriter
from trainer.tensor_file import hash_file, write_tensors

FILES = ["model_00000.safetensors", "optimizer_00000.safetensors", "index.json", "state.json", "COMPLETE"]


def _tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "odd": torch.rand(3, 5, 7, generator=generator),
        "mask": torch.rand(5, generator=generator) > 0.5,
        "transposed": torch.rand(4, 3, generator=generator).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "half": torch.rand(3, generator=generator).bfloat16(),
        "counts": torch.arange(6).view(2, 3),
        "empty": torch.zeros(0, 4),
    }


def _save(checkpointer: Checkpointer, step: int) -> Path:
    checkpointer.save(step, model=_tensors(step), optimizer=_tensors(step + 1), state={"step": step, "a": [1]})
    checkpointer.wait()
    assert isinstance(checkpointer.newest, Path)
    assert checkpointer.newest.name == f"step_{step:08d}"
    return checkpointer.newest


def _loaded(checkpoint: Checkpoint | None) -> dict[str, Tensor]:
    assert checkpoint is not None
    target = {name: torch.zeros_like(tensor) for name, tensor in _tensors().items()}
    checkpoint.load_model(target)
    return target


def _steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_files_are_safetensors_and_hashed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    written = write_tensors(path, _tensors())
    assert written == hash_file(path)
    assert written.n_bytes == path.stat().st_size
    for name, tensor in load_file(path).items():
        assert tensor.dtype == _tensors()[name].dtype
        assert torch.equal(tensor, _tensors()[name])


def test_torch_alone_reads_a_checkpoint(tmp_path: Path) -> None:
    path = _save(Checkpointer(tmp_path), 10)
    (path / "optimizer_00000.safetensors").unlink()
    target = {name: torch.zeros_like(tensor) for name, tensor in _tensors().items() if name != "mask"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process
        load(target, storage_reader=HuggingFaceStorageReader(str(path)))
    assert all(torch.equal(tensor, _tensors(10)[name]) for name, tensor in target.items())
    assert load_file(path / "model_00000.safetensors").keys() == _tensors().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"odd": torch.zeros(3, 5, 8)}, "odd is torch.float32 .3, 5, 7., the model's is torch.float32 .3, 5, 8."),
        ({"odd": torch.zeros(3, 5, 7).double()}, "odd is torch.float32"),
        ({"more": torch.zeros(1)}, "lacks tensor more"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    _save(Checkpointer(tmp_path), 10)
    newest = Checkpointer(tmp_path).newest_good()
    assert newest is not None
    with pytest.raises(UserError, match=message):
        newest.load_model(_tensors() | change)
    with pytest.raises(UserError, match=message):
        newest.load_optimizer(_tensors() | change)


def test_the_newest_are_kept_and_loaded(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    assert checkpointer.newest_good() is None
    for step in (5, 10, 15):
        _save(checkpointer, step)
    assert _steps(tmp_path) == ["step_00000010", "step_00000015"]
    newest = checkpointer.newest_good()
    assert newest is not None
    assert (newest.step, newest.state["a"]) == (15, [1])
    assert all(torch.equal(tensor, _tensors(15)[name]) for name, tensor in _loaded(newest).items())


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [_flip_a_bit, _truncate, os.unlink])
def test_a_damaged_newest_is_passed_over_in_one_line(
    tmp_path: Path, name: str, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpointer = Checkpointer(tmp_path, keep=3)
    for step in (5, 10):
        path = _save(checkpointer, step)
    assert sorted(FILES) == sorted(file.name for file in path.iterdir())
    damage(tmp_path / "checkpoints/step_00000010" / name)
    if name == "COMPLETE" and damage is _flip_a_bit:  # the last byte is a newline
        (tmp_path / "checkpoints/step_00000010/COMPLETE").write_text("0123456789abcdef")
    newest = checkpointer.newest_good()
    assert newest is not None
    assert newest.step == 5
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(said) == 1
    assert "step_00000010 is damaged" in said[0]
    # The next one supersedes the damaged one, and never counts it among those to keep.
    checkpointer.keep = 2
    _save(checkpointer, 7)
    assert _steps(tmp_path) == ["step_00000005", "step_00000007"]


def test_a_damaged_one_is_overwritten_when_its_step_comes_again(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1)
    _save(checkpointer, 10)
    _truncate(tmp_path / "checkpoints/step_00000010/model_00000.safetensors")
    assert checkpointer.newest_good() is None
    _save(checkpointer, 10)
    newest = checkpointer.newest_good()
    assert newest is not None
    assert newest.step == 10


def test_only_the_files_asked_for_are_verified(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    _save(checkpointer, 10)
    _flip_a_bit(tmp_path / "checkpoints/step_00000010/optimizer_00000.safetensors")
    assert checkpointer.newest_good(model_only=True) is not None
    assert checkpointer.newest_good() is None


def test_a_half_written_one_is_invisible_and_swept_up(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    partial = tmp_path / "checkpoints/.step_00000005.partial"
    partial.mkdir(parents=True)
    (partial / "model_00000.safetensors").write_bytes(b"half")
    assert checkpointer.newest_good() is None
    _save(checkpointer, 10)
    assert _steps(tmp_path) == ["step_00000010"]


def _of_another_version(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    state["format_version"] = 99
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "COMPLETE").write_text(hash_file(folder / "state.json").xxh3_64)


def test_a_checkpoint_of_another_format_version_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpointer = Checkpointer(tmp_path)
    _of_another_version(_save(checkpointer, 10))
    assert checkpointer.newest_good() is None
    assert "step_00000010 cannot be used (format version 99" in capsys.readouterr().err


def test_what_was_passed_over_without_damage_stays_and_does_not_count(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (5, 10):
        _save(checkpointer, step)
    _of_another_version(tmp_path / "checkpoints/step_00000010")
    unreadable = tmp_path / "checkpoints/step_00000020"  # its COMPLETE is a folder: an OSError, not a missing file
    (unreadable / "COMPLETE").mkdir(parents=True)
    names = [f"step_{step:08d}" for step in (5, 7, 10, 20)]
    _save(checkpointer, 7)
    assert _steps(tmp_path) == names
    _save(checkpointer, 12)
    assert _steps(tmp_path) == ["step_00000007", "step_00000010", "step_00000012", "step_00000020"]
    _save(checkpointer, 15)
    assert _steps(tmp_path) == ["step_00000012", "step_00000015", "step_00000020"]


def test_resuming_is_refused_when_no_checkpoint_is_good(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.to_resume() is None
    for step in (5, 10):
        _truncate(_save(checkpointer, step) / "model_00000.safetensors")
    _truncate(tmp_path / "checkpoints/step_00000005/state.json")
    with pytest.raises(UserError, match=r"none that can be used .*train\.fresh=true") as error:
        checkpointer.to_resume()
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_older_checkpoints_and_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    checkpointer = Checkpointer(tmp_path, background=background)
    _save(checkpointer, 5)
    real_open = Path.open

    def open_full(path: Path, *args: Any, **kwargs: Any) -> Any:
        full = path.name == "optimizer_00000.safetensors" and args == ("wb",)
        return real_open(Path("/dev/full") if full else path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(UserError, match=f"disk .* is full .* `layerloom train run={tmp_path}`"):
            _save(checkpointer, 10)
    assert _steps(tmp_path) == ["step_00000005"]
    newest = checkpointer.newest_good()
    assert newest is not None
    assert newest.step == 5


def test_a_disk_too_small_for_the_checkpoints_is_refused(tmp_path: Path) -> None:
    check_space(tmp_path, n_bytes=1000, keep=2)
    with pytest.raises(UserError, match=r"checkpoints need 3e\+03 TB|checkpoints need .* TB .* are free"):
        check_space(tmp_path, n_bytes=10**15, keep=2)
    assert list(tmp_path.iterdir()) == []


# --- while training goes on ------------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until the event is set, for ten seconds at most."""
    released, real = threading.Event(), PartsWriter.write_data

    def write_data(self: PartsWriter, *args: Any) -> Any:
        assert released.wait(10)
        return real(self, *args)

    monkeypatch.setattr(PartsWriter, "write_data", write_data)
    return released


def test_what_is_written_is_what_was_saved_whatever_becomes_of_the_tensors(
    tmp_path: Path, slow: threading.Event
) -> None:
    checkpointer, tensors, done = Checkpointer(tmp_path, background=True), _tensors(1), []
    with checkpointer:
        checkpointer.save(1, model=tensors, optimizer={}, state={}, durable=lambda: done.append(_steps(tmp_path)))
        for tensor in tensors.values():
            tensor.zero_()
        assert done == []
        assert checkpointer.newest is None
        assert checkpointer.newest_good() is None
        slow.set()
    assert done == [["step_00000001"]]
    assert all(torch.equal(tensor, _tensors(1)[name]) for name, tensor in _loaded(checkpointer.newest_good()).items())


def test_one_is_in_flight_at_a_time(tmp_path: Path, slow: threading.Event) -> None:
    with Checkpointer(tmp_path, background=True) as checkpointer:
        checkpointer.save(1, model=_tensors(1), optimizer={}, state={})
        timer = threading.Timer(0.2, slow.set)
        timer.start()
        checkpointer.save(2, model=_tensors(2), optimizer={}, state={})
        assert _steps(tmp_path)[-1] == "step_00000001"
        timer.join()
    assert _steps(tmp_path) == ["step_00000001", "step_00000002"]


def test_a_failure_in_the_background_is_raised_in_one_line_by_whoever_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    checkpointer = Checkpointer(tmp_path, background=True)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.saving.storage.write_pieces", fail)
        checkpointer.save(1, model=_tensors(1), optimizer={}, state={})
        with pytest.raises(UserError, match="Input/output error: the checkpoint of step 1 was not written") as error:
            checkpointer.save(2, model=_tensors(2), optimizer={}, state={})
        assert "\n" not in str(error.value)
        assert _steps(tmp_path) == []
        with pytest.raises(UserError, match="step 3 was not written"), checkpointer:
            checkpointer.save(3, model=_tensors(3), optimizer={}, state={})
        # After another error it is said, and does not hide that one.
        with pytest.raises(ValueError, match="other"):
            _save_and_raise(checkpointer, 4, ValueError("other"), threading.Event())
    assert "step 4 was not written" in capsys.readouterr().err
    checkpointer.save(5, model=_tensors(5), optimizer={}, state={})
    checkpointer.wait()
    assert _steps(tmp_path) == ["step_00000005"]


def _save_and_raise(checkpointer: Checkpointer, step: int, error: BaseException, released: threading.Event) -> None:
    with checkpointer:
        checkpointer.save(step, model=_tensors(step), optimizer={}, state={})
        threading.Timer(0.2, released.set).start()
        raise error


def test_an_error_of_training_lets_it_be_written_and_ctrl_c_stops_it(tmp_path: Path, slow: threading.Event) -> None:
    with pytest.raises(ValueError, match="other"):
        _save_and_raise(Checkpointer(tmp_path, background=True), 1, ValueError("other"), slow)
    assert _steps(tmp_path) == ["step_00000001"]
    slow.clear()
    with pytest.raises(KeyboardInterrupt):
        _save_and_raise(Checkpointer(tmp_path, background=True), 2, KeyboardInterrupt(), slow)
    assert _steps(tmp_path) == ["step_00000001"]
