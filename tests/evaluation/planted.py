"""Small subjects and transcoders whose evaluation is known beforehand."""

import json
from pathlib import Path

import torch

from activation_store.config import InputHook, SubjectConfig
from activation_store.hooks import CaptureHooks
from activation_store.statistics import RowSums, ScalingStatistics, finish, sum_rows
from activation_store.subject import Subject, load_subject
from activation_store.text import Document
from activation_store.tokens import PackedContexts, pack_tokens
from tests.tiny import sentences, tiny_subject_folder
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.spec import ModelSpec

CPU = torch.device("cpu")


def relu_subject(folder: Path) -> Subject:
    """A GPT-2 whose MLP is W_out relu(W_in x + b_in) + b_out: exactly a per-layer relu transcoder of its mlp_in."""
    tiny_subject_folder(folder, "gpt2")
    config = json.loads((folder / "config.json").read_text())
    config["activation_function"] = "relu"
    (folder / "config.json").write_text(json.dumps(config))
    return load_subject(SubjectConfig(path=str(folder)), device=CPU)


def exact_transcoder(subject: Subject, span: str, *, scaled: bool) -> CrossLayerTranscoder:
    """The subject's MLPs as a transcoder; `scaled`: the same function in other units."""
    mlps = [subject.layer(index).mlp for index in range(subject.n_layers)]
    spec = ModelSpec(n_layers=len(mlps), d_model=subject.d_model, n_features=mlps[0].c_fc.nf, span=span, kind="relu")
    model = CrossLayerTranscoder(spec)
    if scaled:
        generator = torch.Generator().manual_seed(1)
        shape = (spec.n_layers, spec.d_model)
        shifts = [torch.randn(shape, generator=generator) for _ in range(2)]
        scales = [torch.rand(shape, generator=generator) + 0.5 for _ in range(2)]
        model.set_scaling(shifts[0], scales[0], shifts[1], scales[1])
    with torch.no_grad():
        for index, (layer, mlp) in enumerate(zip(model.source_layers, mlps, strict=True)):
            layer.W_enc.copy_(mlp.c_fc.weight.T / model.input_scale_LD[index])
            layer.b_enc.copy_(mlp.c_fc.bias + mlp.c_fc.weight.T @ model.input_shift_LD[index])
            layer.W_dec.zero_()
            layer.W_dec[:, 0] = mlp.c_proj.weight * model.target_scale_LD[index]
            layer.b_dec.copy_((mlp.c_proj.bias - model.target_shift_LD[index]) * model.target_scale_LD[index])
    return model.eval()


def constant_transcoder(subject: Subject, constant_LD: torch.Tensor) -> CrossLayerTranscoder:
    """No feature is ever active; the reconstruction is `constant_LD`."""
    spec = ModelSpec(n_layers=len(constant_LD), d_model=subject.d_model, n_features=5, kind="relu")
    model = CrossLayerTranscoder(spec)
    with torch.no_grad():
        for layer, constant_D in zip(model.source_layers, constant_LD, strict=True):
            layer.W_enc.zero_()
            layer.b_enc.fill_(-1.0)
            layer.W_dec.zero_()
            layer.b_dec.copy_(constant_D)
    return model.eval()


def random_transcoder(
    n_layers: int, d_model: int, kind: str, *, n_features: int = 24, **spec: object
) -> CrossLayerTranscoder:
    """A cross-layer transcoder with random weights and scaling; topk and batchtopk get a threshold."""
    model = CrossLayerTranscoder(
        ModelSpec(n_layers=n_layers, d_model=d_model, n_features=n_features, kind=kind, **spec),
        seed=3,  # type: ignore[arg-type]
    )
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name in ("input", "target"):
            getattr(model, f"{name}_shift_LD").normal_(generator=generator)
            getattr(model, f"{name}_scale_LD").uniform_(0.5, 1.5, generator=generator)
        model.threshold_LF.uniform_(0.2, 0.8, generator=generator)
    return model.eval()


def held_out_contexts(subject: Subject, lengths: tuple[int, ...], context_length: int, seed: int = 5) -> PackedContexts:
    """Documents of so many sentences; ids count by sevens."""
    documents = [
        Document(7 * number, sentences(length, seed=seed + number), f"{number}.txt")
        for number, length in enumerate(lengths)
    ]
    return pack_tokens(documents, subject.tokenizer, context_length=context_length, bos_token_id=subject.bos_token_id)


def statistics_of(subject: Subject, contexts: PackedContexts, hook: InputHook, layers: range) -> ScalingStatistics:
    """Statistics of the rows that are neither position 0 nor special, as a store has them."""
    captured = CaptureHooks(subject, input_hook=hook, layer_start=layers.start, layer_stop=layers.stop).capture(
        contexts.token_ids_NC, contexts.positions_NC
    )
    used_NC = contexts.valid_NC & (contexts.positions_NC > 0)
    for token in subject.special_token_ids:
        used_NC &= contexts.token_ids_NC != token
    sums = sum_rows(captured.mlp_in_NCLD[used_NC], captured.mlp_out_NCLD[used_NC])
    return finish(sums, RowSums.zeros(len(layers), subject.d_model))
