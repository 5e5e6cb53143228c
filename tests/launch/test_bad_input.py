"""What can be known at the start is refused at the start: one line on stderr, exit 2, nothing written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import wandb

from launch.main import main
from tests.job import Job, snapshot, working_in
from tests.tiny import tiny_subject_folder
from trainer.parallel import engine

pytestmark = pytest.mark.slow


@pytest.fixture
def place(job: Job) -> Path:
    """The job's folder."""
    return job.folder


def _refused(capfd: pytest.CaptureFixture[str], folder: Path, words: list[str], *parts: str) -> str:
    """Runs a command that must be refused in one line with `parts` and leave `folder` as it was."""
    before = snapshot(folder)
    capfd.readouterr()
    with working_in(folder):
        code = main(words)
    captured = capfd.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert captured.err.startswith("layerloom: ")
    assert captured.err.count("\n") == 1, captured.err
    assert [part for part in parts if part not in captured.err] == []
    assert snapshot(folder) == before
    return captured.err


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"subject__path": "nowhere/model.gguf"}, ["subject.path=nowhere/model.gguf", "hub id"]),
        ({"subject__path": "package://no_such_package/x.gguf"}, ["no_such_package", "pip install"]),
        ({"subject__path": "."}, ["subject.path=.", "config.json"]),
        ({"store__input_hook": "resid_pre"}, ["store.input_hook", "resid_mid, mlp_in"]),
        ({"store__layer_stop": "9"}, ["store.layer_stop=9", "3"]),
        ({"text__path": "nowhere"}, ["text.path=nowhere"]),
        ({"text__held_out_documents": "40"}, ["text.held_out_documents=40"]),
        ({"device": "cuda:77"}, ["device=cuda:77"]),
    ],
)
def test_harvest_refuses(
    job: Job, place: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, str], parts: list[str]
) -> None:
    _refused(capfd, place, ["harvest", *job.words_with(**{"store__path": "new_store", **changes})], *parts)


