"""How decoders lie on the feature axis, decided once before step 1 from a table of measured steps
(`trainer.parallel.split_table`) or, where nothing was measured, from the bytes that either way would move.

Bytes that a rank sends for a token, forward and backward, with G ranks, L layers, E expected entries of a token over
all layers, V bytes a value and I bytes an id (docs/parallel.md derives them; `python -m benchmarks.traffic` counts
them). What a selection costs is the same either way.

    columns, sparse   (G - 1) (E (2 V + I) / G + L)     codes to all others, a gradient back for each
    columns, dense    3 (G - 1) L F V / G               activations, again in the backward pass, and gradients
    rows              2 (G - 1) L D V / G               the sum of y_hat
"""

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

from trainer.config import ActivationConfig, ActivationKind, DecoderSplit, ModelConfig, ParallelConfig
from trainer.model.break_even import MOST_SPARSE
from trainer.model.spec import ModelSpec
from trainer.parallel.split_table import Link, measured_steps

_VALUE_BYTES = 4


class SplitChoice(NamedTuple):
    """Whether decoders are split by columns (else by rows), and the line that says why."""

    by_columns: bool
    reason: str


def choose_split(
    parallel: ParallelConfig, model: ModelConfig, activation: ActivationConfig, spec: ModelSpec, link: Link
) -> SplitChoice:
    """The choice of `parallel.decoder_split`; where it is auto, that which is faster by the table for this link, else
    that which moves fewer bytes. Of the same arguments always the same, so that all ranks choose alike.
    """
    if parallel.decoder_split is not DecoderSplit.auto:
        return SplitChoice(parallel.decoder_split is DecoderSplit.columns, f"{parallel.decoder_split}, as asked for")
    if parallel.feature == 1:
        return SplitChoice(True, "columns: one rank holds them all")
    if spec.d_model % parallel.feature:
        return SplitChoice(
            False, f"rows: d_model={spec.d_model} is not divisible by parallel.feature={parallel.feature}"
        )
    entries, why = expected_entries(model, activation, spec)
    columns, rows = columns_bytes(spec, parallel.feature, entries), rows_bytes(spec, parallel.feature)
    steps = measured_steps(link)
    if steps is None:
        ratio, source = columns / rows, f"by the bytes alone, for nothing was measured on {link.device}"
    else:
        ratio = steps.time_ratio(columns / rows)
        source = f"where steps by columns took {ratio:.2f} of the time of rows ({steps.where})"
    by_columns = ratio <= 1
    return SplitChoice(
        by_columns,
        f"{'columns' if by_columns else 'rows'}: about {columns:,.0f} bytes a token and rank by columns, {rows:,.0f} "
        f"by rows, {source}, with {entries:,.0f} entries a token over all layers expected ({why})",
    )


def kept_split(choice: SplitChoice, parallel: ParallelConfig, written_by: Mapping[str, Any]) -> SplitChoice:
    """auto decides once: a run that goes on with as many ranks of the feature axis keeps the split of its checkpoint,
    and with it its bits. written_by: of the checkpoint's state.json.
    """
    split = written_by.get("decoder_split")
    asked = parallel.decoder_split is not DecoderSplit.auto
    if asked or parallel.feature == 1 or written_by.get("feature") != parallel.feature:
        return choice
    # Checkpoints of before have auto there.
    if split not in {DecoderSplit.columns, DecoderSplit.rows}:
        return choice
    return SplitChoice(split == DecoderSplit.columns, f"{split}, as before the checkpoint")


def expected_entries(model: ModelConfig, activation: ActivationConfig, spec: ModelSpec) -> tuple[float, str]:
    """Selected entries of a token over all layers, and where the number comes from."""
    everything = spec.n_layers * spec.n_features
    if spec.is_topk:
        return float(spec.k * spec.n_layers), "k a layer"
    if activation.kind is ActivationKind.jumprelu and activation.l0_lambda > 0:
        return activation.l0_target, "activation.l0_target"
    if activation.kind is ActivationKind.jumprelu:
        return _above_band(model, spec) * everything, "active or in the band, in a new encoder"
    if model.initial_density is not None:
        return model.initial_density * everything, "model.initial_density"
    return 0.5 * everything, "half of all, as a new encoder without initial_density has"


def _above_band(model: ModelConfig, spec: ModelSpec) -> float:
    """Share of pre-activations above theta - bandwidth / 2 in a new encoder, on inputs of unit mean square."""
    normal = NormalDist()
    deviation = spec.encoder_init_scale * math.sqrt(spec.d_model / (3 * spec.n_features))
    theta = spec.threshold_init / deviation
    if model.initial_density is not None:
        theta = normal.inv_cdf(1 - model.initial_density)
    return 1 - normal.cdf(theta - spec.bandwidth / (2 * deviation))


def columns_bytes(spec: ModelSpec, ranks: int, entries: float) -> float:
    """Sent for a token by a rank, decoders split by columns."""
    if entries > MOST_SPARSE * spec.n_layers * spec.n_features:
        return 3 * (ranks - 1) / ranks * spec.n_layers * spec.n_features * _VALUE_BYTES
    each = 2 * _VALUE_BYTES + id_bytes(spec.n_features // ranks)
    return (ranks - 1) * (entries * each / ranks + spec.n_layers)


def rows_bytes(spec: ModelSpec, ranks: int) -> float:
    """Sent for a token by a rank, decoders split by rows."""
    return 2 * (ranks - 1) / ranks * spec.n_layers * spec.d_model * _VALUE_BYTES


def id_bytes(n_features: int) -> int:
    """Of the id of one of a rank's features."""
    return 2 if n_features <= 2**16 else 4
