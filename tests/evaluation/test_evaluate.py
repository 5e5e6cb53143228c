"""`evaluate` on a run that was really harvested and trained, and what it refuses."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from activation_store.config import StoreConfig, SubjectConfig, TextConfig
from activation_store.errors import UserError
from activation_store.harvest import harvest
from trainer.checkpoint import Checkpointer
from trainer.config import ActivationConfig, ActivationKind, EvalConfig, ModelConfig, RunConfig, TrainConfig
from trainer.evaluation import evaluate as evaluate_module
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.inputs import INPUTS_FILE, evaluation_is_current
from trainer.evaluation.table import format_table
from trainer.saving.reader import open_reader
from trainer.tensor_file import hash_file
from trainer.train import train

KEYS = {
    *("schema_version", "tokens", "documents", "excluded_fraction", "n_features_total", "parameters", "activation"),
    *("threshold_rule", "fvu", "fvu_per_layer", "l0", "l0_per_layer", "training_rule", "dead_fraction"),
    *("dead_fraction_per_layer", "silent_fraction", "density_histogram", "replacement", "replacement_all_positions"),
}
MEANS = {"excluded_fraction", "fvu", "fvu_per_layer", "l0", "l0_per_layer"}
REPLACEMENT = {
    *("ce_subject", "ce_replaced", "ce_ablated", "ce_recovered", "kl", "top1_agreement", "top1_agreement_uncertain"),
}
PLOTS = {"density.png", "fvu.png", "l0.png", "replacement.png", "summary.png"}
CONFIG = EvalConfig(documents=4, contexts_per_document=2, batch_contexts=3)


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A batchtopk run on layers 1 and 2 of the tiny Llama."""
    folder = tmp_path_factory.mktemp("evaluate")
    config = RunConfig(
        subject=SubjectConfig(path=str(tiny_llama)),
        text=TextConfig(path=str(tiny_text), context_length=32, held_out_documents=5),
        store=StoreConfig(path=str(folder / "store"), layer_start=1, tokens=1_024, held_out_tokens=128),
        model=ModelConfig(n_features=32),
        activation=ActivationConfig(kind=ActivationKind.batchtopk, k=4, calibration_tokens=256),
        train=TrainConfig(tokens=1_024, batch_size_tokens=128, eval_every=0),
        run=str(folder / "run"),
        device="cpu",
    )
    harvest(config.subject, config.text, config.store, device="cpu")
    train(config)
    return Path(config.run)


@pytest.fixture(scope="module")
def evaluation(run: Path) -> dict[str, Any]:
    return evaluate(run, CONFIG, device="cpu")


def test_keys_are_those_of_the_contract_and_a_standard_error_for_each_mean(evaluation: dict[str, Any]) -> None:
    assert set(evaluation) == {*KEYS, *(f"{name}_se" for name in MEANS)}
    assert set(evaluation["training_rule"]) == {"fvu", "l0", "fvu_se", "l0_se"}
    assert set(evaluation["density_histogram"]) == {"log10_edges", "counts"}
    for block in ("replacement", "replacement_all_positions"):
        assert set(evaluation[block]) == {*REPLACEMENT, *(f"{name}_se" for name in REPLACEMENT)}


def test_values_hang_together(evaluation: dict[str, Any]) -> None:
    assert evaluation["documents"] == 4
    assert evaluation["n_features_total"] == 64
    assert evaluation["activation"] == "batchtopk"
    assert evaluation["threshold_rule"] == "calibrated per layer"
    # Per layer 32 x 16 + 32 of the encoder, 16 of b_dec; decoders of 2 and 1 target layers.
    assert evaluation["parameters"] == 2 * (32 * 16 + 32 + 16) + (2 + 1) * 32 * 16
    assert len(evaluation["fvu_per_layer"]) == len(evaluation["l0_per_layer_se"]) == 2
    assert evaluation["fvu"] == pytest.approx(sum(evaluation["fvu_per_layer"]) / 2)
    assert 0 < evaluation["fvu"] < 1.5
    assert evaluation["training_rule"]["l0"] == pytest.approx(8, abs=0.5)
    alive = sum(evaluation["density_histogram"]["counts"])
    assert alive == round(64 * (1 - evaluation["silent_fraction"]))
    assert evaluation["fvu_se"] > 0
    assert evaluation["replacement"]["ce_subject"] > 0


