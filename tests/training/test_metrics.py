"""metrics.jsonl: whole lines, cut on resume; wandb's id is kept."""

import json
from pathlib import Path

from activation_store.atomic import read_json
from trainer.config import LogConfig, RunConfig, WandbMode
from trainer.metrics import MetricsLog, cut_after, read_metrics
from trainer.run_folder import RunFolder


def _folder(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.start(RunConfig(run=str(path)))
    return folder


def test_records_are_written_at_once_and_cut_on_resume(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    with MetricsLog(folder, RunConfig(), resumed_from=0) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "fvu": step / 7})
            log.write({"step": step, "eval": {"fvu": 1.0}})
        assert len(list(read_metrics(folder.metrics_file))) == 6
    with MetricsLog(folder, RunConfig(), resumed_from=2) as log:
        log.write({"step": 3, "fvu": 0.5})
        log.sync()
    records = list(read_metrics(folder.metrics_file))
    assert [(record["step"], "eval" in record) for record in records] == [
        (1, False),
        (1, True),
        (2, False),
        (2, True),
        (3, False),
    ]
    assert records[2]["fvu"] == 2 / 7


def test_a_line_that_a_kill_cut_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for tail in ('{"step": 2, "fv', '{"step": 2, "fv\n', '{"step": 2}'):
        path.write_text('{"step": 1}\n' + tail)
        assert [record["step"] for record in read_metrics(path)] == [1]
        cut_after(path, 10)
        assert path.read_text() == '{"step": 1}\n'


def test_no_file_is_an_empty_one(tmp_path: Path) -> None:
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == []
    cut_after(tmp_path / "metrics.jsonl", 3)


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    with MetricsLog(folder, RunConfig(), resumed_from=0) as log:
        log.write({"step": 1, "fvu": float("nan"), "deep": {"l": [1.0, float("inf")]}})
    line = json.loads(folder.metrics_file.read_text())
    assert line == {"step": 1, "fvu": None, "deep": {"l": [1.0, None]}}


def test_wandb_offline_keeps_its_run_across_a_resume(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    config = RunConfig(log=LogConfig(wandb=WandbMode.offline, project="p"))
    ids = []
    for resumed_from in (0, 1):
        with MetricsLog(folder, config, resumed_from=resumed_from) as log:
            log.write({"step": resumed_from + 1, "fvu": 0.5, "eval": {"l": [1.0]}})
        ids.append(read_json(folder.wandb_file)["id"])
    assert ids[0] == ids[1]
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}/*.wandb"))
    assert runs
    assert [record["step"] for record in read_metrics(folder.metrics_file)] == [1, 2]
