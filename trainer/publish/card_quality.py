"""The model card's section of measured quality, from evaluation.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import RunConfig
from trainer.evaluation.table import number, percent
from trainer.evaluation.table import plus_minus as ascii_plus_minus


def quality_section(config: RunConfig, evaluation: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The section "Quality": both rules, the replacement model, every layer, and links to `plots`."""
    lines = [
        "## Quality",
        "",
        f"Measured on {evaluation['documents']} held-out documents, {evaluation['tokens']:,} tokens"
        f" ({percent(evaluation['excluded_fraction'])} of positions are excluded: position 0, special tokens,"
        " outliers). Errors are standard errors over documents. The weights here follow the inference rule"
        f" ({_inference_rule(config)}); the training rule ({_training_rule(config)}) is given for comparison.",
        "",
        *_rules_table(evaluation),
        "",
        f"Dead in training: {percent(evaluation['dead_fraction'])} of features; silent on these tokens:"
        f" {percent(evaluation['silent_fraction'])}.",
        *_replacement(evaluation),
        "",
        *_layer_table(evaluation),
    ]
    if plots:
        lines += ["", "Plots: " + ", ".join(f"[{name}](plots/{name})" for name in plots) + "."]
    return "\n".join(lines)


def _inference_rule(config: RunConfig) -> str:
    if config.activation.kind == "relu":
        return "ReLU"
    if config.activation.kind == "jumprelu":
        return "JumpReLU, with the thresholds that were learned"
    scope = "feature" if config.activation.threshold_scope == "feature" else "layer"
    return f"JumpReLU, with a threshold for each {scope} that was calibrated on training rows"


def _training_rule(config: RunConfig) -> str:
    activation = config.activation
    if activation.kind in ("relu", "jumprelu"):
        return "the same"
    together = activation.scope == "all_layers"
    budget = (
        f"{activation.k} features a layer, chosen over all layers together"
        if together
        else f"{activation.k} features a layer"
    )
    score = ", by activation times decoder norm" if activation.score == "decoder_norm" else ""
    if activation.kind == "topk":
        return f"TopK: for every token the largest, {budget}{score}"
    return f"BatchTopK: over a batch the largest, on average {budget}{score}"


def _rules_table(evaluation: Mapping[str, Any]) -> list[str]:
    training = evaluation["training_rule"]
    cost = _difference(evaluation["fvu"], training["fvu"])
    return [
        "| | inference rule (published) | training rule | difference |",
        "|---|---|---|---|",
        f"| FVU (variance unexplained, mean over layers) | {_plus_minus(evaluation, 'fvu', 4)} |"
        f" {number(training['fvu'], 4)} | {cost} |",
        f"| L0 (active features per token, all layers) | {_plus_minus(evaluation, 'l0', 1)} |"
        f" {number(training['l0'], 1)} | {_difference(evaluation['l0'], training['l0'], 1)} |",
    ]


def _difference(ours: float | None, other: float | None, digits: int = 4) -> str:
    if ours is None or other is None:
        return "-"
    return (
        f"{ours - other:+.{digits}f}".replace("0.", ".", 1) if abs(ours - other) < 1 else f"{ours - other:+.{digits}f}"
    )


def _replacement(evaluation: Mapping[str, Any]) -> list[str]:
    block = evaluation.get("replacement")
    if block is None:
        return ["", "The replacement model was not measured."]
    lines = [
        "",
        "Replacement model (every MLP output replaced by the reconstruction, computed on the replaced stream;"
        " cross-entropy of the next token in nats; ablated: every MLP output replaced by its mean; top-1 agreement with"
        " the subject, and the same over tokens that the subject gets right with confidence below 80%):",
        "",
        "| | CE subject | CE replaced | CE ablated | CE recovered | KL | top-1 | top-1, unsure |",
        "|---|---|---|---|---|---|---|---|",
        _replacement_row("excluded positions keep the MLP", block),
    ]
    everywhere = evaluation.get("replacement_all_positions")
    if everywhere is not None and everywhere != block:
        lines.append(_replacement_row("only position 0 keeps it", everywhere))
    return lines


def _replacement_row(title: str, block: Mapping[str, Any]) -> str:
    cells = [number(block["ce_subject"], 3), _plus_minus(block, "ce_replaced", 3), number(block["ce_ablated"], 3)]
    cells += [percent(block["ce_recovered"]), number(block["kl"], 3)]
    cells += [percent(block["top1_agreement"]), percent(block["top1_agreement_uncertain"])]
    return "| " + " | ".join([title, *cells]) + " |"


def _layer_table(evaluation: Mapping[str, Any]) -> list[str]:
    fvus = evaluation["fvu_per_layer"]
    dead = evaluation["dead_fraction_per_layer"] or [None] * len(fvus)
    rows = zip(fvus, evaluation["l0_per_layer"], dead, strict=True)
    return [
        "| layer | FVU | L0 | dead |",
        "|---|---|---|---|",
        *(
            f"| {i} | {number(fvu, 4)} | {number(l0, 1)} | {percent(share)} |"
            for i, (fvu, l0, share) in enumerate(rows)
        ),
    ]


def _plus_minus(block: Mapping[str, Any], name: str, digits: int) -> str:
    return ascii_plus_minus(block, name, digits).replace("+-", "±")
