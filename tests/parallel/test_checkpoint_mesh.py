"""Checkpoints written by one mesh and read by another, with real processes: every number at its place."""

import os
import shutil
from pathlib import Path

import pytest

from launch.main import main
from tests.parallel import checkpoint_cases as cases
from tests.parallel.processes import Processes, RankError
from trainer.checkpoint import Checkpointer
from trainer.saving.ranks import Ranks
from trainer.saving.reader import open_reader


@pytest.fixture(scope="module")
def saved(four_ranks: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 2 and 4, written at 2 x 2 in the background; read only."""
    run = tmp_path_factory.mktemp("mesh") / "run"
    four_ranks.run(cases.save, run, 2, background=True, steps=(2, 4))
    return run


def test_every_rank_writes_its_part_and_replicas_are_written_once(saved: Path) -> None:
    path = saved / "checkpoints/step_00000004"
    names = sorted(file.name for file in path.iterdir())
    assert [name for name in names if name.startswith("model")] == [
        f"model_{rank:05d}.safetensors" for rank in range(4)
    ]
    for kind in ("model", "optimizer"):
        entries = open_reader(path).entries(kind)
        assert {name: list(entry.shape) for name, entry in entries.items()} == {
            name: list(tensor.shape) for name, tensor in cases.serial(4, kind).items()
        }
        assert len(entries["layers.0.W_dec" if kind == "model" else "layers.0.W_dec.exp_avg"].chunks) == 2
        stored = sum((path / file).stat().st_size for file in names if file.startswith(kind))
        numbers = sum(entry.n_bytes for entry in entries.values())
        assert numbers < stored < numbers + 4 * 1500  # headers


def test_what_2x2_wrote_is_read_by_every_mesh(saved: Path, four_ranks: Processes, two_ranks: Processes) -> None:
    for feature in (1, 2, 4):
        assert four_ranks.run(cases.load, saved, feature) == [(4, [])] * 4
    for feature in (1, 2):
        assert two_ranks.run(cases.load, saved, feature) == [(4, [])] * 2
    assert cases.load(saved, 1, Ranks()) == (4, [])


def test_what_other_meshes_wrote_is_read_by_2x2(four_ranks: Processes, two_ranks: Processes, tmp_path: Path) -> None:
    for feature in (1, 4):
        four_ranks.run(cases.save, tmp_path / f"four_{feature}", feature, background=False)
        assert four_ranks.run(cases.load, tmp_path / f"four_{feature}", 2) == [(4, [])] * 4
    two_ranks.run(cases.save, tmp_path / "two", 2, background=True)
    assert four_ranks.run(cases.load, tmp_path / "two", 2) == [(4, [])] * 4
    with Checkpointer(tmp_path / "one") as checkpointer:
        model, optimizer = (cases.serial(3, kind) for kind in ("model", "optimizer"))
        checkpointer.save(3, model=model, optimizer=optimizer, state={"rank": 0})
    assert four_ranks.run(cases.load, tmp_path / "one", 2) == [(3, [])] * 4


def test_convert_makes_one_file_of_all_parts(saved: Path, tmp_path: Path) -> None:
    assert (
        main(["checkpoint", "convert", f"{saved}/checkpoints", f"output={tmp_path / 'run/checkpoints/step_00000004'}"])
        == 0
    )
    files = {file.name for file in (tmp_path / "run/checkpoints/step_00000004").glob("*.safetensors")}
    assert files == {"model_00000.safetensors", "optimizer_00000.safetensors"}
    assert cases.load(tmp_path / "run", 1, Ranks()) == (4, [])


def test_all_ranks_pass_over_what_any_of_them_finds_damaged(saved: Path, four_ranks: Processes, tmp_path: Path) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    os.truncate(run / "checkpoints/step_00000004/optimizer_00003.safetensors", 50)
    assert four_ranks.run(cases.load, run, 2) == [(2, [])] * 4
    (run / "checkpoints/step_00000002/model_00002.safetensors").unlink()
    for said in four_ranks.run(cases.load_damaged, run):
        assert "none that can be used" in said


def test_what_one_rank_cannot_write_fails_on_all_and_leaves_the_older(
    saved: Path, two_ranks: Processes, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    results = two_ranks.run(cases.fail_on_rank_1, run)
    for said, _ in results:
        assert "No such file or directory: the checkpoint of step 6 was not written" in said
        assert "\n" not in said
    assert results[0][1] == ["step_00000002", "step_00000004"]


def test_a_rank_killed_while_writing_leaves_the_older(saved: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    with Processes(2) as processes, pytest.raises(RankError, match="the process died"):
        processes.run(cases.killed_while_writing, run)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert "step_00000008" not in names
    assert cases.load(run, 1, Ranks()) == (4, [])
    with Checkpointer(run) as checkpointer:
        checkpointer.save(9, model=cases.serial(9, "model"), optimizer=cases.serial(9, "optimizer"), state={"rank": 0})
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000004", "step_00000009"]
