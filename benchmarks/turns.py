"""Times of modes against the dense step of their precision: in turns where they fit the memory together, else apart."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple, TypeVar

import torch

from activation_store.batch import ActivationBatch
from benchmarks.measure import Step, check_losses, median_ratio, table, take_turns, total_mib
from benchmarks.steps import MODES, Mode, Shape, build_step
from trainer.memory import freed_memory_kept

# bf16 rounds pre-activations, and with them which entries are selected.
TOLERANCE, TOLERANCE_BF16 = 1e-4, 2e-2
T = TypeVar("T")


class Times(NamedTuple):
    """Seconds of a mode and of the dense step beside it; empty where the card has not the memory."""

    mode: list[float]
    dense: list[float]


def modes_table(
    dense: Mode, sparse: list[Mode], shape: Shape, batch: ActivationBatch, pairs: int, peaks: dict[str, float | None]
) -> str:
    """Each mode against the dense step of its precision: in turns, or apart where both do not fit the card."""
    times = fitting(lambda: _in_turns(dense, sparse, shape, batch, pairs))
    together = times is not None
    times = times if times is not None else _apart(dense, sparse, shape, batch, pairs)
    dense_s = times[dense.name].dense
    rows = []
    for mode in sparse:
        found = times[mode.name]
        if not found.mode:
            ratio = "-"
        elif together:
            ratio = f"{median_ratio(found.dense, found.mode):.2f}"
        else:
            ratio = f"{median(dense_s) / median(found.mode):.2f}, apart" if dense_s else "-"
        rows.append([mode.name, milliseconds(found.mode), ratio, *_memory(peaks, mode.name, shape)])
    rows.append([dense.name, milliseconds(dense_s), "1" if dense_s else "-", *_memory(peaks, dense.name, shape)])
    header = ["mode", "ms", "times faster than dense", "peak MiB", "over parameters + Adam"]
    found_table = table(header if peaks else header[:3], rows)
    said = "`apart`: measured one after the other, for both do not fit the card together."
    return found_table if together else f"{found_table}\n\n{said}"


def fitting(measure: Callable[[], T]) -> T | None:
    """What it gives, or None where the card has not the memory; what it held is free then."""
    # Out of the handler, for the error holds the frames that hold the tensors.
    with contextlib.suppress(torch.OutOfMemoryError):
        return measure()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _in_turns(
    dense_mode: Mode, modes: list[Mode], shape: Shape, batch: ActivationBatch, pairs: int
) -> dict[str, Times]:
    """Of the modes, and all turns of the dense step under its name."""
    times, dense_s = {}, []
    dense = build_step(dense_mode, shape, batch)
    dense()
    for group in _groups(modes, shape, batch.mlp_in.device):
        tolerance = TOLERANCE_BF16 if dense_mode.bf16 else TOLERANCE
        seconds = beside(dense_mode.name, dense, group, shape, batch, pairs, tolerance)
        dense_s += seconds[dense_mode.name]
        times |= {mode.name: Times(seconds[mode.name], seconds[dense_mode.name]) for mode in group}
    del dense
    gc.collect()
    return times | {dense_mode.name: Times([], dense_s)}


def _apart(dense_mode: Mode, modes: list[Mode], shape: Shape, batch: ActivationBatch, pairs: int) -> dict[str, Times]:
    """The same, one step at a time; its first losses are compared. Nothing for a step that does not fit."""
    seconds: dict[str, list[float]] = {}
    losses: dict[str, float] = {}
    for mode in (dense_mode, *modes):

        def alone(mode: Mode = mode) -> list[float]:
            step = build_step(mode, shape, batch)
            losses[mode.name] = step()
            return take_turns({mode.name: step}, pairs, batch.mlp_in.device, warm=0)[mode.name]

        seconds[mode.name] = fitting(alone) or []
        gc.collect()
    check_losses(losses, TOLERANCE_BF16 if dense_mode.bf16 else TOLERANCE)
    dense_s = seconds.pop(dense_mode.name)
    return {name: Times(found, dense_s) for name, found in seconds.items()} | {dense_mode.name: Times([], dense_s)}


def dense_modes(sparse: list[Mode]) -> list[Mode]:
    """The dense steps of the precisions that are there; bf16 first, whose figures matter most on a GPU."""
    return [MODES[name] for name in ("dense bf16", "dense") if any(MODES[name].bf16 == mode.bf16 for mode in sparse)]


def _groups(modes: list[Mode], shape: Shape, device: torch.device) -> Iterator[list[Mode]]:
    """As many modes at a time as fit the memory beside the dense step, at least one."""
    # Each takes its parameters, moments and gradients: 16 bytes a parameter, and buffers.
    size = max(1, int(0.75 * total_mib(device) / (1.4 * shape.state_mib)) - 1)
    for start in range(0, len(modes), size):
        yield modes[start : start + size]


def beside(
    base_name: str,
    base: Step,
    modes: list[Mode],
    shape: Shape,
    batch: ActivationBatch,
    rounds: int,
    tolerance: float | None,
) -> dict[str, list[float]]:
    """Seconds of a step that exists and is warm, and of those of modes, which are built, measured and dropped."""
    device = batch.mlp_in.device
    with freed_memory_kept(device):
        steps = {mode.name: build_step(mode, shape, batch) for mode in modes}
        for step in steps.values():
            step()
        seconds = take_turns({base_name: base} | steps, rounds, device, warm=0, tolerance=tolerance)
        del steps, step
        gc.collect()
    return seconds


def milliseconds(seconds: list[float]) -> str:
    """The median for a table; what was not measured did not fit."""
    if not seconds:
        return "left out: out of memory"
    return f"{median(seconds) * 1e3:.0f}" if median(seconds) >= 0.1 else f"{median(seconds) * 1e3:.1f}"


def _memory(peaks: dict[str, float | None], name: str, shape: Shape) -> list[str]:
    if name not in peaks:
        return []
    peak = peaks[name]
    return ["-", "-"] if peak is None else [f"{peak:.0f}", f"{peak / shape.state_mib:.2f}"]