def test_files_are_written_and_hold_what_was_returned(run: Path, evaluation: dict[str, Any]) -> None:
    assert json.loads((run / "evaluation.json").read_text()) == evaluation
    assert {path.name for path in (run / "plots").iterdir()} == PLOTS
    assert (run / "plots" / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_table_is_narrow_and_has_the_figures(evaluation: dict[str, Any]) -> None:
    table = format_table(evaluation, first_layer=1)
    assert max(map(len, table.splitlines())) <= 80
    assert f"{evaluation['replacement']['ce_subject']:.3f}" in table
    assert "layer      1      2" in table


def test_an_evaluation_is_current_until_something_that_matters_changes(
    run: Path, evaluation: dict[str, Any], tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert evaluation_is_current(copy, CONFIG)
    assert evaluation_is_current(copy, replace(CONFIG, batch_contexts=1))
    assert not evaluation_is_current(copy, replace(CONFIG, documents=3))
    assert not evaluation_is_current(copy, replace(CONFIG, replacement=False))
    (copy / "evaluation.json").write_text(json.dumps({**evaluation, "fvu": 0.0}))
    assert not evaluation_is_current(copy, CONFIG)
    shutil.copy(run / "evaluation.json", copy)
    recorded = json.loads((copy / INPUTS_FILE).read_text())
    (copy / INPUTS_FILE).write_text(json.dumps({**recorded, "weights_xxh3_64": "0"}))
    assert not evaluation_is_current(copy, CONFIG)
    (copy / INPUTS_FILE).unlink()
    assert not evaluation_is_current(copy, CONFIG)
    assert not evaluation_is_current(tmp_path / "nothing", CONFIG)


def test_batches_change_nothing(run: Path, evaluation: dict[str, Any], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    again = evaluate(copy, replace(CONFIG, batch_contexts=1, replacement=False), device="cpu")
    assert again["fvu"] == pytest.approx(evaluation["fvu"], rel=1e-6)
    assert again["training_rule"] == pytest.approx(evaluation["training_rule"], rel=1e-6)
    assert again["replacement"] is None
    assert not (copy / "plots" / "replacement.png").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("not a run", "not a run folder"),
        ("no checkpoint", "no complete checkpoint"),
        ("none held out", "no held-out documents"),
        ("too few held out", "text.held_out_documents=5"),
        ("no store", "does not exist"),
        ("another store", "is not the one that"),
        ("no batch", "eval.batch_contexts=0"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(run: Path, tmp_path: Path, damage: str, said: str) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("evaluation*", "plots"))
    config = yaml.safe_load((copy / "config.yaml").read_text())
    asked = CONFIG
    if damage == "not a run":
        (copy / "config.yaml").unlink()
    elif damage == "no checkpoint":
        shutil.rmtree(copy / "checkpoints")
    elif damage == "none held out":
        config["text"]["held_out_documents"] = 0
    elif damage == "too few held out":
        asked = replace(CONFIG, documents=6)
    elif damage == "no store":
        config["store"]["path"] = str(tmp_path / "gone")
    elif damage == "another store":
        config["store"]["path"] = str(Path(config["store"]["path"]) / "held_out")
    else:
        asked = replace(CONFIG, batch_contexts=0)
    if damage != "not a run":
        (copy / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError) as error:
        evaluate(copy, asked, device="cpu")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (copy / "evaluation.json").exists()
    assert not (copy / "plots").exists()


def _calibrated_at(run: Path, step: int | None) -> None:
    """Rewrites the newest checkpoint as if its run had been stopped between two evaluations."""
    newest = max((run / "checkpoints").iterdir())
    state = json.loads((newest / "state.json").read_text()) | {"calibrated_step": step}
    (newest / "state.json").write_text(json.dumps(state))
    (newest / "COMPLETE").write_text(hash_file(newest / "state.json").xxh3_64 + "\n")


def test_a_run_without_thresholds_is_refused_before_the_subject_loads(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    _calibrated_at(copy, None)
    monkeypatch.delattr("trainer.evaluation.evaluate.load_subject")
    with pytest.raises(UserError, match=f"before the thresholds .*`layerloom train run={copy}`") as error:
        evaluate(copy, CONFIG, device="cpu")
    assert "\n" not in str(error.value)


def test_thresholds_older_than_the_weights_are_told(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    _calibrated_at(copy, 6)
    evaluation = evaluate(copy, replace(CONFIG, documents=2, replacement=False), device="cpu", show_table=False)
    assert evaluation["threshold_rule"] == "calibrated per layer at step 6 of 8"


def test_the_checkpoint_that_was_chosen_is_the_one_measured(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on and writes another checkpoint while the subject loads."""
    asked = replace(CONFIG, documents=2, replacement=False)
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    expected = evaluate(copy, asked, device="cpu", show_table=False)
    real = evaluate_module.load_subject

    def load_late(*args: Any, **kwargs: Any) -> Any:
        older = copy / "checkpoints" / "step_00000008"
        reader, state = open_reader(older), json.loads((older / "state.json").read_text())
        model = {name: 2 * reader.tensor(name) for name in reader.entries()}
        Checkpointer(copy).save(9, model=model, optimizer={}, state={**state, "step": 9})
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluate_module, "load_subject", load_late)
    assert evaluate(copy, asked, device="cpu", show_table=False) == expected
    assert json.loads((copy / INPUTS_FILE).read_text())["checkpoint"] == "step_00000008"


def test_a_disk_that_fills_is_told_in_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluate_module, "write_json", full)
    with pytest.raises(UserError, match=f"is full .*`layerloom evaluate run={copy}`"):
        evaluate(copy, replace(CONFIG, documents=2, replacement=False), device="cpu")
    assert not evaluation_is_current(copy, CONFIG)


def test_text_with_one_more_document_is_refused(run: Path, tiny_text: Path, tmp_path: Path) -> None:
    """The held-out documents of the longer text would be documents that were trained on."""
    text, copy = tmp_path / "text", tmp_path / "run"
    shutil.copytree(tiny_text, text)
    shutil.copytree(run, copy)
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    settings["text"]["path"] = str(text)
    (copy / "config.yaml").write_text(yaml.safe_dump(settings))
    evaluate(copy, CONFIG, device="cpu")  # the same text elsewhere
    (text / "one_more.txt").write_text("One more document.")
    with pytest.raises(UserError, match=r"text.path=.* is now 41 files.*harvested from 40 files") as caught:
        evaluate(copy, CONFIG, device="cpu")
    assert "\n" not in str(caught.value)
