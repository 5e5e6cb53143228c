"""An evaluation as a short table for the terminal, within 80 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

LAYERS_PER_LINE = 10


def format_table(evaluation: Mapping[str, Any], *, first_layer: int = 0) -> str:
    """FVU and L0 by layer, dead share, and replacement quality beside the subject and beside ablated MLPs.

    `evaluation` is the content of evaluation.json; `first_layer` is the subject's layer that its lists begin with.
    """
    lines = [*_headline(evaluation), "", *_layers(evaluation, first_layer)]
    for title, key in (("replaced", "replacement"), ("replaced *", "replacement_all_positions")):
        block = evaluation[key]
        if block is None:
            continue
        if key == "replacement":
            lines += ["", _row("", "CE, nats", "recovered", "KL", "top-1", "top-1 <80%")]
            lines += [_row("subject", number(block["ce_subject"], 3), "100%", ".000", "100%", "100%")]
            lines += [_replaced_row(title, block)]
            lines += [_row("MLPs ablated", number(block["ce_ablated"], 3), "0%", "", "", "")]
        elif block != evaluation["replacement"]:
            lines += [_replaced_row(title, block), "* every position but 0, special tokens and outliers too"]
    return "\n".join(line.rstrip() for line in lines)


def _headline(evaluation: Mapping[str, Any]) -> list[str]:
    training = evaluation["training_rule"]
    excluded = percent(evaluation["excluded_fraction"])
    return [
        f"{evaluation['documents']} held-out documents, {evaluation['tokens']:,} tokens ({excluded} of rows excluded)",
        f"{evaluation['n_features_total']:,} features, {evaluation['activation']}, "
        f"threshold rule {evaluation['threshold_rule']}",
        "",
        f"FVU  {plus_minus(evaluation, 'fvu', 4)}   (training rule {number(training['fvu'], 4)})",
        f"L0   {plus_minus(evaluation, 'l0', 1)}   (training rule {number(training['l0'], 1)}), total per token",
        f"dead {percent(evaluation['dead_fraction'])} in training, "
        f"silent {percent(evaluation['silent_fraction'])} on these tokens",
    ]


def _layers(evaluation: Mapping[str, Any], first_layer: int) -> list[str]:
    fvus: Sequence[float | None] = evaluation["fvu_per_layer"]
    l0s: Sequence[float | None] = evaluation["l0_per_layer"]
    lines = []
    for start in range(0, len(fvus), LAYERS_PER_LINE):
        part = slice(start, start + LAYERS_PER_LINE)
        numbers = range(first_layer + start, first_layer + start + len(fvus[part]))
        lines += [
            "layer" + "".join(f"{layer:>7}" for layer in numbers),
            "FVU  " + "".join(f"{number(value, 3):>7}" for value in fvus[part]),
            "L0   " + "".join(f"{number(value, 1):>7}" for value in l0s[part]),
        ]
    return lines


def _replaced_row(title: str, block: Mapping[str, Any]) -> str:
    return _row(
        title,
        plus_minus(block, "ce_replaced", 3),
        percent(block["ce_recovered"]),
        number(block["kl"], 3),
        percent(block["top1_agreement"]),
        percent(block["top1_agreement_uncertain"]),
    )


def _row(*cells: str) -> str:
    return f"{cells[0]:<13}{cells[1]:>15}{cells[2]:>11}{cells[3]:>9}{cells[4]:>9}{cells[5]:>12}"


def number(value: float | None, digits: int) -> str:
    """`.312`, `16.0`, or `-` for null."""
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and text.lstrip("-").startswith("0.") else text


def percent(value: float | None) -> str:
    """`93.5%`, or `-` for null."""
    return "-" if value is None else f"{100 * value:.1f}%"


def plus_minus(block: Mapping[str, Any], name: str, digits: int) -> str:
    """A figure with its standard error, such as `3.883 +- .021`."""
    error = block[f"{name}_se"]
    suffix = "" if error is None else f" +- {number(error, digits)}"
    return number(block[name], digits) + suffix
