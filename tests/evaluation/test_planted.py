"""Transcoders whose evaluation is known: the exact answer, constants, and one computed again by other means."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from activation_store.config import InputHook, SubjectConfig
from activation_store.errors import UserError
from activation_store.hooks import CaptureHooks, forward_logits
from activation_store.subject import Subject, load_subject
from activation_store.tokens import PackedContexts
from tests.evaluation.planted import (
    CPU,
    constant_transcoder,
    exact_transcoder,
    held_out_contexts,
    random_transcoder,
    relu_subject,
    statistics_of,
)
from trainer.evaluation.evaluate import evaluate_transcoder
from trainer.evaluation.measure import MeasureSettings, RowGroups, Rows
from trainer.model.clt import CrossLayerTranscoder

LENGTHS = (9, 2, 14, 5, 3)


@pytest.fixture(scope="module")
def relu_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return relu_subject(tmp_path_factory.mktemp("planted") / "relu")


@pytest.fixture(scope="module")
def contexts(relu_gpt2: Subject) -> PackedContexts:
    return held_out_contexts(relu_gpt2, LENGTHS, 48)


def settings_for(subject: Subject, contexts: PackedContexts, hook: InputHook, **changes: Any) -> MeasureSettings:
    layers = changes.pop("layers", range(subject.n_layers))
    given: dict[str, Any] = {
        "input_hook": hook,
        "layers": layers,
        "statistics": statistics_of(subject, held_out_contexts(subject, (30,), 48, seed=99), hook, layers),
        "special_token_ids": subject.special_token_ids,
        "batch_contexts": 3,
    }
    return MeasureSettings(**given | changes)


@pytest.mark.parametrize("span", ["per_layer", "cross_layer"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_exact_answer_scores_fvu_0_and_agreement_1(
    relu_gpt2: Subject, contexts: PackedContexts, span: str, scaled: bool
) -> None:
    settings = settings_for(relu_gpt2, contexts, InputHook.mlp_in)
    model = exact_transcoder(relu_gpt2, span, scaled=scaled)
    evaluation = evaluate_transcoder(model, relu_gpt2, contexts, settings, threshold_rule="zero")
    assert evaluation["fvu"] < 1e-10
    assert max(evaluation["fvu_per_layer"]) < 1e-10
    assert evaluation["training_rule"]["fvu"] == evaluation["fvu"]
    for name in ("replacement", "replacement_all_positions"):
        block = evaluation[name]
        assert block["top1_agreement"] == 1.0
        assert block["top1_agreement_uncertain"] in (1.0, None)
        assert abs(block["kl"]) < 1e-5
        assert block["ce_replaced"] == pytest.approx(block["ce_subject"], abs=1e-5)
        assert block["ce_recovered"] == pytest.approx(1.0, abs=1e-4)
        assert abs(block["ce_ablated"] - block["ce_subject"]) > 0.05


def test_no_active_feature_scores_the_means(relu_gpt2: Subject, contexts: PackedContexts) -> None:
    settings = settings_for(relu_gpt2, contexts, InputHook.mlp_in)
    mean_LD = settings.statistics.out_mean_LD.float()
    model = constant_transcoder(relu_gpt2, mean_LD)
    evaluation = evaluate_transcoder(model, relu_gpt2, contexts, settings, threshold_rule="zero", dead_after_tokens=10)
    # sum (y - m)^2 = sum (y - mean y)^2 + R (mean y - m)^2
    rows_RLD = used_rows(relu_gpt2, contexts, InputHook.mlp_in)
    held_out_LD = rows_RLD.mean(0)
    centred_L = ((rows_RLD - held_out_LD) ** 2).sum((0, 2))
    expected_L = 1 + len(rows_RLD) * ((held_out_LD - mean_LD.double().numpy()) ** 2).sum(1) / centred_L
    assert evaluation["fvu_per_layer"] == pytest.approx(expected_L.tolist(), rel=1e-5)
    assert evaluation["fvu"] > 1
    assert evaluation["l0"] == 0
    assert evaluation["silent_fraction"] == 1
    assert sum(evaluation["density_histogram"]["counts"]) == 0
    block = evaluation["replacement"]
    assert block["ce_replaced"] == pytest.approx(block["ce_ablated"], abs=1e-5)
    assert block["ce_recovered"] == pytest.approx(0, abs=1e-4)

    at_means = constant_transcoder(relu_gpt2, torch.from_numpy(held_out_LD).float())
    evaluation = evaluate_transcoder(at_means, relu_gpt2, contexts, settings, threshold_rule="zero")
    assert evaluation["fvu_per_layer"] == pytest.approx([1.0] * 3, rel=1e-6)


def test_excluded_positions_keep_the_subject_and_are_not_scored(relu_gpt2: Subject, contexts: PackedContexts) -> None:
    """With every token special nothing is replaced or scored; position 0 alone is kept in the other block."""
    every = frozenset(range(relu_gpt2.info.vocab_size)) - {int(contexts.token_ids_NC[0, 5])}
    settings = settings_for(relu_gpt2, contexts, InputHook.mlp_in, special_token_ids=every)
    model = constant_transcoder(relu_gpt2, 5 * torch.ones(3, 16))
    evaluation = evaluate_transcoder(model, relu_gpt2, contexts, settings, threshold_rule="zero")
    scored = (contexts.token_ids_NC == contexts.token_ids_NC[0, 5]) & contexts.valid_NC & (contexts.positions_NC > 0)
    assert evaluation["tokens"] == int(scored.sum())
    assert evaluation["excluded_fraction"] == pytest.approx(1 - int(scored.sum()) / contexts.tokens)
    kl, everywhere = evaluation["replacement"]["kl"], evaluation["replacement_all_positions"]["kl"]
    assert 0 < kl < everywhere


@pytest.mark.parametrize("kind", ["jumprelu", "batchtopk"])
def test_every_figure_agrees_with_a_plain_computation(tiny_llama: Path, kind: str) -> None:
    """Document by document, without packing, hooks of our own, dense features, numpy sums."""
    subject = load_subject(SubjectConfig(path=str(tiny_llama)), device=CPU)
    contexts = held_out_contexts(subject, LENGTHS, 40)
    layers = range(1, 3)
    # Of the tiny model's rows many are "outliers" at so low a factor.
    settings = settings_for(
        subject, contexts, InputHook.resid_mid, layers=layers, outlier_factor=1.5, selection_rows=10_000
    )
    model = random_transcoder(2, 16, kind, k=3)
    model.tokens_since_active_LF[0, :6] = 50
    evaluation = evaluate_transcoder(model, subject, contexts, settings, threshold_rule="any", dead_after_tokens=50)
    expected = Plain(model, subject, contexts, settings)
    assert 0.02 < expected.excluded_fraction() - expected.first_fraction() < 0.6
    assert evaluation["excluded_fraction"] == pytest.approx(expected.excluded_fraction())
    assert evaluation["tokens"] == len(expected.rows())
    assert evaluation["documents"] == len(LENGTHS)
    assert evaluation["fvu_per_layer"] == pytest.approx(expected.fvu_per_layer(), rel=1e-4)
    assert evaluation["fvu"] == pytest.approx(np.mean(expected.fvu_per_layer()), rel=1e-4)
    assert evaluation["l0_per_layer"] == pytest.approx(expected.l0_per_layer())
    assert evaluation["l0"] == pytest.approx(sum(expected.l0_per_layer()))
    assert evaluation["silent_fraction"] == pytest.approx(expected.silent_fraction())
    assert evaluation["dead_fraction"] == pytest.approx(6 / 48)
    assert evaluation["dead_fraction_per_layer"] == pytest.approx([6 / 24, 0])
    for name, keep_first_only in (("replacement", False), ("replacement_all_positions", True)):
        for key, value in expected.replacement(keep_first_only=keep_first_only).items():
            assert evaluation[name][key] == pytest.approx(value, rel=2e-4, abs=1e-5), (name, key)
    if kind == "batchtopk":
        features = model.encode(torch.from_numpy(expected.stack("in")).float(), rule="training")
        assert evaluation["training_rule"]["l0"] == pytest.approx(float(features.l0_L().sum()))
        assert evaluation["training_rule"]["fvu"] != pytest.approx(evaluation["fvu"], rel=1e-3)


def test_standard_errors_are_the_jackknife_of_whole_evaluations(tiny_llama: Path) -> None:
    """Leaving a document out of the text gives the left-out figures."""
    subject = load_subject(SubjectConfig(path=str(tiny_llama)), device=CPU)
    whole = held_out_contexts(subject, (12, 14, 17), 40)
    parts = [whole[slice(0, len(whole))] for _ in range(3)]
    settings = settings_for(subject, whole, InputHook.resid_mid, batch_contexts=50)
    model = random_transcoder(3, 16, "jumprelu")
    full = evaluate_transcoder(model, subject, whole, settings, threshold_rule="learned")
    left_out = []
    for document, part in zip((0, 7, 14), parts, strict=True):
        keep = PackedContexts(
            part.token_ids_NC,
            part.document_ids_NC,
            part.positions_NC,
            part.valid_NC & (part.document_ids_NC != document),
            part.pieces_NC,
        )
        left_out.append(evaluate_transcoder(model, subject, keep, settings, threshold_rule="learned"))
    for path in (("fvu",), ("l0",), ("excluded_fraction",), ("replacement", "ce_recovered"), ("replacement", "kl")):
        values = np.array([pick(evaluation, path) for evaluation in left_out])
        expected = math.sqrt(2 / 3 * ((values - values.mean()) ** 2).sum())
        assert pick(full, (*path[:-1], f"{path[-1]}_se")) == pytest.approx(expected, rel=1e-4, abs=1e-9), path


def test_nothing_but_excluded_rows_is_an_error(relu_gpt2: Subject, contexts: PackedContexts) -> None:
    every = frozenset(range(relu_gpt2.info.vocab_size))
    settings = settings_for(relu_gpt2, contexts, InputHook.mlp_in, special_token_ids=every)
    with pytest.raises(UserError, match="nothing to measure"):
        evaluate_transcoder(
            exact_transcoder(relu_gpt2, "per_layer", scaled=False), relu_gpt2, contexts, settings, threshold_rule="zero"
        )


def test_groups_of_rows_keep_order_and_size() -> None:
    """batchtopk selects over groups of the training microbatch's size, whatever the batches of contexts."""
    values = torch.arange(23)
    groups, found = RowGroups(5), []
    for part in (values[:3], values[3:4], values[4:17], values[17:17], values[17:]):
        found += list(groups.add(Rows(part, part[:, None, None], -part[:, None, None])))
    found += list(groups.rest())
    assert [len(rows) for rows in found] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat([rows.document_R for rows in found]), values)
    assert torch.equal(torch.cat([rows.mlp_out_RLD for rows in found])[:, 0, 0], -values)
    assert list(groups.rest()) == []


