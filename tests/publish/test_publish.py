"""`publish` on a run made by the real stages on a tiny Llama: what is written, when it is refused, and the card."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from activation_store.config import Loader, StoreConfig, SubjectConfig, TextConfig
from activation_store.errors import UserError
from activation_store.harvest import harvest
from activation_store.store import ActivationStore
from tests.publish.hand import hand_reconstruction
from trainer.config import (
    ActivationConfig,
    ActivationKind,
    EvalConfig,
    ModelConfig,
    PublishConfig,
    RunConfig,
    Scaling,
    SelectionScope,
    Span,
    TrainConfig,
)
from trainer.evaluation.evaluate import evaluate
from trainer.load import load_run
from trainer.model.clt import CrossLayerTranscoder
from trainer.publish import folder
from trainer.publish.card import CardContent, model_card
from trainer.publish.export import publish
from trainer.publish.fold_model import fold_layer
from trainer.publish.layout import write_layer
from trainer.run_folder import save_config
from trainer.train import train


def run_config(tmp: Path, subject: Path, text: Path) -> RunConfig:
    return RunConfig(
        subject=SubjectConfig(path=str(subject), base_model="org/tiny-llama", license="mit"),
        text=TextConfig(
            path=str(text), context_length=32, held_out_documents=4, documents_per_block=8, license="cc0-1.0"
        ),
        store=StoreConfig(path=str(tmp / "store"), tokens=2_000, held_out_tokens=256, chunk_rows=32, shard_rows=64),
        model=ModelConfig(n_features=24, target_scaling=Scaling.standardize),
        activation=ActivationConfig(kind=ActivationKind.topk, k=4, calibration_tokens=512),
        train=TrainConfig(tokens=4_096, batch_size_tokens=128, eval_every=0),
        run=str(tmp / "run"),
        device="cpu",
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_text: Path) -> Path:
    """A trained and evaluated run; read only."""
    tmp = tmp_path_factory.mktemp("publish")
    config = run_config(tmp, tiny_llama, tiny_text)
    harvest(config.subject, config.text, config.store, device="cpu")
    train(config)
    evaluate(tmp / "run", EvalConfig(documents=4), device="cpu")
    return tmp / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change (its store is shared)."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def held_out_rows(run: Path) -> torch.Tensor:
    store = ActivationStore.open(load_run(run).config.store.path).held_out()
    assert store is not None
    return store[0:100].mlp_in[torch.from_numpy(store.used_rows())[:100]]


def test_published_folder(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "published"
    summary = publish(trained, output, PublishConfig(), device="cpu")
    assert summary.output == output
    assert summary.comparison is not None
    assert summary.comparison.source == "held-out"
    assert summary.comparison.max_relative_error < 1e-5
    assert not summary.unchanged

    layers = {f"{side}_{i}.safetensors" for side in ("W_enc", "W_dec") for i in range(3)}
    others = {"config.yaml", "README.md", "evaluation.json", "layerloom_config.yaml", "plots"}
    assert {file.name for file in output.iterdir()} == layers | others
    assert [file.name for file in output.parent.iterdir()] == ["published"]
    assert yaml.safe_load((output / "config.yaml").read_text()) == {
        "model_kind": "cross_layer_transcoder",
        "model_name": "org/tiny-llama",
        "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out",
        "scan": "layerloom/published",
    }
    assert json.loads((output / "evaluation.json").read_text()) == json.loads((trained / "evaluation.json").read_text())
    assert {file.name for file in (output / "plots").iterdir()} == {file.name for file in (trained / "plots").iterdir()}

    mlp_in = held_out_rows(trained)
    own = load_run(trained).model.reconstruct(mlp_in)
    assert float(own.std()) > 0.1
    torch.testing.assert_close(torch.from_numpy(hand_reconstruction(output, mlp_in)).float(), own, rtol=1e-4, atol=1e-4)
    loaded = CrossLayerTranscoder.load(output)
    torch.testing.assert_close(loaded.reconstruct(mlp_in), own, rtol=1e-4, atol=1e-4)


def test_nothing_of_this_machine_is_told(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "published"
    publish(trained, output, PublishConfig(), device="cpu")
    machine = str(Path(load_run(trained).config.store.path).parent)
    texts = [file for file in output.rglob("*") if file.suffix in {".yaml", ".md", ".json"}]
    assert len(texts) == 4
    for file in texts:
        text = file.read_text()
        assert machine not in text
        assert str(tmp_path) not in text
        assert "/tmp" not in text
    shared = yaml.safe_load((output / "layerloom_config.yaml").read_text())
    assert shared["store"]["path"] == "store"
    assert shared["activation"]["k"] == 4
    assert shared["published"]["step"] == 32


def test_model_card(trained: Path, tmp_path: Path) -> None:
    config = PublishConfig(repo="org/tiny-clt", license="cc-by-4.0")
    publish(trained, tmp_path / "published", config, device="cpu")
    card = ModelCard.load(tmp_path / "published" / "README.md")
    metadata = card.data.to_dict()
    assert metadata["library_name"] == "layerloom"
    assert metadata["license"] == "cc-by-4.0"
    assert metadata["base_model"] == "org/tiny-llama"
    assert {"circuit-tracer", "cross-layer-transcoder"} <= set(metadata["tags"])
    evaluation = json.loads((trained / "evaluation.json").read_text())
    fvu, training_fvu = (
        f"{value:.4f}".lstrip("0") for value in (evaluation["fvu"], evaluation["training_rule"]["fvu"])
    )
    for told in (
        f"| {fvu} ± ",
        f" {training_fvu} |",
        "`activation.kind` | topk",
        "`activation.k` | 4",
        "licence of the subject | mit",
        "licence of the text | cc0-1.0",
        "4,096 (32 updates)",
        "plots/summary.png",
        'ReplacementModel.from_pretrained("org/tiny-llama", "org/tiny-clt", backend="nnsight")',
        "CrossLayerTranscoder.load(",
        "32 tokens; each begins with BOS (token 1)",
        "held-out rows: largest relative error",
        "## Limits",
    ):
        assert told in card.text, told
    assert "None" not in card.text
    assert "nan" not in card.text.lower().split()


def test_model_card_says_what_to_beware_of(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[CardContent] = []

    def keep(content: CardContent) -> str:
        kept.append(content)
        return "card"

    monkeypatch.setattr("trainer.publish.export.model_card", keep)
    publish(trained, tmp_path / "published", PublishConfig(model_name="/home/me/model"), device="cpu")
    content = kept[0]
    activation = ActivationConfig(kind=ActivationKind.batchtopk, k=4, scope=SelectionScope.all_layers)
    text = TextConfig(path="org/corpus", loader=Loader.hub)
    content = replace(
        content,
        config=replace(content.config, activation=activation, text=text),
        subject={**content.subject, "provenance": "dequantised from a.gguf, sha256 1"},
        evaluation={**content.evaluation, "replacement": None, "dead_fraction_per_layer": None},
        plots=[],
        bos_token_id=0,
    )
    card = model_card(content)
    for told in (
        "datasets:\n- org/corpus",
        "BatchTopK: over a batch the largest, on average 4 features a layer, chosen over all layers together",
        "It belongs to the dequantised weights",
        "BOS is token 0, which circuit-tracer 0.5.0 takes for missing",
        "`model_name` in config.yaml is a path",
        "The replacement model was not measured.",
        "/absolute/path/of/this/folder",
    ):
        assert told in card, told
    assert "plots/" not in card
    assert "no BOS" in model_card(replace(content, bos_token_id=None))


def test_per_layer_skip_transcoders(trained: Path, tmp_path: Path) -> None:
    """The other layout, from training to circuit-tracer's keys."""
    config = load_run(trained).config
    config = replace(config, run=str(tmp_path / "run"), model=replace(config.model, span=Span.per_layer, skip=True))
    config.activation = ActivationConfig(kind=ActivationKind.jumprelu, l0_lambda=1e-3, l0_target=12, auxk_coefficient=0)
    config.train = replace(config.train, tokens=512)
    train(config)
    evaluate(tmp_path / "run", EvalConfig(documents=2, replacement=False), device="cpu")
    output = tmp_path / "published"
    summary = publish(tmp_path / "run", output, PublishConfig(dtype="bfloat16"), device="cpu")
    assert summary.comparison is not None
    assert summary.comparison.tolerance == 2.5e-2
    assert yaml.safe_load((output / "config.yaml").read_text())["model_kind"] == "transcoder_set"
    mlp_in = held_out_rows(trained)
    own = load_run(tmp_path / "run").model.reconstruct(mlp_in)
    published = torch.from_numpy(hand_reconstruction(output, mlp_in)).float()
    assert float((published - own).norm() / own.norm()) < 2e-2
    text = (output / "README.md").read_text()
    assert "per-layer skip transcoders" in text
    assert "The replacement model was not measured." in text


