"""The whole job through the command, on a tiny real subject, from another working folder."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

from activation_store.atomic import write_json
from activation_store.store import ActivationStore
from launch.main import main
from tests.job import Job, snapshot, working_in
from trainer.model.clt import CrossLayerTranscoder
from trainer.run_folder import load_config

pytestmark = pytest.mark.slow


def _layerloom(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = str(Path(sys.executable).with_name("layerloom"))
    return subprocess.run([command, *words], cwd=folder, capture_output=True, text=True, check=False)


def test_each_stage_left_what_the_next_one_and_a_notebook_read(job: Job) -> None:
    store = ActivationStore.open(job.folder / "store")
    assert store.n_layers == 3
    evaluation = json.loads((job.folder / "run/evaluation.json").read_text())
    assert evaluation["documents"] == 6
    assert 0 < evaluation["fvu"] < 1.2
    assert (job.folder / "run/plots/summary.png").stat().st_size > 1000
    rows = store[0:50].mlp_in
    of_run = CrossLayerTranscoder.load(job.folder / "run")
    of_published = CrossLayerTranscoder.load(job.folder / "published")
    # Scaling is folded in the published weights: another model with the same function.
    errors = of_run.reconstruct(rows) - of_published.reconstruct(rows)
    assert float(errors.abs().max()) < 1e-4
    assert set(load_file(job.folder / "published/W_enc_0.safetensors")) >= {"W_enc_0", "b_enc_0", "b_dec_0"}


def test_nothing_else_was_written(job: Job) -> None:
    """No outputs/, .hydra/ or log of Hydra's."""
    assert {path.name for path in job.folder.iterdir()} == {"store", "run", "published"}


def test_the_demo_skips_what_is_there_and_ends_with_the_result(job: Job) -> None:
    before = snapshot(job.folder)
    done = _layerloom(job.folder, "demo", *job.words)
    assert done.returncode == 0, done.stderr
    for stage in ("harvest", "train", "evaluate", "publish"):
        assert f"== {stage} ==" in done.stderr
    assert done.stderr.count("nothing to do") == 2
    assert "recovered" in done.stdout  # the table
    assert "run/plots/summary.png" in done.stdout
    command = done.stdout.splitlines()[-1]
    assert "circuit-tracer attribute -m" in command
    # A relative path would be taken for a repository of the hub.
    assert f"-t {(job.folder / 'published').resolve()}" in command
    # The config is written anew, with the same content, by every call of train.
    after = {entry for entry in snapshot(job.folder) if entry[1] and entry[0] != "run/config.yaml"}
    assert after == {entry for entry in before if entry[1] and entry[0] != "run/config.yaml"}


def test_the_demo_does_again_what_no_longer_matches(job: Job, tmp_path: Path) -> None:
    words = job.words_with(run=str(tmp_path / "run"), output=str(tmp_path / "out"), activation__k="3")
    with working_in(job.folder):
        assert main(["demo", *words]) == 0
        first = (tmp_path / "run/evaluation.json").read_bytes()
        published = (tmp_path / "out/evaluation.json").read_bytes()
        words = [word for word in words if not word.startswith("eval.documents")]
        assert main(["demo", *words, "eval.documents=3"]) == 0
    assert published == first
    again = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert again["documents"] == 3
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == again


