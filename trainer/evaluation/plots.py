"""Plots of an evaluation as PNG: FVU and L0 by layer, density histogram, replacement, and all of it in summary.png."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from activation_store.atomic import write_bytes
from trainer.evaluation.table import number, percent

_INK, _MUTED, _GRID = "#22262b", "#6b7480", "#e3e6ea"
_BLUE, _TEAL, _ORANGE, _GREY = "#2f5d9b", "#2a9d8f", "#d9803b", "#aab2bd"

Draw = Callable[[Any, Mapping[str, Any], int], None]


def save_plots(evaluation: Mapping[str, Any], folder: Path, *, first_layer: int = 0, title: str = "") -> list[Path]:
    """Writes fvu.png, l0.png, density.png, replacement.png (when measured) and summary.png; returns their paths.

    `evaluation` is the content of evaluation.json, `first_layer` the subject's layer that its lists begin with.
    """
    paths = []
    for name, draw in _PANELS.items():
        if name == "replacement" and evaluation["replacement"] is None:
            (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier evaluation
            continue
        figure = _figure(6.4, 4.0)
        draw(figure.add_subplot(), evaluation, first_layer)
        figure.tight_layout()
        paths.append(_save(figure, folder / f"{name}.png"))
    paths.append(_save(_summary(evaluation, first_layer, title), folder / "summary.png"))
    return paths


def _summary(evaluation: Mapping[str, Any], first_layer: int, title: str) -> Figure:
    figure = _figure(12.0, 7.0)
    figure.text(0.035, 0.945, title or "Transcoder on held-out text", fontsize=17, weight="bold", color=_INK)
    figure.text(0.035, 0.9, _subtitle(evaluation), fontsize=11.5, color=_MUTED)
    grid = figure.add_gridspec(
        2, 2, left=0.065, right=0.975, bottom=0.085, top=0.825, hspace=0.5, wspace=0.22, width_ratios=(1.15, 1)
    )
    for place, name in zip(((0, 0), (1, 0), (0, 1), (1, 1)), ("fvu", "l0", "replacement", "density"), strict=True):
        axes = figure.add_subplot(grid[place])
        if name == "replacement" and evaluation["replacement"] is None:
            axes.axis("off")
            axes.text(0.5, 0.5, "replacement model not measured", ha="center", color=_MUTED)
        else:
            _PANELS[name](axes, evaluation, first_layer)
    return figure


def _subtitle(evaluation: Mapping[str, Any]) -> str:
    parts = [
        f"FVU {number(evaluation['fvu'], 3)}",
        f"L0 {number(evaluation['l0'], 0)}",
        f"{evaluation['n_features_total']:,} features, {percent(evaluation['dead_fraction'])} dead",
        f"{evaluation['documents']} held-out documents, {evaluation['tokens']:,} tokens",
        f"{evaluation['activation']}, threshold {evaluation['threshold_rule']}",
    ]
    return "  ·  ".join(parts)


def _draw_fvu(axes: Any, evaluation: Mapping[str, Any], first_layer: int) -> None:
    _layer_bars(axes, evaluation, "fvu", first_layer, _BLUE)
    _decorate(axes, f"Variance unexplained (FVU) by layer: mean {number(evaluation['fvu'], 3)}", "layer", "FVU")
    if evaluation["fvu"] is not None:
        axes.axhline(evaluation["fvu"], color=_INK, linewidth=1, linestyle=(0, (4, 3)))


def _draw_l0(axes: Any, evaluation: Mapping[str, Any], first_layer: int) -> None:
    _layer_bars(axes, evaluation, "l0", first_layer, _TEAL)
    _decorate(axes, f"Active features (L0) by layer: {number(evaluation['l0'], 0)} per token", "layer", "L0")


def _layer_bars(axes: Any, evaluation: Mapping[str, Any], name: str, first_layer: int, color: str) -> None:
    values = [0.0 if value is None else value for value in evaluation[f"{name}_per_layer"]]
    errors = [0.0 if value is None else value for value in evaluation[f"{name}_per_layer_se"]]
    layers = range(first_layer, first_layer + len(values))
    axes.bar(layers, values, width=0.78, color=color, yerr=errors, error_kw={"ecolor": _INK, "elinewidth": 0.9})
    axes.set_xlim(first_layer - 0.7, first_layer + len(values) - 0.3)
    axes.set_ylim(0, 1.12 * max(high + error for high, error in zip(values, errors, strict=True)) or 1.0)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_density(axes: Any, evaluation: Mapping[str, Any], first_layer: int) -> None:
    del first_layer  # a histogram over all layers
    edges, counts = evaluation["density_histogram"]["log10_edges"], evaluation["density_histogram"]["counts"]
    axes.bar(edges[:-1], counts, width=edges[1] - edges[0], align="edge", color=_BLUE, edgecolor="white", linewidth=0.6)
    _decorate(axes, "How often features are active", "share of tokens on which a feature is active", "features")
    ticks = list(range(int(edges[0]), 1))
    axes.set_xticks(ticks, [f"$10^{{{tick}}}$" if tick else "1" for tick in ticks])
    axes.set_ylim(0, 1.25 * max(counts) or 1.0)
    silent = f"silent on these tokens: {percent(evaluation['silent_fraction'])}"
    axes.text(0.985, 0.93, silent, transform=axes.transAxes, ha="right", va="top", fontsize=9.5, color=_MUTED)


def _draw_replacement(axes: Any, evaluation: Mapping[str, Any], first_layer: int) -> None:
    del first_layer  # one figure for the whole model
    block = evaluation["replacement"]
    names = ("subject", "replaced", "ablated")
    keys = ("ce_subject", "ce_replaced", "ce_ablated")
    values = [block[key] or 0.0 for key in keys]
    errors = [block[f"{key}_se"] or 0.0 for key in keys]
    axes.barh(names, values, xerr=errors, height=0.62, color=(_GREY, _BLUE, _ORANGE), error_kw={"ecolor": _INK})
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * max(values))
    for row, (value, error) in enumerate(zip(values, errors, strict=True)):
        axes.annotate(
            number(value, 2), (value + error, row), xytext=(5, 0), textcoords="offset points", va="center",
            fontsize=10.5, color=_INK, weight="bold" if row == 1 else "normal",
        )  # fmt: skip
    agreement = (
        f"nats · KL {number(block['kl'], 3)} · same next token {percent(block['top1_agreement'])}"
        f" ({percent(block['top1_agreement_uncertain'])} where unsure)"
    )
    title = f"MLPs replaced: {percent(block['ce_recovered'])} of CE recovered"
    _decorate(axes, title, agreement, "")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color=_GRID)


def _decorate(axes: Any, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, weight="bold", color=_INK, pad=9)
    axes.set_xlabel(xlabel, fontsize=10, color=_MUTED)
    axes.set_ylabel(ylabel, fontsize=10, color=_MUTED)
    axes.tick_params(colors=_INK, labelsize=9.5, length=0)
    axes.grid(visible=True, axis="y", color=_GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)


_PANELS: dict[str, Draw] = {
    "fvu": _draw_fvu,
    "l0": _draw_l0,
    "density": _draw_density,
    "replacement": _draw_replacement,
}


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
    return path