def test_publishing_again(run: Path, tmp_path: Path) -> None:
    """The same is left alone, other options replace the folder, a damaged folder is mended."""
    output = tmp_path / "published"
    publish(run, output, PublishConfig(), device="cpu")
    before = (output / "README.md").stat().st_mtime_ns
    assert publish(run, output, PublishConfig(), device="cpu").unchanged
    assert (output / "README.md").stat().st_mtime_ns == before
    (output / "W_dec_2.safetensors").unlink()
    assert not publish(run, output, PublishConfig(), device="cpu").unchanged
    assert publish(run, output, PublishConfig(), device="cpu").unchanged
    assert not publish(run, output, PublishConfig(model_name="org/other"), device="cpu").unchanged
    assert yaml.safe_load((output / "config.yaml").read_text())["model_name"] == "org/other"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["published", "run"]


def test_output_of_something_else_is_refused(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "published"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.tex and was not published by Layerloom"):
        publish(run, output, PublishConfig(), device="cpu")
    with pytest.raises(UserError, match="is the run folder itself"):
        publish(run, run, PublishConfig(), device="cpu")
    (output / "thesis.tex").rename(tmp_path / "thesis.tex")
    publish(run, output, PublishConfig(), device="cpu")  # an empty folder is fine
    (tmp_path / "thesis.tex").rename(output / "thesis.tex")
    with pytest.raises(UserError, match=r"holds thesis\.tex, which publishing again would delete"):
        publish(run, output, PublishConfig(dtype="float16"), device="cpu")
    with pytest.raises(UserError, match="is a file"):
        publish(run, output / "thesis.tex", PublishConfig(), device="cpu")
    assert (output / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PublishConfig(dtype="int8"),
            r"publish\.dtype=int8 cannot be published; use one of float32, bfloat16, float16",
        ),
        (PublishConfig(repo="just-a-name"), r"publish\.repo=just-a-name is not a repository .* ORG/NAME"),
    ],
)
def test_bad_options(trained: Path, tmp_path: Path, config: PublishConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        publish(trained, tmp_path / "published", config, device="cpu")
    assert not (tmp_path / "published").exists()


def test_evaluation_must_be_that_of_the_checkpoint(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "published"
    inputs = run / "evaluation_inputs.json"
    stale = json.loads(inputs.read_text()) | {"weights_xxh3_64": "0", "checkpoint": "step_00000007"}
    inputs.write_text(json.dumps(stale))
    with pytest.raises(UserError, match=r"measured on step_00000007.*step_00000032; run `layerloom evaluate run="):
        publish(run, output, PublishConfig(), device="cpu")
    inputs.unlink()
    with pytest.raises(UserError, match=r"is not whole; run `layerloom evaluate"):
        publish(run, output, PublishConfig(), device="cpu")
    (run / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"has no evaluation\.json; run `layerloom evaluate run="):
        publish(run, output, PublishConfig(), device="cpu")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has no whole checkpoint"):
        publish(run, output, PublishConfig(), device="cpu")
    with pytest.raises(UserError, match="is not a run folder"):
        publish(tmp_path / "nowhere", output, PublishConfig(), device="cpu")
    assert not output.exists()


def _with_state(run: Path, **changes: Any) -> None:
    """Rewrites the checkpoint's state.json (and its checksum), as if another kind of run had written it."""
    from trainer.tensor_file import hash_file

    for checkpoint in (run / "checkpoints").iterdir():
        state = json.loads((checkpoint / "state.json").read_text()) | changes
        (checkpoint / "state.json").write_text(json.dumps(state))
        (checkpoint / "COMPLETE").write_text(hash_file(checkpoint / "state.json").xxh3_64 + "\n")


def test_what_the_layout_cannot_express(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "published"
    spec = load_run(run).model.spec.to_dict()
    _with_state(run, spec={**spec, "skip": True})
    with pytest.raises(UserError, match=r"circuit-tracer ignores W_skip.*model\.skip=false"):
        publish(run, output, PublishConfig(), device="cpu")
    _with_state(run, spec=spec, layers=[0, 1])
    with pytest.raises(UserError, match=r"layers 0 to 1 of 3 cannot be published.*layer_stop=null"):
        publish(run, output, PublishConfig(), device="cpu")
    subject = load_run(run).subject.to_dict()
    _with_state(run, layers=[0, 1, 2], subject={**subject, "architecture": "gpt_neox"})
    with pytest.raises(UserError, match=r"knows no resid_mid hook of gpt_neox.*store\.input_hook=mlp_in"):
        publish(run, output, PublishConfig(), device="cpu")
    assert not output.exists()


@pytest.mark.parametrize(("calibrated", "said"), [(20, "those of step 20"), (None, "not calibrated yet")])
def test_thresholds_that_are_not_of_the_checkpoint(
    run: Path, tmp_path: Path, calibrated: int | None, said: str
) -> None:
    _with_state(run, calibrated_step=calibrated)
    with pytest.raises(UserError, match=f"at step 32 and its thresholds are {said}.*`layerloom train run={run}`"):
        publish(run, tmp_path / "published", PublishConfig(), device="cpu")
    assert not (tmp_path / "published").exists()


def test_a_store_that_is_gone(run: Path, tmp_path: Path) -> None:
    config = load_run(run).config
    save_config(run, replace(config, store=replace(config.store, path=str(tmp_path / "gone"))))
    with pytest.raises(UserError, match=r"the run's store .*gone is not there"):
        publish(run, tmp_path / "published", PublishConfig(), device="cpu")


def test_a_disk_too_small(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "free_bytes", lambda path: 1_000_000)
    with pytest.raises(UserError, match=r"needs 16 MB and 1 MB are free"):
        publish(run, tmp_path / "published", PublishConfig(), device="cpu")


@pytest.mark.parametrize("fails", ["full disk", "interrupt"])
def test_a_failure_leaves_the_old_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    output = tmp_path / "published"
    publish(run, output, PublishConfig(), device="cpu")
    before = {file.name: file.stat().st_mtime_ns for file in output.iterdir()}

    def fail(target: Path, kind: str, i: int, layer: Any) -> int:
        if i == 1:
            raise OSError(errno.ENOSPC, "No space left on device") if fails == "full disk" else KeyboardInterrupt
        return write_layer(target, kind, i, layer)

    monkeypatch.setattr("trainer.publish.export.write_layer", fail)
    with pytest.raises(UserError if fails == "full disk" else KeyboardInterrupt) as caught:
        publish(run, output, PublishConfig(dtype="bfloat16"), device="cpu")
    if fails == "full disk":
        assert "is full" in str(caught.value)
    assert {file.name: file.stat().st_mtime_ns for file in output.iterdir()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["published", "run"]


def test_weights_that_differ_from_the_run_are_not_published(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: CrossLayerTranscoder, s: int, dtype: torch.dtype) -> Any:
        layer = fold_layer(model, s, dtype)
        return replace(layer, b_dec_D=layer.b_dec_D + 0.01) if s == 1 else layer

    monkeypatch.setattr("trainer.publish.export.fold_layer", wrong)
    with pytest.raises(UserError, match="not published, for what was written does not reconstruct as the run does"):
        publish(run, tmp_path / "published", PublishConfig(), device="cpu")
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".published.old").mkdir()
    (tmp_path / ".published.old" / "kept").write_text("old")
    (tmp_path / ".published.partial").mkdir()
    with pytest.raises(KeyboardInterrupt), folder.replaced_folder(tmp_path / "published"):
        raise KeyboardInterrupt
    assert (tmp_path / "published" / "kept").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["published"]