def test_without_replacement_both_blocks_are_null(relu_gpt2: Subject, contexts: PackedContexts) -> None:
    settings = settings_for(relu_gpt2, contexts, InputHook.mlp_in, replacement=False)
    model = exact_transcoder(relu_gpt2, "per_layer", scaled=False)
    evaluation = evaluate_transcoder(model, relu_gpt2, contexts, settings, threshold_rule="zero")
    assert evaluation["replacement"] is None
    assert evaluation["replacement_all_positions"] is None
    assert evaluation["fvu"] < 1e-10


def pick(evaluation: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        evaluation = evaluation[key]
    return evaluation


def pieces(contexts: PackedContexts) -> list[tuple[int, Tensor]]:
    """(document, token ids) of every piece."""
    found: list[tuple[int, list[int]]] = []
    for row in range(len(contexts)):
        for column in range(contexts.token_ids_NC.shape[1]):
            if not contexts.valid_NC[row, column]:
                continue
            if contexts.positions_NC[row, column] == 0:
                found.append((int(contexts.document_ids_NC[row, column]), []))
            found[-1][1].append(int(contexts.token_ids_NC[row, column]))
    return [(document, torch.tensor([ids])) for document, ids in found]


def used_rows(subject: Subject, contexts: PackedContexts, hook: InputHook) -> np.ndarray[Any, Any]:
    """mlp_out (rows, L, D) float64 of the rows that are not excluded when nothing is an outlier."""
    rows = []
    for _, ids in pieces(contexts):
        captured = CaptureHooks(subject, input_hook=hook).capture(ids, torch.arange(ids.shape[1])[None])
        used = torch.tensor([p > 0 and int(i) not in subject.special_token_ids for p, i in enumerate(ids[0])])
        rows.append(captured.mlp_out_NCLD[0, used].double())
    return torch.cat(rows).numpy()


class Plain:
    """The figures from their definitions: one piece at a time, dense features, hooks set by hand."""

    def __init__(
        self, model: CrossLayerTranscoder, subject: Subject, contexts: PackedContexts, settings: MeasureSettings
    ) -> None:
        self.model, self.subject, self.settings = model, subject, settings
        self.pieces = []
        hooks = CaptureHooks(
            subject,
            input_hook=settings.input_hook,
            layer_start=settings.layers.start,
            layer_stop=settings.layers.stop,
        )
        for _, ids in pieces(contexts):
            captured = hooks.capture(ids, torch.arange(ids.shape[1])[None])
            x, y = (value[0].double().numpy() for value in (captured.mlp_in_NCLD, captured.mlp_out_NCLD))
            self.pieces.append({"ids": ids, "in": x, "out": y, "excluded": self._excluded(ids[0], x, y)})

    def _excluded(self, ids: Tensor, x: Any, y: Any) -> Any:
        means, factor = self.settings.statistics, self.settings.outlier_factor
        excluded = np.zeros(len(ids), dtype=bool)
        for position, token in enumerate(ids.tolist()):
            norms_in, norms_out = np.linalg.norm(x[position], axis=1), np.linalg.norm(y[position], axis=1)
            excluded[position] = (
                position == 0
                or token in self.settings.special_token_ids
                or (norms_in > factor * means.input_norm_mean_L.numpy()).any()
                or (norms_out > factor * means.output_norm_mean_L.numpy()).any()
            )
        return excluded

    def excluded_fraction(self) -> float:
        return float(np.mean(np.concatenate([piece["excluded"] for piece in self.pieces])))

    def first_fraction(self) -> float:
        return len(self.pieces) / sum(len(piece["excluded"]) for piece in self.pieces)

    def stack(self, name: str) -> Any:
        return np.concatenate([piece[name][~piece["excluded"]] for piece in self.pieces])

    def rows(self) -> Any:
        return self.stack("out")

    def features(self, layer: int, x_RD: Any) -> Any:
        """Dense (R, F), by pre > threshold."""
        model = self.model
        source = model.source_layers[layer]
        scaled = (x_RD - model.input_shift_LD[layer].numpy()) * model.input_scale_LD[layer].numpy()
        pre = scaled @ source.W_enc.detach().double().numpy().T + source.b_enc.detach().numpy()
        theta = {
            "relu": np.zeros(pre.shape[1]),
            "jumprelu": source.log_threshold.detach().exp().numpy() if source.log_threshold is not None else 0,
        }.get(model.spec.kind, model.threshold_LF[layer].numpy())
        return pre * (pre > theta)

    def output(self, layer: int, features: list[Any]) -> Any:
        """(R, D) raw reconstruction of a layer from the dense features of the layers up to it."""
        model = self.model
        y = model.source_layers[layer].b_dec.detach().double().numpy()
        for source in range(layer + 1):
            y = y + features[source] @ model.source_layers[source].W_dec.detach().double().numpy()[:, layer - source]
        return y / model.target_scale_LD[layer].numpy() + model.target_shift_LD[layer].numpy()

    def all_features(self) -> list[Any]:
        x = self.stack("in")
        return [self.features(layer, x[:, layer]) for layer in range(x.shape[1])]

    def fvu_per_layer(self) -> list[float]:
        y, features = self.rows(), self.all_features()
        return [
            float(((y[:, t] - self.output(t, features)) ** 2).sum() / ((y[:, t] - y[:, t].mean(0)) ** 2).sum())
            for t in range(y.shape[1])
        ]

    def l0_per_layer(self) -> list[float]:
        return [float((a > 0).sum(1).mean()) for a in self.all_features()]

    def silent_fraction(self) -> float:
        return float(np.mean([(a > 0).sum(0) == 0 for a in self.all_features()]))

    def replacement(self, *, keep_first_only: bool) -> dict[str, float]:
        scores: dict[str, list[float]] = {
            name: [] for name in ("subject", "replaced", "ablated", "kl", "agree", "unsure")
        }
        for piece in self.pieces:
            ids = piece["ids"]
            kept = np.arange(ids.shape[1]) == 0 if keep_first_only else piece["excluded"]
            own, replaced, ablated = (self._log_probabilities(ids, kept, how) for how in ("own", "replaced", "ablated"))
            for position in np.flatnonzero(~kept)[np.flatnonzero(~kept) < ids.shape[1] - 1]:
                target = int(ids[0, position + 1])
                p, q = own[position], replaced[position]
                scores["subject"].append(-p[target])
                scores["replaced"].append(-q[target])
                scores["ablated"].append(-ablated[position][target])
                scores["kl"].append(float((np.exp(p) * (p - q)).sum()))
                scores["agree"].append(float(p.argmax() == q.argmax()))
                if p.argmax() == target and np.exp(p[target]) < 0.8:
                    scores["unsure"].append(scores["agree"][-1])
        mean = {name: float(np.mean(values)) for name, values in scores.items() if values}
        return {
            "ce_subject": mean["subject"],
            "ce_replaced": mean["replaced"],
            "ce_ablated": mean["ablated"],
            "ce_recovered": (mean["ablated"] - mean["replaced"]) / (mean["ablated"] - mean["subject"]),
            "kl": mean["kl"],
            "top1_agreement": mean["agree"],
            "top1_agreement_uncertain": mean["unsure"],
        }

    def _log_probabilities(self, ids: Tensor, kept: Any, how: str) -> Any:
        """(C, V) float64, with the MLPs' modules hooked by hand (a Llama's: resid_mid is its norm's input)."""
        handles, read, features = [], {}, []

        def pre(module: Any, args: Any) -> None:
            read["x"] = args[0][0].double().numpy()

        def post(layer: int) -> Any:
            def replace(module: Any, args: Any, output: Tensor) -> Tensor | None:
                new = output[0].double().numpy().copy()
                if how == "ablated":
                    new[~kept] = self.settings.statistics.out_mean_LD[layer].numpy()
                else:
                    features.append(self.features(layer, read["x"]))
                    new[~kept] = self.output_of(layer, features, kept)
                return torch.from_numpy(new)[None].to(output)

            return replace

        if how != "own":
            for index, layer in enumerate(self.settings.layers):
                block = self.subject.model.model.layers[layer]  # type: ignore[union-attr, index]
                handles.append(block.post_attention_layernorm.register_forward_pre_hook(pre))
                handles.append(block.mlp.register_forward_hook(post(index)))
        try:
            logits = forward_logits(self.subject, ids, torch.arange(ids.shape[1])[None])[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits.double().log_softmax(1).numpy()

    def output_of(self, layer: int, features: list[Any], kept: Any) -> Any:
        return self.output(layer, features)[~kept]