def test_a_layer_range_leaves_publishing_out(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = job.words_with(
        store__path=str(tmp_path / "store"),
        run=str(tmp_path / "run"),
        output=str(tmp_path / "out"),
        store__layer_stop="2",
    )
    with working_in(job.folder):
        assert main(["demo", *words]) == 0
    captured = capsys.readouterr()
    assert "publish: left out" in captured.err
    assert "layers 0 to 1 of 3" in captured.err
    assert "published" not in captured.out
    assert not (tmp_path / "out").exists()


def test_train_continues_a_run_by_its_folder_alone(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    with working_in(job.folder):
        assert main(["train", "run=run", "launch.threads=1"]) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_train_starts_a_run_over_with_its_own_config(job: Job, tmp_path: Path) -> None:
    shutil.copytree(job.folder / "run", tmp_path / "run")
    (tmp_path / "store").symlink_to(job.folder / "store")
    with working_in(tmp_path):
        # The defaults have other features, and a store elsewhere.
        assert main(["train", "run=run", "train.fresh=true", "launch.threads=1"]) == 0
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert (tmp_path / "run" / "config.yaml").read_text() == (job.folder / "run" / "config.yaml").read_text()


def test_store_info_and_verify(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "info", str(job.folder / "store")]) == 0
    assert "complete" in capsys.readouterr().out
    assert main(["store", "verify", f"store.path={job.folder / 'store'}"]) == 0
    assert "no damage" in capsys.readouterr().out


def test_a_sweep_survives_a_bad_point_and_skips_what_is_done(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "my sweep"
    words = [
        word for word in job.words if word.split("=")[0] not in ("run", "output", "model.n_features", "activation.k")
    ]
    words += [f"output='{output}'", "model.n_features=24,48", "activation.k=2,32", "activation=topk"]
    with working_in(job.folder):
        before = snapshot(job.folder)
        assert main(["sweep", *words]) == 1
        assert snapshot(job.folder) == before
    table = pd.read_parquet(output / "results.parquet")
    assert len(table) == 4
    assert list(table.columns[:4]) == ["point", "model.n_features", "activation.k", "status"]
    bad = table[table["status"] == "failed"]
    assert list(bad["point"]) == ["n_features-24_k-32"]
    assert "activation.k=32 must lie between 1 and model.n_features=24" in bad["error"].item()
    good = table[table["status"] == "done"]
    assert good[["fvu", "l0", "ce_recovered", "parameters", "seconds"]].notna().all(axis=None)
    assert good["parameters"].nunique() == 2
    csv = pd.read_csv(output / "results.csv")
    assert list(csv.columns) == list(table.columns)
    assert csv["fvu"].to_numpy() == pytest.approx(table["fvu"].to_numpy(), nan_ok=True)
    assert {path.name for path in output.iterdir()} == {"points", "results.parquet", "results.csv", "multirun.yaml"}
    capsys.readouterr()

    weights = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    with working_in(job.folder):
        assert main(["sweep", *words]) == 1
    assert capsys.readouterr().err.count("nothing to do") == 3
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == weights

    assert pd.read_parquet(output / "results.parquet").equals(table)
    # Other constants would overwrite results that cost hours.
    results = {path: path.read_bytes() for path in output.rglob("result*")}
    capsys.readouterr()
    with working_in(job.folder):
        assert main(["sweep", *words, "optim.lr=1e-5"]) == 2
    refusal = capsys.readouterr().err
    assert "holds a sweep with other settings; give another output" in refusal
    assert "optim.lr" in refusal
    assert refusal.count("\n") == 1
    assert {path: path.read_bytes() for path in output.rglob("result*")} == results
    # The subject is a path of its own: no label of the demo's subject.
    assert load_config(output / "points/n_features-24_k-2").subject.base_model == ""


def test_a_disk_that_fills_at_a_points_end_leaves_the_others_be(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_once(path: Path, value: object) -> None:
        if "k-2" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_json(path, value)

    monkeypatch.setattr("launch.sweep_point.write_json", full_once)
    words = [word for word in job.words if word.split("=")[0] not in ("run", "output", "activation.k")]
    with working_in(job.folder):
        assert main(["sweep", *words, f"output={tmp_path / 'out'}", "activation.k=2,3", "sweep.evaluate=false"]) == 1
    assert "point k-2: its result could not be written (No space left on device)" in capsys.readouterr().err
    assert list(pd.read_parquet(tmp_path / "out/results.parquet")["point"]) == ["k-3"]