def test_harvest_refuses_text_without_documents(job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    words = job.words_with(text__path="empty", store__path="new_store")
    _refused(capfd, tmp_path, ["harvest", *words], "text.path=empty", "document")


def test_harvest_names_what_differs(job: Job, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = job.words_with(store__dtype="float32")
    _refused(capfd, place, ["harvest", *words], "store.dtype", "float16", "float32")
    words = job.words_with(text__seed="7", store__tokens="99")
    _refused(capfd, place, ["harvest", *words], "text.seed", "store.tokens")


def test_harvest_refuses_another_subject(
    job: Job, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tiny_subject_folder(tmp_path / "other", "llama", seed=1)
    _refused(capfd, place, ["harvest", *job.words_with(subject__path=str(other))], "subject")


def test_contexts_longer_than_the_subject_can_read(job: Job, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Known once the subject is loaded, after the line that tells the size."""
    before = snapshot(place)
    with working_in(place):
        assert main(["harvest", *job.words_with(store__path="new_store", text__context_length="100000")]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("layerloom: text.context_length=100000 is more than the 512 positions")
    assert snapshot(place) == before


def test_a_full_disk_is_refused(
    job: Job, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs("/")
    full = os.statvfs_result((real.f_bsize, 1, *list(real)[2:4], 1, *list(real)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    _refused(capfd, place, ["harvest", *job.words_with(store__path="new_store")], "new_store", "free")
    _refused(capfd, place, ["train", *job.words_with(run="new_run")], "new_run", "free")
    _refused(capfd, place, ["publish", "launch.threads=1", "run=run", "output=new_output"], "new_output", "free")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"activation__k": "49"}, ["activation.k=49", "model.n_features=48"]),
        ({"activation": "topkk"}, ["activation=topkk", "batchtopk"]),
        ({"store__path": "nowhere"}, ["nowhere", "layerloom harvest"]),
        ({"store__path": "run"}, ["run", "not an activation store"]),
        ({"train__microbatch_tokens": "100"}, ["train.microbatch_tokens=100", "128"]),
        ({"run": "store"}, ["run", "store"]),
        ({"run": "published"}, ["published/config.yaml is not a config", "another run folder"]),
        ({"run": "run", "optim__lr": "1e-5"}, ["optim.lr", "1e-05", "train.fresh=true"]),
        ({"store__input_hook": "mlp_in", "run": "new"}, ["store", "input_hook", "mlp_in"]),
        ({"parallel__feature": "2"}, ["parallel.feature=2", "wants 2 processes", "torchrun --nproc-per-node 2"]),
    ],
)
def test_train_refuses(
    job: Job, place: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, str], parts: list[str]
) -> None:
    _refused(capfd, place, ["train", *job.words_with(**{"run": "new", **changes})], *parts)


def test_train_refuses_wandb_without_a_login(
    job: Job, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> bool:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "login", nobody)
    words = job.words_with(run="new", log="wandb")
    _refused(capfd, place, ["train", *words], "log.wandb=online: No API key", "wandb login", "log=wandb_offline")


def test_train_refuses_an_engine_that_is_not_installed(
    job: Job, place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    words = job.words_with(run="new", engine="deepspeed")
    _refused(capfd, place, ["train", *words], "engine=deepspeed", "not installed", "engine=plain")


def test_train_refuses_a_store_of_another_subject(
    job: Job, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tiny_subject_folder(tmp_path / "other", "llama", seed=1)
    words = job.words_with(subject__path=str(other), run="new")
    _refused(capfd, place, ["train", *words], "store", "subject")


def test_train_refuses_a_half_written_store(job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(job.folder / "store", tmp_path / "store")
    manifest = tmp_path / "store/manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "status": "harvesting"}))
    words = job.words_with(run="new")
    _refused(capfd, tmp_path, ["train", *words], "half written", "layerloom harvest")


def test_train_refuses_a_store_of_too_few_tokens(
    job: Job, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with working_in(tmp_path):
        few = job.words_with(store__tokens="64", text__contexts_per_document="1", text__documents_per_block="2")
        assert main(["harvest", *few]) == 0
    words = [word for word in few if not word.startswith("train.tokens")]
    _refused(capfd, tmp_path, ["train", *words, "train.tokens=256", "run=new"], "store", "tokens")


@pytest.mark.parametrize("verb", ["evaluate", "publish"])
@pytest.mark.parametrize("folder", ["store", "nowhere"])
def test_a_run_folder_that_is_not_one(
    job: Job, place: Path, capfd: pytest.CaptureFixture[str], verb: str, folder: str
) -> None:
    words = [verb, "launch.threads=1", f"run={folder}", *(["output=new"] if verb == "publish" else [])]
    _refused(capfd, place, words, f"run={folder}", "not a run folder")


def test_publish_refuses_what_is_in_the_way(job: Job, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _refused(capfd, place, ["publish", "launch.threads=1", "run=run", "output=store"], "output=store")
    _refused(
        capfd,
        place,
        ["publish", "launch.threads=1", "run=run", "output=new", "publish.dtype=int8"],
        "publish.dtype=int8",
        "float32",
    )


def test_evaluate_refuses_more_documents_than_are_held_out(
    job: Job, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _refused(capfd, place, ["evaluate", "launch.threads=1", "run=run", "eval.documents=7"], "eval.documents=7", "6")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["sweep=dictionary_size"]),
        (["store.tokens=1,2"], ["store.tokens cannot vary"]),
        (["activation.k=100,200"], ["activation.k=100", "48"]),
        (["activation=topk,relux"], ["relux", 'did you mean "relu"?']),
        (["model.n_features=24,48", "store.path=nowhere"], ["nowhere"]),
        (["model.n_features=24,48", "text.seed=9"], ["text.seed: 0 there, 9 asked for"]),
    ],
)
def test_sweep_refuses(
    job: Job, place: Path, capfd: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    kept = [word for word in job.words_with(output="new") if word.split("=")[0] not in ("run", "activation.k")]
    given = {word.split("=")[0] for word in words}
    kept = [word for word in kept if word.split("=")[0] not in given]
    _refused(capfd, place, ["sweep", *kept, *words], *parts)


def test_demo_refuses_before_it_harvests(job: Job, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = job.words_with(store__path="new_store", run="new_run", output="run")
    _refused(capfd, place, ["demo", *words], "output=run")
