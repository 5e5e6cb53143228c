"""From sums per document to the content of evaluation.json (docs/evaluate.md defines each key)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from activation_store.errors import AgreedError
from trainer.build import parameter_count
from trainer.evaluation.jackknife import Statistic, as_json, jackknife
from trainer.evaluation.measure import Measured
from trainer.evaluation.reconstruction import RuleSums, density_histogram, fvu, fvu_per_layer, l0, l0_per_layer, sums_of
from trainer.model.spec import ModelSpec

SCHEMA_VERSION = 1


def evaluation_json(
    measured: Measured,
    spec: ModelSpec,
    *,
    threshold_rule: str,
    dead_after_tokens: int | None,
) -> dict[str, Any]:
    """The figures with the keys and definitions of evaluation.json, and `x_se` beside each mean x.

    `dead_after_tokens` is the window of training's dead features; without one, the dead fractions are null. Raises
    UserError, on all ranks alike, if every row was excluded.
    """
    tokens = int(measured.targets.count_K.sum())
    if tokens == 0:
        raise AgreedError(
            "there is nothing to measure: every held-out row is the first token of a piece, a special token or an "
            "outlier; give more text (eval.documents, eval.contexts_per_document)"
        )
    firings_LF = measured.inference.firings_LF
    return {
        "schema_version": SCHEMA_VERSION,
        "tokens": tokens,
        "documents": len(measured.rows_K),
        **_with_se({"excluded_fraction": _excluded}, {"rows": measured.rows_K, "excluded": measured.excluded_K}),
        "n_features_total": spec.n_layers * spec.n_features,
        "parameters": parameter_count(spec),
        "activation": str(spec.kind),
        "threshold_rule": threshold_rule,
        **_reconstruction(measured, measured.inference, _INFERENCE),
        "training_rule": _reconstruction(measured, measured.training, _TRAINING),
        **_dead(measured.tokens_since_active_LF, dead_after_tokens),
        "silent_fraction": float((firings_LF == 0).double().mean()),
        "density_histogram": density_histogram(firings_LF, tokens),
        "replacement": None if measured.replacement is None else measured.replacement.report(),
        "replacement_all_positions": (
            None if measured.replacement_all_positions is None else measured.replacement_all_positions.report()
        ),
    }


_TRAINING: dict[str, Statistic] = {"fvu": fvu, "l0": l0}
_INFERENCE: dict[str, Statistic] = {
    "fvu": fvu,
    "fvu_per_layer": fvu_per_layer,
    "l0": l0,
    "l0_per_layer": l0_per_layer,
}


def _excluded(totals: Mapping[str, Tensor]) -> Tensor:
    return totals["excluded"] / totals["rows"]


def _reconstruction(measured: Measured, rule: RuleSums, statistics: Mapping[str, Statistic]) -> dict[str, Any]:
    return _with_se(statistics, sums_of(measured.targets, rule))


def _with_se(statistics: Mapping[str, Statistic], sums: Mapping[str, Tensor]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, statistic in statistics.items():
        estimate = jackknife(sums, statistic)
        figures[name] = as_json(estimate.value)
        figures[f"{name}_se"] = as_json(estimate.se)
    return figures


def _dead(tokens_since_active_LF: Tensor, dead_after_tokens: int | None) -> dict[str, Any]:
    if dead_after_tokens is None:
        return {"dead_fraction": None, "dead_fraction_per_layer": None}
    dead_LF = (tokens_since_active_LF >= dead_after_tokens).to(torch.float64)
    return {"dead_fraction": float(dead_LF.mean()), "dead_fraction_per_layer": dead_LF.mean(1).tolist()}
