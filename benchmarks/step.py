"""Time and memory of a whole training step: the modes of the trainer against a tuned dense step.

    python -m benchmarks.step                                      the standard shapes: modes, memory, selections
    python -m benchmarks.step --shape 6,256,4096,1024,16 --breakdown
    python -m benchmarks.step --data runs/demo/store --shape 0,0,1024,1024,8     real rows (L and d are the store's)
    python -m benchmarks.step --write benchmarks/results/step.md
    python -m benchmarks.step --parts modes --modes "triton bf16" "triton bf16 fused"     the goal on a GPU, minutes

modes      `reference` and `cpu` (exact clip, then dense Adam), `cpu fused` (update in the backward pass, no clip); on
           CUDA `triton`, fp32 and bf16; each against the dense step of its precision (benchmarks.dense_step)
memory     peak of each mode in its own process, over that of parameters and Adam's states in fp32 (12 bytes each)
selection  BatchTopK and JumpReLU at the L0 of TopK, against the TopK step of the same backend
breakdown  where a step's time goes, each part next to its floor (benchmarks.breakdown)

Times are medians over rounds in which the steps take turns in one process; a ratio is the median of the rounds'
ratios. All start from the same parameters and see the same batch, and dense and sparse losses must agree. Steps that
do not fit the card together are measured one after the other, which the table says; what does not fit by itself is left
out. The page is written after every section. On a CPU, freed memory stays with the process, as in training
(trainer.memory). Random rows have no hot features, real ones have.
"""

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from activation_store.batch import ActivationBatch
from activation_store.device import resolve_device
from benchmarks.breakdown import breakdown_table
from benchmarks.measure import (
    Page,
    PeakMemory,
    command,
    machine,
    median_ratio,
    table,
)
from benchmarks.steps import (
    MODES,
    RECIPE_BANDWIDTH,
    Mode,
    Shape,
    band,
    band_share,
    build_step,
    modes_for,
    random_batch,
    store_batch,
)
from benchmarks.turns import beside, dense_modes, fitting, milliseconds, modes_table
from trainer.memory import freed_memory_kept

# The issue's shapes, with the rounds that fit into minutes on two cores; on CUDA GPT-2's.
CPU_SHAPES = {Shape(6, 256, 4096, 1024, 16): 9, Shape(12, 768, 8192, 512, 32): 3, Shape(30, 576, 1024, 1024, 8): 3}
CUDA_SHAPES = {Shape(12, 768, 32768, 16384, 32): 9}
# Warms caches, compilers and autotuners up before a process' memory counts.
WARM_SHAPE = Shape(2, 64, 256, 64, 4)
PARTS = ("modes", "memory", "selection", "breakdown")


def main() -> None:
    """Prints one section for each shape."""
    options = _parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    options.device = str(device)
    if options.peak_of:
        peak = measure_peak(MODES[options.peak_of], Shape.parse(options.shape), device, options.data)
        print(json.dumps({"peak_mib": peak}))
        return
    page = Page(
        options.write,
        "# Whole training step",
        f"    {command('benchmarks.step')}",
        f"Conditions: {machine(device)}. Rows: {'of a store' if options.data else 'random'}.",
    )
    for section in _sections(options, device):
        page.add(section)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="L,d,F,B,K; default: the standard shapes of the device")
    parser.add_argument("--pairs", type=int, default=0, help="rounds; 0: as many as fit the shape")
    parser.add_argument("--modes", nargs="*", choices=list(MODES), help="default: all that run here")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS[:3]))
    parser.add_argument("--breakdown", action="store_true", help="the breakdown too")
    parser.add_argument("--data", metavar="STORE", help="rows of this store instead of random ones")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--write", metavar="FILE", help="also write the markdown there")
    parser.add_argument("--peak-of", choices=list(MODES), help=argparse.SUPPRESS)
    return parser


