"""What a run writes is what it says: metrics, evaluations, refusals, failures."""

import json
import math
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from activation_store.config import StoreDtype
from activation_store.errors import UserError
from activation_store.shuffle import ShuffledBatches
from activation_store.store import ActivationStore
from activation_store.subject import SubjectInfo
from tests.tiny import tiny_subject_folder
from tests.training.runs import assert_same_bits, checkpoint_tensors, records, tiny_run
from trainer.build import build_model, checkpoint_bytes, model_spec, parameter_count
from trainer.checkpoint import Checkpointer
from trainer.config import RunConfig, Span
from trainer.held_out import evaluate_rows
from trainer.load import load_run, load_transcoder
from trainer.model.clt import CrossLayerTranscoder
from trainer.parallel.plain import PlainEngine
from trainer.rows import CalibrationRows, held_out_batches, open_training_store, store_identity
from trainer.run_folder import load_config
from trainer.train import train

CPU = torch.device("cpu")


def _fvu(y_BLD: Tensor, y_hat_BLD: Tensor) -> Tensor:
    """FVU by layer, as it is defined, in float64."""
    y, y_hat = y_BLD.double(), y_hat_BLD.double()
    return (y - y_hat).square().sum((0, 2)) / (y - y.mean(0)).square().sum((0, 2))


# --- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["layer", "standardize"])
def test_the_first_metrics_are_those_of_the_initial_model_on_the_first_batch(run: RunConfig, scaling: str) -> None:
    run = tiny_run(run, Path(run.run), {"model.target_scaling": scaling})
    train(run)
    store = ActivationStore.open(run.store.path)
    with ShuffledBatches(store, batch_size_tokens=96, seed=3, pool_rows=256) as batches:
        batch = next(batches)
    model = build_model(run, store.statistics(), device=CPU)
    first = records(run.run)[0]
    fvu_L = _fvu(batch.mlp_out, model.reconstruct(batch.mlp_in, rule="training"))
    assert first["fvu_per_layer"] == pytest.approx(fvu_L.tolist(), rel=1e-4)
    assert first["fvu"] == pytest.approx(float(fvu_L.mean()), rel=1e-4)
    codes = model.encode(batch.mlp_in)
    dense = [codes.to_dense(layer) for layer in range(3)]
    assert first["l0_per_layer"] == pytest.approx([float((a > 0).float().sum(1).mean()) for a in dense])
    assert first["l0"] == pytest.approx(sum(first["l0_per_layer"]))
    assert (first["step"], first["tokens"], first["epoch"], first["k"]) == (1, 96, 0, 2)
    assert first["lr"] == pytest.approx(2e-3 / 3)
    # dead_after_tokens is one batch here.
    silent = [float((a == 0).all(0).float().mean()) for a in dense]
    assert first["dead_fraction"] == pytest.approx(sum(silent) / 3)


def test_steps_of_the_lines_and_epochs(run: RunConfig) -> None:
    rows = int(ActivationStore.open(run.store.path).used_rows().sum())
    run.train = replace(run.train, tokens=96 * 40, log_every=10, eval_every=25, checkpoint_every=0)
    summary = train(run)
    lines = records(run.run)
    assert [line["step"] for line in lines if "loss" in line] == [1, 10, 20, 30, 40]
    assert [line["step"] for line in lines if "eval" in line] == [25, 40]
    assert lines[-2]["epoch"] == (39 * 96) // rows >= 2
    assert lines[-2]["epochs"] == pytest.approx(40 * 96 / rows)
    assert summary.metrics == lines[-2] | lines[-1]
    assert (summary.steps, summary.resumed_from) == (40, None)
    assert [path.name for path in (Path(run.run) / "checkpoints").iterdir()] == ["step_00000040"]
    assert all(math.isfinite(line["grad_norm"]) for line in lines if "loss" in line)
    assert load_config(run.run) == run


