"""What a GPU does during one training step: the time of every kernel, and how long it stands still.

    python -m benchmarks.kernel_times --modes "triton bf16" "triton bf16 fused"
    python -m benchmarks.kernel_times --shape 12,768,8192,4096,32 --write FILE

By torch's profiler, which slows the host down: where the GPU waits for the host it waits longer than without, so that
`idle` is an upper bound. Kernels' own times stay what they are. Needs a CUDA device.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from activation_store.device import resolve_device
from benchmarks.measure import Page, Step, command, machine, table
from benchmarks.step import CUDA_SHAPES
from benchmarks.steps import MODES, Shape, build_step, modes_for, random_batch

_ON_THE_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# Rows of the table; the rest is one row.
_SHOWN, _NAME = 16, 72


class Profile(NamedTuple):
    """Microseconds: of each kernel by name, with its calls, most first; from the first to the last; within, idle."""

    kernels: dict[str, tuple[float, int]]
    span: float
    idle: float


def read_trace(trace: dict[str, object]) -> Profile:
    """Of a trace in Chrome's format, of one step."""
    events: list[dict[str, object]] = trace["traceEvents"]  # type: ignore[assignment]
    found = [event for event in events if event.get("ph") == "X" and event.get("cat") in _ON_THE_DEVICE]
    spans = sorted((float(event["ts"]), float(event["dur"]), str(event["name"])) for event in found)  # type: ignore[arg-type]
    if not spans:
        raise SystemExit("the profiler saw no kernel; is the device a CUDA device?")
    by_name: dict[str, list[float]] = defaultdict(list)
    idle, end = 0.0, spans[0][0]
    for start, duration, name in spans:
        by_name[name].append(duration)
        idle += max(0.0, start - end)
        end = max(end, start + duration)
    ordered = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    return Profile({name: (sum(each), len(each)) for name, each in ordered}, end - spans[0][0], idle)


def profile_step(step: Step) -> Profile:
    """Of the third step: the first compile and fill caches."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return read_trace(json.loads(file.read_text()))


def profile_table(found: Profile) -> str:
    """The kernels that take longest, and the rest."""
    kernels = list(found.kernels.items())
    rows = [[f"`{name[:_NAME]}`", f"{us / 1e3:.2f}", str(calls)] for name, (us, calls) in kernels[:_SHOWN]]
    rest = [value for _, value in kernels[_SHOWN:]]
    rows.append(["all others", f"{sum(us for us, _ in rest) / 1e3:.2f}", str(sum(calls for _, calls in rest))])
    busy = sum(us for us, _ in found.kernels.values())
    busy_ms, span_ms, idle_ms = (us / 1e3 for us in (busy, found.span, found.idle))
    said = f"Kernels {busy_ms:.1f} ms; from the first to the last {span_ms:.1f}, of them idle {idle_ms:.1f}."
    return f"{said}\n\n{table(['kernel', 'ms', 'calls'], rows)}"


def main() -> None:
    """Prints a section for each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="L,d,F,B,K; default: GPT-2's")
    parser.add_argument("--modes", nargs="*", choices=list(MODES), default=["triton bf16", "triton bf16 fused"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--write", metavar="FILE", help="also write the markdown there")
    options = parser.parse_args()
    device = resolve_device(options.device)
    if device.type != "cuda":
        raise SystemExit(f"device={device}: it wants a CUDA device; benchmarks.step --parts breakdown runs anywhere")
    shape = Shape.parse(options.shape) if options.shape else next(iter(CUDA_SHAPES))
    batch = random_batch(shape, device)
    title = (
        "# Kernels of a step",
        f"    {command('benchmarks.kernel_times')}",
        f"Conditions: {machine(device)}. {shape}.",
    )
    page = Page(options.write, *title)
    known = {mode.name for mode in modes_for(device)}
    for name in options.modes:
        if name not in known:
            raise SystemExit(f"--modes {name}: it does not run on {device}; use one of {', '.join(sorted(known))}")
        page.add(f"## `{name}`\n\n{profile_table(profile_step(build_step(MODES[name], shape, batch)))}")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
