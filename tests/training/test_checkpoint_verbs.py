"""`layerloom checkpoint info | convert | verify`, on a real run and on tensors of any mesh."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.main import main
from tests.training.runs import assert_same_bits, checkpoint_tensors, tiny_run
from trainer.checkpoint import Checkpointer
from trainer.config import RunConfig
from trainer.load import load_run
from trainer.saving.pieces import Piece
from trainer.train import train


@pytest.fixture(scope="module")
def finished(tiny_store: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 12 steps with checkpoints at 10 and 12; read only."""
    config = tiny_run(tiny_store, tmp_path_factory.mktemp("verbs") / "run")
    config.train = replace(config.train, eval_every=0)
    train(config)
    return config


def test_info_of_a_run_is_that_of_its_newest(finished: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "info", finished.run]) == 0
    page = capsys.readouterr().out
    for part in (
        "checkpoints/step_00000012 (format 2)",
        "step        12, 1,152 tokens",
        "written by  1 process, parallel.data=1 parallel.feature=1, engine=plain",
        "topk, cross_layer, 3 layers of 16, 64 features each",
        "F32    12.3 kB  [64, 3, 16]\n",
        "layers.2.W_enc.exp_avg_sq",
        "tokens_since_active_LF  I64 ",
        "n_features: 64",
    ):
        assert part in page
    assert main(["checkpoint", "info", f"run={finished.run}"]) == 0
    assert capsys.readouterr().out == page
    assert main(["checkpoint", "info", f"{finished.run}/checkpoints/step_00000010"]) == 0
    assert "step        10, 960 tokens" in capsys.readouterr().out


def test_verify_names_every_damaged_file(
    finished: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished.run, tmp_path / "run"))
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert ": 2 checkpoints, 6 files, " in capsys.readouterr().out
    ten, twelve = sorted((run / "checkpoints").iterdir())
    os.truncate(ten / "model_00000.safetensors", 100)
    (ten / "optimizer_00000.safetensors").unlink()
    (twelve / "COMPLETE").unlink()
    assert main(["checkpoint", "verify", str(run)]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[:-1] == [
        f"damaged: {twelve}: COMPLETE is missing",
        f"damaged: {ten}: model_00000.safetensors has changed",
        f"damaged: {ten}: optimizer_00000.safetensors is missing",
    ]
    assert "3 damaged" in said.out
    assert "verify: " in said.err  # the progress
    assert main(["checkpoint", "info", str(twelve)]) == 2
    assert "COMPLETE is missing" in capsys.readouterr().err


def test_convert_gives_plain_files_that_a_run_goes_on_from(
    finished: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plain"
    assert main(["checkpoint", "convert", finished.run, f"output={output}"]) == 0
    model = load_file(output / "model_00000.safetensors")
    optimizer = load_file(output / "optimizer_00000.safetensors")
    expected = checkpoint_tensors(finished.run)
    assert_same_bits(model | {f"optimizer.{name}": tensor for name, tensor in optimizer.items()}, expected)
    assert main(["checkpoint", "convert", finished.run, f"output={output}"]) == 2
    assert "is there already" in capsys.readouterr().err
    run = Path(shutil.copytree(finished.run, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    output.rename(tmp_path / "step_00000012")
    (run / "checkpoints").mkdir()
    (tmp_path / "step_00000012").rename(run / "checkpoints/step_00000012")
    assert_same_bits(checkpoint_tensors(run), expected)
    assert load_run(run).step == 12


@pytest.fixture
def in_parts(tmp_path: Path) -> Path:
    """A checkpoint whose tensors lie in boxes: four of one tensor, rows of another."""
    a, b = torch.arange(60.0).view(6, 10), torch.arange(12).view(4, 3)
    boxes = [Piece(a[y : y + 3, x : x + 5].contiguous(), (6, 10), (y, x)) for y in (0, 3) for x in (0, 5)]
    rows = [Piece(b[y : y + 2].contiguous(), (4, 3), (y, 0)) for y in (0, 2)]
    model = {"a": boxes, "b": rows, "c": torch.tensor(3.0)}
    Checkpointer(tmp_path / "run").save(7, model=model, optimizer={"a.exp_avg": torch.ones(2)}, state={})
    return tmp_path / "run/checkpoints/step_00000007"


def test_convert_joins_parts(in_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.saving.convert._BLOCK_BYTES", 100)
    monkeypatch.setattr("trainer.saving.reader._BLOCK_BYTES", 30)
    assert main(["checkpoint", "convert", str(in_parts), f"output={tmp_path / 'plain'}"]) == 0
    model = load_file(tmp_path / "plain/model_00000.safetensors")
    assert torch.equal(model["a"], torch.arange(60.0).view(6, 10))
    assert torch.equal(model["b"], torch.arange(12).view(4, 3))
    assert model["c"] == 3.0


def test_parts_are_loaded_into_other_parts_and_read_by_rows(in_parts: Path, tmp_path: Path) -> None:
    checkpoint = Checkpointer(tmp_path / "run").newest_good()
    assert checkpoint is not None
    middle = Piece(torch.zeros(6, 4), (6, 10), (0, 4))
    whole = torch.arange(60.0).view(6, 10)
    checkpoint.load_model({"a": middle, "b": torch.zeros(4, 3, dtype=torch.int64), "c": torch.zeros(())})
    assert torch.equal(middle.tensor, whole[:, 4:8])
    reader = checkpoint.reader()
    assert torch.equal(reader.tensor("a", rows=slice(2, 5)), whole[2:5])
    assert torch.equal(reader.tensor("a"), whole)
    assert reader.entries()["a"].shape == (6, 10)
    assert len(reader.entries()["a"].chunks) == 4


def test_parts_that_do_not_cover_a_tensor_once_are_refused(tmp_path: Path) -> None:
    twice = [Piece(torch.zeros(2), (3,), (0,)), Piece(torch.zeros(2), (3,), (1,))]
    # As torch 2.13 says it, and as 2.11 does.
    with pytest.raises(ValueError, match=r"overlapping|validate global plan"):
        Checkpointer(tmp_path).save(1, model={"a": twice}, optimizer={}, state={})
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("words", [["info"], ["verify"], ["convert", "output=there"]])
def test_a_folder_without_checkpoints_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", words[0], str(tmp_path), *words[1:]]) == 2
    assert "is not a checkpoint and has none" in capsys.readouterr().err