def test_training_learns(run: RunConfig) -> None:
    run = tiny_run(run, Path(run.run), {"optim.lr": 0.01, "train.tokens": 96 * 60, "activation.k": 8})
    metrics = train(run).metrics
    assert records(run.run)[0]["fvu"] > 0.9
    assert metrics["fvu"] < 0.75
    assert metrics["eval"]["fvu"] < 0.85


# --- evaluation on held-out rows, calibration -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "relu"])
def test_evaluation_is_by_definition(run: RunConfig, kind: str) -> None:
    run = tiny_run(run, Path(run.run), {"activation.kind": kind})
    evaluation = train(run).metrics["eval"]
    model = load_transcoder(run.run)
    held_out = ActivationStore.open(run.store.path).held_out()
    assert held_out is not None
    batches = list(held_out_batches(held_out, batch_rows=96, device=CPU))
    x_BLD, y_BLD = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert evaluation["rows"] == len(x_BLD) == int(held_out.used_rows().sum())
    fvu_L = _fvu(y_BLD, model.reconstruct(x_BLD))
    assert evaluation["fvu_per_layer"] == pytest.approx(fvu_L.tolist(), rel=1e-5)
    assert evaluation["fvu"] == pytest.approx(float(fvu_L.mean()), rel=1e-5)
    l0_L = model.encode(x_BLD, rule="inference").l0_L()
    assert evaluation["l0_per_layer"] == pytest.approx(l0_L.tolist())
    assert evaluation["l0"] == pytest.approx(float(l0_L.sum()))
    by_training = [model.reconstruct(x, rule="training") for x, _ in batches]
    rule = evaluation["training_rule"]
    assert rule["fvu"] == pytest.approx(float(_fvu(y_BLD, torch.cat(by_training)).mean()), rel=1e-5)
    counts = [float(model.encode(x, rule="training").l0_L().sum()) * len(x) for x, _ in batches]
    assert rule["l0"] == pytest.approx(sum(counts) / len(x_BLD))