def _sections(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    standard = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    shapes = [Shape.parse(options.shape)] if options.shape else list(standard)
    parts = {*options.parts, *(("breakdown",) if options.breakdown else ())}
    for asked in shapes:
        shape, batch = make_batch(asked, device, options.data)
        pairs = options.pairs or standard.get(shape, 5)
        sparse = [mode for mode in modes_for(device) if mode.backend != "dense"]
        sparse = [mode for mode in sparse if not options.modes or mode.name in options.modes]
        yield (
            f"## {shape}\n\nParameters and Adam's states: {shape.state_mib:.0f} MiB. "
            f"Medians of {pairs} rounds after one that does not count."
        )
        if "modes" in parts:
            for dense in dense_modes(sparse):
                alike = [mode for mode in sparse if mode.bf16 == dense.bf16]
                wanted = [*alike, dense] if "memory" in parts else []
                peaks = {mode.name: peak_mib(mode, shape, options) for mode in wanted}
                yield modes_table(dense, alike, shape, batch, pairs, peaks)
        if "selection" in parts and sparse:
            main_mode = _main_mode(sparse)
            found = fitting(partial(selection_table, main_mode, shape, batch, pairs))
            yield found if found is not None else f"Selections, mode `{main_mode.name}`: {milliseconds([])}."
        if "breakdown" in parts:
            for mode in sparse:
                with freed_memory_kept(device):
                    yield breakdown_table(mode, shape, batch, calls=pairs)


def make_batch(shape: Shape, device: torch.device, data: str | None) -> tuple[Shape, ActivationBatch]:
    """Random rows, or those of a store, whose L and d then replace the shape's."""
    return store_batch(data, shape, device) if data else (shape, random_batch(shape, device))


def _main_mode(sparse: list[Mode]) -> Mode:
    """What selections are compared on: the fastest backend's exact clip."""
    return [mode for mode in sparse if not mode.fused][-1] if any(not mode.fused for mode in sparse) else sparse[-1]


# --- selections ------------------------------------------------------------------------------------------------------


def selection_table(base: Mode, shape: Shape, batch: ActivationBatch, pairs: int) -> str:
    """BatchTopK and JumpReLU at the L0 of TopK."""
    found = band(shape, batch)
    narrow = replace(base, name="JumpReLU", kind="jumprelu", bandwidth=found.bandwidth)
    variants = [
        replace(base, name="BatchTopK per layer", kind="batchtopk"),
        replace(base, name="BatchTopK over all layers", kind="batchtopk", scope="all_layers"),
        narrow,
        # The gradient of the penalty's decoder norms has no place in a fused update.
        *([] if base.fused else [replace(narrow, name="JumpReLU, tanh penalty", tanh=True)]),
        replace(narrow, name="JumpReLU, the recipe's eps", bandwidth=RECIPE_BANDWIDTH),
    ]
    topk = build_step(base, shape, batch)
    topk()
    rows: list[list[str]] = []
    for mode in variants:
        wide = mode.kind == "jumprelu" and mode.bandwidth == RECIPE_BANDWIDTH
        # Without a goal, and dense: slow where the shape is large.
        rounds = max(1, pairs // 3) if wide else pairs
        seconds = fitting(partial(beside, "TopK", topk, [mode], shape, batch, rounds, None))
        if seconds is None:
            rows.append([mode.name, milliseconds([]), *["-"] * 4])
            continue
        eps = share = "-"
        if mode.kind == "jumprelu":
            eps = f"{mode.bandwidth:.3g}"
            share = f"{100 * band_share(shape, batch, found.thetas, mode.bandwidth):.2f}%"
        times = median_ratio(seconds[mode.name], seconds["TopK"])
        rows.append(
            [mode.name, milliseconds(seconds[mode.name]), milliseconds(seconds["TopK"]), f"{times:.2f}", eps, share]
        )
    del topk
    gc.collect()
    lines = [
        f"Selections at L0 = {shape.k} per layer, mode `{base.name}`. The band of the narrow JumpReLU holds on average "
        f"{found.further:.1f} entries per token and layer beside the {shape.k} active ones; `band` is the share of all "
        "pre-activations within eps / 2 of theta.",
        table(["selection", "ms", "TopK beside it, ms", "times TopK", "eps", "band"], rows),
    ]
    return "\n\n".join(lines)


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_mib(mode: Mode, shape: Shape, options: argparse.Namespace) -> float | None:
    """Peak of a process of its own; on CUDA of this one, whose allocator knows what is whose (None: out of memory)."""
    device = torch.device(options.device)
    if device.type == "cuda":
        return fitting(partial(measure_peak, mode, shape, device, options.data))
    words = [sys.executable, "-m", "benchmarks.step", "--peak-of", mode.name, "--shape", shape.words]
    words += ["--threads", str(torch.get_num_threads()), "--device", options.device]
    words += ["--data", options.data] if options.data else []
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout)["peak_mib"])


def measure_peak(mode: Mode, shape: Shape, device: torch.device, data: str | None) -> float:
    """What two steps, their batch and their model add to what is loaded, MiB."""
    with freed_memory_kept(device):
        build_step(mode, WARM_SHAPE, random_batch(WARM_SHAPE, device))()
        gc.collect()
    memory = PeakMemory(device)
    with freed_memory_kept(device):
        memory.start()
        shape, batch = make_batch(shape, device, data)
        step = build_step(mode, shape, batch)
        for _ in range(2):
            step()
        return memory.added_mib()


if __name__ == "__main__":
    main()
