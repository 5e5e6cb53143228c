"""The command itself: help, exit codes, one line on stderr, and nothing imported or written before it is needed."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from activation_store.errors import UserError
from launch import stages
from launch.arguments import parse_arguments
from launch.compose import compose_node, to_config
from launch.knobs import knobs
from launch.main import main
from launch.verbs import VERBS
from trainer.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig, WandbMode
from trainer.run_folder import save_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a test that must not write."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_help_lists_every_verb_group_option_and_knob(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    words = set(page.replace("=", " ").split())
    assert set(VERBS) <= words
    assert {"smollm2", "gemma_2_2b", "batchtopk", "skip_plt", "bench_smollm2_6l", "dictionary_size"} <= words
    assert [key for key in knobs() if key not in words] == []
    # The documentation is the comment above the field.
    assert "Features of each source layer." in page


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_lists_what_it_reads_and_nothing_else(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    page = capsys.readouterr().out
    assert VERBS[verb].summary in page
    for key, knob in knobs().items():
        reads = knob.group in VERBS[verb].groups or key in VERBS[verb].keys
        assert (f"\n  {key}=" in page) == reads, key


def test_usage_says_what_comes_behind_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "--help"]) == 0
    usage = "usage: layerloom store info|verify|repair|merge|remove FOLDER ... [GROUP=OPTION ...]"
    assert capsys.readouterr().out.startswith(usage)


def test_help_shows_the_values_under_the_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help", "activation=jumprelu", "model.n_features=4321"]) == 0
    page = capsys.readouterr().out
    assert "model.n_features=4321" in page
    assert "* jumprelu" in page
    assert "activation.kind=jumprelu  (relu|jumprelu|topk|batchtopk)" in page


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"], ["train", "optim.lr=fast"]])
def test_words_are_answered_without_torch(words: list[str]) -> None:
    code = (
        "import sys; from launch.main import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets', 'zarr', 'pandas'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_the_resolved_config_can_be_printed(capsys: pytest.CaptureFixture[str], empty_folder: Path) -> None:
    assert main(["train", "--cfg", "job", "run=here/there"]) == 0
    page = capsys.readouterr().out
    assert "run: here/there" in page
    assert "n_features:" in page
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["no verb", "harvest"]),
        (["trian"], ["trian is not a verb", 'did you mean "train"?']),
        (["train", "--nonsense"], ["--nonsense"]),
        (["train", "--cfg", "all"], ["--cfg", "job"]),
        (["train", "model=resnet"], ["model=resnet", "clt"]),
        (["train", "--config-dir", "nowhere"], ["nowhere", "not a folder"]),
        (["store"], ["layerloom store info | verify | repair | merge | remove FOLDER"]),
        (["store", "delete", "x"], ["store delete", "info | verify"]),
        (["store", "info", "a", "b"], ["one folder", "a b"]),
        (["store", "merge", "a", "b"], ["store merge FOLDER FOLDER output=FOLDER"]),
        (["store", "remove"], ["layerloom store remove FOLDER"]),
        (["store", "info", "x", "subject.dtype=float16"], ["does not read subject.dtype"]),
        (["store", "info", "nowhere"], ["nowhere"]),
        (["checkpoint"], ["layerloom checkpoint info | convert | verify FOLDER"]),
        (["checkpoint", "info"], ["layerloom checkpoint info FOLDER"]),
        (["checkpoint", "show", "x"], ["checkpoint show", "info | convert"]),
        (["checkpoint", "info", "a", "b"], ["one folder", "a b"]),
        (["checkpoint", "convert", "a"], ["output=FOLDER"]),
        (["checkpoint", "verify", "nowhere"], ["nowhere"]),
        (["train", "activation.k=64", "model.n_features=32"], ["activation.k=64", "model.n_features=32"]),
        (["harvest", "text.context_length=1"], ["text.context_length=1", "at least 2"]),
        (["train", "run=same", "store.path=same"], ["run", "store.path", "both same"]),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str], empty_folder: Path
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("layerloom: ")
    assert captured.err.count("\n") == 1
    assert [part for part in parts if part not in captured.err] == []
    assert list(empty_folder.iterdir()) == []


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "train", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "layerloom: interrupted\n"


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m launch.main --help | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_is_installed_and_says_its_version() -> None:
    command = Path(sys.executable).with_name("layerloom")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, cwd=os.sep, check=True)
    assert done.stdout.startswith("layerloom 0.")


def test_store_words() -> None:
    parsed = parse_arguments(["store", "verify", "some/folder", "--config-dir", "mine"])
    assert (parsed.action, parsed.folders, parsed.overrides, parsed.config_dir) == (
        "verify",
        ("some/folder",),
        (),
        Path("mine"),
    )
    parsed = parse_arguments(["store", "info", "store.path=x"])
    assert (parsed.action, parsed.folders, parsed.overrides) == ("info", (), ("store.path=x",))


def test_an_error_of_the_system_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "/some/file")

    monkeypatch.setattr(stages, "train", refused)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "layerloom: /some/file: Permission denied\n"


def test_libraries_are_told_to_be_quiet_before_the_rules_import_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS", raising=False)
    seen = []

    def validate(*_: object) -> None:
        seen.append(os.environ.get("HF_DATASETS_DISABLE_PROGRESS_BARS"))
        raise UserError("enough")

    monkeypatch.setattr(stages, "validate", validate)
    assert main(["demo"]) == 2
    assert seen == ["1"]


def test_another_mesh_is_told_alone_and_the_rest_is_the_runs_own(tmp_path: Path) -> None:
    own = RunConfig(model=ModelConfig(n_features=72), parallel=ParallelConfig(data=2, feature=2))
    save_config(tmp_path, own)
    for words, mesh in (
        ([], (2, 2)),
        (["parallel.data=4", "parallel.feature=1"], (4, 1)),
        (["parallel.feature=8", "engine=plain"], (2, 8)),
    ):
        arguments = parse_arguments(["train", f"run={tmp_path}", *words])
        config = stages._continued(to_config(compose_node(arguments.overrides, None, verb="train")), arguments)
        assert config.model.n_features == 72
        assert (config.parallel.data, config.parallel.feature) == mesh


def test_what_weights_do_not_depend_on_is_told_alone_too(tmp_path: Path) -> None:
    own = RunConfig(model=ModelConfig(n_features=72), train=TrainConfig(tokens=640, log_every=7))
    own.log.wandb = WandbMode.offline
    save_config(tmp_path, own)
    words = ["train.profile=true", "source.threads=3", "store.path=elsewhere", "log.project=mine"]
    arguments = parse_arguments(["train", f"run={tmp_path}", *words])
    config = stages._continued(to_config(compose_node(arguments.overrides, None, verb="train")), arguments)
    assert (config.model.n_features, config.train.tokens, config.train.log_every) == (72, 640, 7)
    assert (config.train.profile, config.source.threads, config.store.path) == (True, 3, "elsewhere")
    assert (config.log.project, config.log.wandb) == ("mine", WandbMode.offline)


@pytest.mark.parametrize("words", [["publish", "run=r"], ["tune"], ["demo"], ["store", "info", "s"]])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_for_one_process_is_refused_under_several(
    words: list[str], rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    assert main(words) == 2
    told = f"layerloom: {words[0]} is for one process, and 2 were started; start it without torchrun or srun\n"
    assert capsys.readouterr().err == (told if rank == 0 else "")


def test_options_may_come_before_the_verb_of_a_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended: list[int] = []
    monkeypatch.setattr("launch.main._end", ended.append)
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    assert main(["--config-dir", str(tmp_path), "train", "no.such=1"]) == 2
    assert ended == [2]