def test_planted_reconstructions_score_zero_and_one(run: RunConfig) -> None:
    run = tiny_run(run, Path(run.run), {"activation.kind": "relu", "model.skip": True})
    statistics = ActivationStore.open(run.store.path).statistics()
    model = build_model(run, statistics, device=CPU)
    generator = torch.Generator().manual_seed(0)
    x_BLD = torch.randn(50, 3, 16, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for layer in model.source_layers:
            layer.b_enc.fill_(-1e6)
            assert layer.W_skip is not None
            layer.W_skip.copy_(torch.eye(16))
        model.set_scaling(*(f(3, 16) for f in (torch.zeros, torch.ones, torch.zeros, torch.ones)))
    mean_LD = torch.zeros(3, 16)
    assert evaluate_rows(model, [(x_BLD, x_BLD)], mean_out_LD=mean_LD)["fvu"] < 1e-10
    with torch.no_grad():
        for layer, mean_D in zip(model.source_layers, x_BLD.mean(0), strict=True):
            assert layer.W_skip is not None
            layer.W_skip.zero_()
            layer.b_dec.copy_(mean_D)
    scores = evaluate_rows(model, [(x_BLD[:20], x_BLD[:20]), (x_BLD[20:], x_BLD[20:])], mean_out_LD=mean_LD)
    assert scores["fvu"] == pytest.approx(1.0, rel=1e-6)
    assert (scores["l0"], scores["rows"]) == (0.0, 50)


@pytest.mark.parametrize(("n_rows", "batch_rows"), [(300, 96), (64, 200), (10**6, 128), (1, 1)])
def test_calibration_rows_are_training_rows_spread_over_the_store(
    tiny_store: RunConfig, n_rows: int, batch_rows: int
) -> None:
    store = ActivationStore.open(tiny_store.store.path)
    rows = CalibrationRows(store=store, n_rows=n_rows, batch_rows=batch_rows, device=CPU)
    batches = list(rows)
    used = torch.from_numpy(store.used_rows())
    everything = store[: store.n_rows].mlp_in
    # Rows that begin alike are equal: they are counted.
    allowed = Counter(row.numpy().tobytes() for row in everything[used])
    found = Counter(row.numpy().tobytes() for batch in batches for row in batch)
    assert found.total() == min(n_rows, int(used.sum()))
    assert found <= allowed
    assert [len(batch) for batch in batches[:-1]] == [batch_rows] * (len(batches) - 1)
    if n_rows >= 300:
        places = [place for place, row in enumerate(everything) if row.numpy().tobytes() in found]
        assert np.diff(places).max() < store.n_rows / 6
    assert all(torch.equal(a, b) for a, b in zip(batches, rows, strict=True))


def test_calibration_meets_the_training_rule_on_its_rows(run: RunConfig) -> None:
    train(run)
    model = load_transcoder(run.run)
    store = ActivationStore.open(run.store.path)
    rows = CalibrationRows(store=store, n_rows=300, batch_rows=96, device=CPU)
    counts = {rule: sum(model.encode(x, rule=rule).l0_L() * len(x) for x in rows) for rule in ("training", "inference")}
    # Rows that begin alike (BOS and the same token) are equal, and no threshold lies between equal scores.
    torch.testing.assert_close(counts["inference"], counts["training"], rtol=0, atol=4)


def test_without_held_out_rows_the_end_is_calibrated_and_nothing_measured(run: RunConfig, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(run.store.path, store)
    shutil.rmtree(store / "held_out")
    run = tiny_run(run, Path(run.run), {"store.path": str(store)})
    summary = train(run)
    assert "eval" not in summary.metrics
    assert load_transcoder(run.run).threshold_LF.isfinite().all()


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_run_is_loaded_as_it_was_saved(run: RunConfig) -> None:
    train(run)
    loaded = load_run(run.run)
    saved = {name: t for name, t in checkpoint_tensors(run.run).items() if not name.startswith("optimizer.")}
    assert_same_bits(dict(loaded.model.state_dict()), saved)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.layers, loaded.step) == ((0, 1, 2), 12)
    assert loaded.subject.path == run.subject.path
    assert loaded.config == run
    x_BLD = ActivationStore.open(run.store.path)[0:5].mlp_in
    assert CrossLayerTranscoder.load(run.run).reconstruct(x_BLD).shape == (5, 3, 16)


def test_loading_says_when_the_threshold_is_older_than_the_weights(
    run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(run)
    shutil.rmtree(Path(run.run) / "checkpoints/step_00000012")
    load_run(run.run)
    assert "is at step 10, its inference threshold was calibrated at step 8" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_refused(run: RunConfig) -> None:
    train(run)
    shutil.rmtree(Path(run.run) / "checkpoints")
    with pytest.raises(UserError, match="has no good checkpoint"):
        load_run(run.run)


@pytest.mark.parametrize("overrides", [{}, {"activation.kind": "jumprelu"}, {"model.skip": True}])
@pytest.mark.parametrize("span", list(Span))
def test_sizes_are_counted_before_anything_is_built(run: RunConfig, overrides: dict[str, object], span: Span) -> None:
    run = tiny_run(run, Path(run.run), overrides)
    run.model.span = span
    spec = model_spec(run.model, run.activation, 3, 16)
    model = CrossLayerTranscoder(spec)
    assert parameter_count(spec) == sum(parameter.numel() for parameter in model.parameters())
    train(run)
    written = sum(file.stat().st_size for file in (Path(run.run) / "checkpoints/step_00000012").glob("*.safetensors"))
    # Headers and scales besides.
    counted = checkpoint_bytes(spec, run.optim)
    assert counted < written < counted + 40_000


# --- refusals at the start -------------------------------------------------------------------------------------------


def _refused(config: RunConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(config)
    assert "\n" not in str(error.value)
    assert not Path(config.run).exists()


def test_stores_that_are_not_the_runs_are_refused(run: RunConfig, tmp_path: Path, tiny_store: RunConfig) -> None:
    _refused(tiny_run(run, Path(run.run), {"store.path": str(tmp_path / "nowhere")}), "nowhere does not exist")
    _refused(tiny_run(run, Path(run.run), {"store.path": str(tmp_path)}), "is not an activation store")
    _refused(tiny_run(run, Path(run.run), {"store.layer_start": 1}), "store.layer_start: 0 there, 1 asked for")
    _refused(tiny_run(run, Path(run.run), {"store.layer_stop": 2}), "store.layer_stop: 3 there, 2 asked for")
    _refused(tiny_run(run, Path(run.run), {"store.input_hook": "mlp_in"}), "store.input_hook: resid_mid there")
    _refused(tiny_run(run, Path(run.run), {"text.held_out_documents": 3}), "text.held_out_documents: 4 there, 3 asked")
    _refused(tiny_run(run, Path(run.run), {"subject.dtype": "bfloat16"}), "another subject: .*float32.* there")
    _refused(tiny_run(run, Path(run.run), {"subject.bos": "never"}), "subject.bos: auto there, never asked for")
    for name, value in (("dtype", "bfloat16"), ("outlier_factor", 9.0), ("chunk_rows", 64), ("tokens", 9_999)):
        _refused(tiny_run(run, Path(run.run), {f"store.{name}": value}), f"store.{name}: .* there, {value} asked for")
    _refused(tiny_run(run, Path(run.run), {"text.streaming": False}), "text.streaming: True there, False asked for")
    too_large = {"train.tokens": 10_000, "train.batch_size_tokens": 5_000}
    _refused(tiny_run(run, Path(run.run), too_large), r"has \d+ rows to train on, fewer than one batch of .*=5000")
    half = tmp_path / "half"
    shutil.copytree(tiny_store.store.path, half)
    manifest = (half / "manifest.json").read_text()
    (half / "manifest.json").write_text(manifest.replace('"complete"', '"harvesting"'))
    _refused(tiny_run(run, Path(run.run), {"store.path": str(half)}), "half written")


def test_a_store_of_another_subject_is_refused_and_a_moved_one_is_not(run: RunConfig, tmp_path: Path) -> None:
    other = tiny_subject_folder(tmp_path / "other", "llama", seed=1)
    _refused(tiny_run(run, Path(run.run), {"subject.path": str(other)}), "is of another subject")
    moved = tmp_path / "moved"
    shutil.copytree(run.subject.path, moved)
    open_training_store(tiny_run(run, Path(run.run), {"subject.path": str(moved), "subject.cache_dir": str(tmp_path)}))


def test_text_that_moved_is_the_same_text(run: RunConfig, tmp_path: Path, tiny_text: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_text, moved)
    asked = tiny_run(run, Path(run.run), {"text.path": f"{moved}/*.txt"})
    open_training_store(asked)
    (moved / "one_more.txt").write_text("One more document.")
    _refused(asked, "text.path=.* is now 41 files.*harvested from 40 files")


def test_another_revision_of_a_hub_subject_is_looked_up(
    run: RunConfig, tiny_store: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one asked for at the harvest is not: training needs no hub."""
    copy = tmp_path / "store"
    shutil.copytree(tiny_store.store.path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["subject"] |= {"path": "org/tiny", "revision": "1" * 40, "asked_revision": "v1"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    info = SubjectInfo.from_dict(manifest["subject"] | {"fingerprint": "hub:org/tiny@" + "2" * 40})
    monkeypatch.setattr("activation_store.subject.describe_subject", lambda cfg: info)
    there = {"store.path": str(copy), "subject.path": "org/tiny"}
    open_training_store(tiny_run(run, Path(run.run), {**there, "subject.revision": "v1"}))
    _refused(tiny_run(run, Path(run.run), {**there, "subject.revision": "v2"}), "another subject: .*@2222")


def test_rules_and_folders_are_checked_before_anything_is_written(run: RunConfig, tmp_path: Path) -> None:
    _refused(tiny_run(run, Path(run.run), {"activation.k": 65}), "activation.k=65 .* model.n_features=64")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not a run folder"):
        train(replace(run, run=str(tmp_path / "other")))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_another_store_is_refused_on_resume(run: RunConfig, tiny_store: RunConfig) -> None:
    train(run)
    shutil.rmtree(Path(run.run) / "checkpoints/step_00000012")
    store = ActivationStore.open(run.store.path)
    mine = store_identity(store)
    store.manifest.dtype = StoreDtype.bfloat16
    assert store_identity(store) != mine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.sources.store_identity", lambda store: "another")
        with pytest.raises(UserError, match=r"is not the store that run=.* was trained on until step 10"):
            train(run)
    assert train(run).resumed_from == 10


# --- failures later --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint_every", [2, 0])
def test_the_first_loss_that_is_not_finite_stops_the_run(run: RunConfig, checkpoint_every: int) -> None:
    overrides = {
        "optim.lr": 1e22,
        "optim.clip_norm": 0.0,
        "train.checkpoint_every": checkpoint_every,
        "train.log_every": 1,
    }
    run = tiny_run(run, Path(run.run), overrides)
    with pytest.raises(UserError, match=r"(loss|norm) is (inf|nan) at step (\d+), first in layer \d") as error:
        train(run)
    message = str(error.value)
    assert "\n" not in message
    step = int(message.split("at step ")[1].split(",", maxsplit=1)[0])
    assert [line["step"] for line in records(run.run) if "loss" in line] == list(range(1, step))
    checkpoint = Checkpointer(run.run).newest_good()
    if checkpoint_every == 0 or step <= 2:
        assert checkpoint is None
        assert "no checkpoint was written yet" in message
    else:
        assert checkpoint is not None
        assert str(checkpoint.path) in message
        assert f"`layerloom train run={run.run}`" in message
        assert all(t.isfinite().all() for n, t in checkpoint_tensors(run.run).items() if n != "threshold_LF")


def test_weights_broken_by_the_last_update_are_not_saved(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    update = PlainEngine.update

    def overflow(engine: PlainEngine, norm: float) -> None:
        update(engine, norm)
        with torch.no_grad():
            engine.model.source_layers[1].W_enc[2] = torch.nan

    run = tiny_run(run, Path(run.run), {"train.tokens": run.train.batch_size_tokens})
    monkeypatch.setattr(PlainEngine, "update", overflow)
    with pytest.raises(UserError, match="after step 1: layer 1 has scores that are not finite") as error:
        train(run)
    assert "then start again with `layerloom train run=" in str(error.value)
    assert Checkpointer(run.run).newest_good() is None


def test_the_layer_at_fault_is_named(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_broken(*args: object, **kwargs: object) -> CrossLayerTranscoder:
        model = build_model(*args, **kwargs)  # type: ignore[arg-type]
        with torch.no_grad():
            model.source_layers[1].b_dec[3] = torch.inf
        return model

    monkeypatch.setattr("trainer.setup.build_model", build_broken)
    with pytest.raises(UserError, match=r"the loss is inf at step 1, first in layer 1 \(its reconstruction\)"):
        train(run)
    assert records(run.run) == []


def test_a_damaged_shard_names_itself_and_how_to_continue(run: RunConfig, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(run.store.path, store)
    run.store = replace(run.store, path=str(store))
    run.source.pool_rows = 32
    for file in sorted(path for path in (store / "mlp_in/c").rglob("*") if path.is_file())[1:]:
        os.truncate(file, 100)
    with pytest.raises(
        UserError,
        match=r"mlp_in/c/.*layerloom store verify.*; then (resume from|start again with `layerloom train run=)",
    ) as error:
        train(run)
    assert "\n" not in str(error.value)
