"""How a step's time grows: against F at fixed K, and against K at fixed F, beside the dense step.

    python -m benchmarks.scaling --write benchmarks/results/scaling.md --plot docs/images/step_scaling.png

A table and a plot. Every point is the median of rounds in which all modes take turns on one batch (benchmarks.step says
how a step is made). The dense step's time falls on a line through zero in F; the sparse one's is that of the encoder's
product and Adam, plus what grows with K.
"""

import argparse
import gc
from pathlib import Path
from statistics import median

import torch

from activation_store.device import resolve_device
from benchmarks.measure import command, machine, median_ratio, table, take_turns, write_page
from benchmarks.steps import Mode, Shape, build_step, modes_for, random_batch
from trainer.memory import freed_memory_kept

Seconds = dict[str, list[float]]
SHAPE = Shape(6, 256, 4096, 1024, 16)
FEATURES = (1024, 2048, 4096, 8192, 16384)
KS = (4, 8, 16, 32, 64, 128)
INK, MUTED, GRID = "#1f2430", "#5b6472", "#d9dde3"
COLOURS = ("#2f6fdb", "#d9722e", "#2e9e6b", "#8a5bd0", "#c2415d", "#6b7280", "#0f8b8d")


def measure(shapes: list[Shape], modes: list[Mode], rounds: int, device: torch.device) -> list[Seconds]:
    """Seconds of every mode at every shape."""
    found = []
    for shape in shapes:
        batch = random_batch(shape, device)
        with freed_memory_kept(device):
            steps = {mode.name: build_step(mode, shape, batch) for mode in modes}
            found.append(take_turns(steps, rounds, device))
            del steps
            gc.collect()
        print(f"{shape}: " + ", ".join(f"{name} {median(s) * 1e3:.0f} ms" for name, s in found[-1].items()), flush=True)
    return found


def points_table(name: str, values: list[int], points: list[Seconds]) -> str:
    """One row for each value of F or K: milliseconds, and times faster than dense."""
    modes = list(points[0])
    rows = [
        [f"{value:,}", *(f"{median(point[mode]) * 1e3:.0f}" for mode in modes)]
        + [f"{median_ratio(point['dense'], point[mode]):.1f}" for mode in modes if mode != "dense"]
        for value, point in zip(values, points, strict=True)
    ]
    faster = [f"dense / {mode}" for mode in modes if mode != "dense"]
    return table([name, *(f"{mode}, ms" for mode in modes), *faster], rows)


def plot(curves: dict[str, tuple[list[int], list[Seconds]]], titles: dict[str, str], path: Path) -> None:
    """Both curves, side by side, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (name, (values, points)) in zip(axes, curves.items(), strict=True):
        for mode, colour in zip(points[0], COLOURS, strict=False):
            times = [median(point[mode]) * 1e3 for point in points]
            axis.plot(values, times, marker="o", markersize=4, linewidth=1.6, color=colour, label=mode)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(values, [f"{value:,}" for value in values])
        axis.set_xlabel(name, color=MUTED)
        axis.set_title(titles[name], fontsize=10, color=INK, loc="left")
        axis.grid(color=GRID, linewidth=0.6)
        axis.tick_params(which="both", colors=MUTED)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}" if f"{value:e}"[0] in "25" else "")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("whole training step, ms", color=MUTED)
    axes[0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Measures both curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=SHAPE.words, help="L,d,F,B,K that the curves pass through")
    parser.add_argument("--features", nargs="*", type=int, default=list(FEATURES))
    parser.add_argument("--ks", nargs="*", type=int, default=list(KS))
    parser.add_argument("--modes", nargs="*", help="default: dense and all that run here in fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", metavar="FILE", help="also write the markdown there")
    parser.add_argument("--plot", metavar="FILE", help="a PNG")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, base = resolve_device(options.device), Shape.parse(options.shape)
    modes = [mode for mode in modes_for(device) if not mode.bf16]
    if options.modes:
        modes = [mode for mode in modes if mode.name in {"dense", *options.modes}]
    by_features = measure([base._replace(n_features=f) for f in options.features], modes, options.rounds, device)
    by_k = measure([base._replace(k=k) for k in options.ks], modes, options.rounds, device)
    fixed = f"L = {base.n_layers}, d = {base.d_model}, B = {base.n_tokens}"
    titles = {"F": f"K = {base.k}; {fixed}", "K": f"F = {base.n_features:,}; {fixed}"}
    sections = [
        "# Time of a step against F and K",
        f"    {command('benchmarks.scaling')}",
        f"TopK, fp32. Medians of {options.rounds} rounds. Conditions: {machine(device)}. Rows: random.",
        f"Features a layer, {titles['F']}:",
        points_table("F", options.features, by_features),
        f"Active features per token and layer, {titles['K']}:",
        points_table("K", options.ks, by_k),
    ]
    print("\n" + "\n\n".join(sections), flush=True)
    if options.write:
        write_page(options.write, "\n\n".join(sections))
    if options.plot:
        curves = {"F": (options.features, by_features), "K": (options.ks, by_k)}
        plot(curves, titles, Path(options.plot))


if __name__ == "__main__":
    main()
