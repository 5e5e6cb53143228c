"""Capture and replacement, held to what the models themselves compute, for every family.

Shape suffixes: N rows, C tokens, L layers, D d_model.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Phi3Config

from activation_store.architectures import ARCHITECTURES as TABLE
from activation_store.architectures import ArchitectureSpec, architecture_spec
from activation_store.config import Dtype, SubjectConfig
from activation_store.errors import UserError
from activation_store.hooks import CaptureHooks, forward_logits, forward_replaced, run_mlp
from activation_store.subject import Subject, load_subject
from tests.tiny import ARCHITECTURES, tiny_tokenizer

Load = Callable[[str], Subject]
CPU = torch.device("cpu")
# Families and hooks that exist together: a parallel residual has no resid_mid.
PAIRS = [(a, h) for a in ARCHITECTURES for h in ("resid_mid", "mlp_in") if (a, h) != ("gpt_neox", "resid_mid")]


def tokens(rows: int = 2, length: int = 13) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids_NC = torch.randint(3, 300, (rows, length), generator=generator)
    return ids_NC, torch.arange(length).expand(rows, -1)


def test_every_entry_of_the_table_is_tested() -> None:
    assert {a.removesuffix("_serial") for a in ARCHITECTURES} == set(TABLE)


@pytest.mark.parametrize(("architecture", "hook"), PAIRS)
def test_captured_input_through_the_own_mlp_gives_captured_output(architecture: str, hook: str, load: Load) -> None:
    subject = load(architecture)
    captured = CaptureHooks(subject, input_hook=hook).capture(*tokens())
    assert captured.mlp_in_NCLD.shape == captured.mlp_out_NCLD.shape == (2, 13, 3, 16)
    for layer in range(3):
        mlp_out_NCD = run_mlp(subject, layer, captured.mlp_in_NCLD[:, :, layer], input_hook=hook)
        torch.testing.assert_close(mlp_out_NCD, captured.mlp_out_NCLD[:, :, layer], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_capture_agrees_with_the_models_own_hidden_states(architecture: str, load: Load) -> None:
    """resid_post = resid_mid + mlp_out, in the stream that transformers itself reports (its last is normed)."""
    subject = load(architecture)
    ids_NC, positions_NC = tokens()
    with torch.no_grad():
        stream = subject.model(ids_NC, position_ids=positions_NC, output_hidden_states=True).hidden_states
    parallel = architecture == "gpt_neox"
    captured = CaptureHooks(subject, input_hook="mlp_in" if parallel else "resid_mid").capture(ids_NC, positions_NC)
    for layer in range(2):
        mlp_in_NCD, mlp_out_NCD = captured.mlp_in_NCLD[:, :, layer], captured.mlp_out_NCLD[:, :, layer]
        if parallel:
            normed_NCD = subject.layer(layer).post_attention_layernorm(stream[layer])  # type: ignore[operator]
            torch.testing.assert_close(mlp_in_NCD, normed_NCD, atol=1e-5, rtol=1e-5)
        else:
            torch.testing.assert_close(stream[layer + 1], mlp_in_NCD + mlp_out_NCD, atol=1e-5, rtol=1e-5)
        assert mlp_out_NCD.std() > 0.01


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "gpt_neox"])
def test_the_two_hooks_differ(architecture: str, load: Load) -> None:
    before, after = (
        CaptureHooks(load(architecture), input_hook=hook).capture(*tokens()) for hook in ("resid_mid", "mlp_in")
    )
    assert (before.mlp_in_NCLD - after.mlp_in_NCLD).abs().mean() > 0.1
    assert torch.equal(before.mlp_out_NCLD, after.mlp_out_NCLD)


@pytest.mark.parametrize(("architecture", "hook"), PAIRS)
def test_splicing_the_captured_output_back_gives_the_same_logits(architecture: str, hook: str, load: Load) -> None:
    subject = load(architecture)
    ids_NC, positions_NC = tokens()
    captured = CaptureHooks(subject, input_hook=hook).capture(ids_NC, positions_NC)
    seen: list[int] = []

    def replace(layer: int, mlp_in_NCD: Tensor, own_mlp_out_NCD: Tensor) -> Tensor:
        seen.append(layer)
        torch.testing.assert_close(mlp_in_NCD, captured.mlp_in_NCLD[:, :, layer], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own_mlp_out_NCD, captured.mlp_out_NCLD[:, :, layer], atol=1e-5, rtol=1e-5)
        return captured.mlp_out_NCLD[:, :, layer].double()

    logits = forward_replaced(subject, ids_NC, positions_NC, input_hook=hook, layers=range(3), replace=replace)
    assert seen == [0, 1, 2]
    torch.testing.assert_close(logits, forward_logits(subject, ids_NC, positions_NC), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_replaced_mlp_is_a_model_with_that_mlp(architecture: str, load: Load) -> None:
    """Replacing layers 0 and 1 by zero equals a copy of the model whose MLPs there end in zero weights."""
    subject = load(architecture)
    ids_NC, positions_NC = tokens()
    ablated = copy.deepcopy(subject.model)
    for layer in subject.spec.layer_list(ablated)[:2]:
        down = list(layer.get_submodule("mlp").children())
        last = next(m for m in down if m is getattr(layer.mlp, _DOWN.get(architecture, "down_proj")))
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
    inputs_seen: dict[int, Tensor] = {}

    def replace(layer: int, mlp_in_NCD: Tensor, own_mlp_out_NCD: Tensor) -> Tensor:
        inputs_seen[layer] = mlp_in_NCD
        return torch.zeros_like(own_mlp_out_NCD)

    logits = forward_replaced(subject, ids_NC, positions_NC, input_hook="mlp_in", layers=range(2), replace=replace)
    with torch.no_grad():
        wanted = ablated(ids_NC, position_ids=positions_NC).logits
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    assert (logits - forward_logits(subject, ids_NC, positions_NC)).abs().max() > 0.01
    # Layer 1 reads the replaced stream, not the original one.
    original_NCD = CaptureHooks(subject, input_hook="mlp_in").capture(ids_NC, positions_NC).mlp_in_NCLD[:, :, 1]
    assert (inputs_seen[1] - original_NCD).abs().max() > 0.01


_DOWN = {"gpt2": "c_proj", "gpt_neox": "dense_4h_to_h", "gpt_neox_serial": "dense_4h_to_h"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_layers_asked_for_are_run_and_never_the_head(architecture: str, load: Load) -> None:
    subject = load(architecture)
    calls: list[str] = []
    watched = {f"layer {i}": layer for i, layer in enumerate(subject.spec.layer_list(subject.model))}
    watched["head"] = subject.model.get_output_embeddings()  # type: ignore[operator]
    handles = [m.register_forward_pre_hook(lambda *_, n=name: calls.append(n)) for name, m in watched.items()]
    try:
        part = CaptureHooks(subject, input_hook="mlp_in", layer_start=1, layer_stop=2).capture(*tokens())
        assert calls == ["layer 0", "layer 1"]
        calls.clear()
        whole = CaptureHooks(subject, input_hook="mlp_in").capture(*tokens())
        assert calls == ["layer 0", "layer 1", "layer 2"]
        calls.clear()
        forward_logits(subject, *tokens())
        assert calls[-1] == "head"
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(part.mlp_in_NCLD[:, :, 0], whole.mlp_in_NCLD[:, :, 1])
    assert torch.equal(part.mlp_out_NCLD[:, :, 0], whole.mlp_out_NCLD[:, :, 1])


def test_no_hook_is_left_behind(load: Load) -> None:
    subject = load("llama")

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())

    def fails(layer: int, mlp_in_NCD: Tensor, own_mlp_out_NCD: Tensor) -> Tensor:
        assert hooks() > before
        return own_mlp_out_NCD[:, :-1]

    before = hooks()
    CaptureHooks(subject, input_hook="resid_mid").capture(*tokens())
    assert hooks() == before
    with pytest.raises(ValueError, match=r"\(2, 12, 16\), wanted \(2, 13, 16\)"):
        forward_replaced(subject, *tokens(), input_hook="resid_mid", layers=range(1, 2), replace=fails)
    assert hooks() == before


@pytest.mark.parametrize("dtype", list(Dtype))
def test_activations_are_of_the_subjects_dtype(dtype: Dtype, family: Callable[[str], Path], load: Load) -> None:
    subject = load_subject(SubjectConfig(path=str(family("llama")), dtype=dtype), device=CPU)
    captured = CaptureHooks(subject, input_hook="resid_mid").capture(*tokens())
    assert captured.mlp_in_NCLD.dtype == captured.mlp_out_NCLD.dtype == getattr(torch, dtype) == subject.dtype
    exact = CaptureHooks(load("llama"), input_hook="resid_mid").capture(*tokens())
    torch.testing.assert_close(captured.mlp_in_NCLD.float(), exact.mlp_in_NCLD, atol=0.15, rtol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captures_stay_on_the_device(family: Callable[[str], Path], load: Load) -> None:
    subject = load_subject(SubjectConfig(path=str(family("llama"))), device=torch.device("cuda"))
    captured = CaptureHooks(subject, input_hook="resid_mid").capture(*tokens())
    assert captured.mlp_in_NCLD.is_cuda
    assert captured.mlp_out_NCLD.is_cuda
    exact = CaptureHooks(load("llama"), input_hook="resid_mid").capture(*tokens())
    torch.testing.assert_close(captured.mlp_out_NCLD.cpu(), exact.mlp_out_NCLD, atol=1e-3, rtol=1e-3)


def test_gemma2_keeps_its_attention_softcapping(family: Callable[[str], Path], load: Load) -> None:
    """The fast kernels would leave it out without a word; the eager implementation is the reference."""
    ids_NC, positions_NC = tokens()
    reference = AutoModelForCausalLM.from_pretrained(family("gemma2"), attn_implementation="eager")
    with torch.no_grad():
        wanted = reference(ids_NC).logits
        for layer in reference.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        uncapped = reference(ids_NC).logits
    assert (wanted - uncapped).abs().max() > 0.05
    torch.testing.assert_close(forward_logits(load("gemma2"), ids_NC, positions_NC), wanted, atol=1e-5, rtol=1e-5)


def test_parallel_residual_has_no_resid_mid(load: Load) -> None:
    with pytest.raises(
        UserError, match=r"resid_mid does not exist in this gpt_neox subject.*use store.input_hook=mlp_in"
    ):
        CaptureHooks(load("gpt_neox"), input_hook="resid_mid")


def test_an_unknown_hook_is_refused(load: Load) -> None:
    with pytest.raises(UserError, match=r"input_hook=resid_post is not a hook point; use one of resid_mid, mlp_in"):
        CaptureHooks(load("llama"), input_hook="resid_post")


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (3, None), (2, 2), (2, 1), (-1, 2), (0, 0)])
def test_a_layer_range_out_of_bounds_is_refused(start: int, stop: int | None, load: Load) -> None:
    with pytest.raises(UserError, match=r"is not a range of the subject's 3 layers; wanted 0 <= .* <= 3"):
        CaptureHooks(load("llama"), input_hook="resid_mid", layer_start=start, layer_stop=stop)


def test_a_replaced_layer_out_of_bounds_is_refused(load: Load) -> None:
    with pytest.raises(UserError, match="3 layers"):
        forward_replaced(
            load("llama"), *tokens(), input_hook="mlp_in", layers=range(2, 4), replace=lambda layer, x, own: own
        )


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_context_longer_than_the_subjects_is_refused(architecture: str, load: Load) -> None:
    with pytest.raises(UserError, match=r"context_length=513 is more than the 512 positions .* use at most 512"):
        CaptureHooks(load(architecture), input_hook="mlp_in").capture(*tokens(1, 513))


def test_a_token_outside_the_vocabulary_is_refused(load: Load) -> None:
    ids_NC, positions_NC = tokens()
    ids_NC[1, 3] = 320
    with pytest.raises(UserError, match=r"token id 320 is outside the vocabulary of .* \(320 tokens\)"):
        CaptureHooks(load("llama"), input_hook="mlp_in").capture(ids_NC, positions_NC)


def test_another_architecture_is_one_table_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Phi3Config(
        vocab_size=320, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    cfg = SubjectConfig(path=str(tmp_path))
    with pytest.raises(UserError, match=r"'phi3' is not one of gpt2, .*; add an entry to ARCHITECTURES in \S+\.py"):
        load_subject(cfg, device=CPU)
    entry = ArchitectureSpec(layers="model.layers", norm="post_attention_layernorm", mlp="mlp")
    monkeypatch.setitem(TABLE, "phi3", entry)
    assert architecture_spec("phi3") is entry
    subject = load_subject(cfg, device=CPU)
    captured = CaptureHooks(subject, input_hook="resid_mid").capture(*tokens())
    again_NCD = run_mlp(subject, 1, captured.mlp_in_NCLD[:, :, 1], input_hook="resid_mid")
    torch.testing.assert_close(again_NCD, captured.mlp_out_NCLD[:, :, 1])
