"""What counts as a run folder, and which calls may continue it."""

from dataclasses import replace
from pathlib import Path

import pytest

from activation_store.errors import UserError
from launch.config import LayerloomConfig
from trainer.config import ActivationKind, RunConfig, TrainConfig, WandbMode
from trainer.run_folder import RunFolder, config_to_dict, load_config, resume_command, save_config


def _config(run: Path) -> RunConfig:
    config = RunConfig(run=str(run), train=TrainConfig(microbatch_tokens=256))
    config.activation.kind = ActivationKind.batchtopk
    config.model.initial_density = 0.02
    return config


def test_the_config_comes_back_as_it_was(tmp_path: Path) -> None:
    config = _config(tmp_path)
    save_config(tmp_path, config)
    assert load_config(tmp_path) == config


def test_a_command_lines_larger_config_is_saved_as_a_run_config(tmp_path: Path) -> None:
    config = LayerloomConfig(run=str(tmp_path))
    config.sweep.params = {"model.n_features": ["1", "2"]}
    save_config(tmp_path, config)
    assert load_config(tmp_path) == RunConfig(run=str(tmp_path))
    assert "sweep" not in config_to_dict(config)


def test_fresh_is_an_order_and_not_kept(tmp_path: Path) -> None:
    config = _config(tmp_path)
    config.train.fresh = True
    save_config(tmp_path, config)
    assert load_config(tmp_path).train.fresh is False


def test_a_new_and_an_empty_folder_are_taken(tmp_path: Path) -> None:
    for run in (tmp_path / "a" / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        RunFolder(run).check(_config(run))
        assert not (run / "config.yaml").exists()
        RunFolder(run).start(_config(run))
        assert RunFolder(run).exists()
        RunFolder(run).check(_config(run))


def test_hidden_files_do_not_make_a_folder_something_else(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    RunFolder(tmp_path).check(_config(tmp_path))


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    config = _config(tmp_path)
    config.train.fresh = fresh
    with pytest.raises(UserError, match=r"is not a run folder \(it has thesis.tex"):
        RunFolder(tmp_path).check(config)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "file").check(_config(tmp_path))


def test_another_config_is_refused_by_naming_the_difference(tmp_path: Path) -> None:
    RunFolder(tmp_path).start(_config(tmp_path))
    config = _config(tmp_path)
    config.model.n_features = 2048
    with pytest.raises(UserError, match=r"model.n_features: 768 there, 2048 asked for; .*train.fresh=true"):
        RunFolder(tmp_path).check(config)
    config.optim.lr = 1.0
    with pytest.raises(UserError, match="and 1 more"):
        RunFolder(tmp_path).check(config)
    config.train.fresh = True
    RunFolder(tmp_path).check(config)


def test_what_weights_do_not_depend_on_may_change(tmp_path: Path) -> None:
    RunFolder(tmp_path).start(_config(tmp_path))
    config = _config(tmp_path / "." / "elsewhere")
    config.log.wandb = WandbMode.offline
    config.device = "cpu"
    config.train = replace(
        config.train, async_checkpoint=False, keep_checkpoints=5, checkpoint_every=7, eval_every=9, log_every=1
    )
    config.parallel.data, config.parallel.feature = 2, 4
    config.source.prefetch_bytes = 7
    config.subject.license = config.text.license = "MIT"
    RunFolder(tmp_path).check(config)


def test_fresh_discards_the_run_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start(_config(tmp_path))
    folder.checkpoints.mkdir()
    (folder.checkpoints / "x").write_text("")
    for file in (folder.metrics_file, folder.evaluation_file, tmp_path / "notes.txt"):
        file.write_text("{}")
    config = _config(tmp_path)
    config.train.fresh = True
    config.model.n_features = 2048
    folder.start(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "notes.txt"]
    assert load_config(tmp_path).model.n_features == 2048


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.locked(), pytest.raises(UserError, match="another process"), RunFolder(tmp_path).locked():
        pass
    with folder.locked():
        pass


def test_a_folder_without_or_with_an_unreadable_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        load_config(tmp_path)
    for text in ("model: {n_featurez: 3}", "model: [", "model: {n_features: many}", "just text", "- a"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="is not a config of this version") as error:
            load_config(tmp_path)
        assert "\n" not in str(error.value)


def test_the_command_that_continues_is_the_one_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/layerloom", "train", "run=a b", "optim.lr=1", "train.fresh=true"])
    assert resume_command("a b") == "layerloom train 'run=a b' optim.lr=1"
    monkeypatch.setattr("sys.argv", ["pytest"])
    assert resume_command("a b") == "layerloom train 'run=a b'"


def test_what_a_kill_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start(RunConfig(run=str(folder.path)))
    folder.plots.mkdir()
    for name in (".config.yaml.x1.partial", "plots/.fvu.png.x2.partial"):
        (folder.path / name).write_text("half")
    folder.start(RunConfig(run=str(folder.path)))
    assert sorted(path.name for path in folder.path.rglob("*")) == ["config.yaml", "plots"]
