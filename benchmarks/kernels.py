"""Every op of every backend that runs here, on one source layer: time, agreement with the reference, and the floor.

    python -m benchmarks.kernels                                  needs only torch, numpy, and triton on CUDA
    python -m benchmarks.kernels --shape 1024,256,4096,1536,16 --ops encode_topk sparse_decode
    python -m benchmarks.kernels --write benchmarks/results/kernels.md

Random inputs; entries are the TopK selection. Times: medians, on CUDA by events. Agreement: largest difference over the
largest value, or the share of entries that both select. Floor: torch.mm of the same product into a kept buffer for the
ops that encode; for the others the bytes that must be read and written, at the best rate of a copy, an update in place
and a read. `rate` counts the product's operations, or the gathered rows alone (every time they are gathered, in the
dtype that they are stored in).

Legend: B tokens, D d_model, F features, C columns of a decoder row, K active features per token, N entries.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from activation_store.device import resolve_device
from benchmarks.layer_ops import OPS, Inputs, LayerShape, make_inputs, positions
from benchmarks.measure import Page, command, machine, product_seconds, stream_rate, table, typical_seconds
from benchmarks.steps import runs
from trainer.kernels.dispatch import BACKENDS, REFERENCE, Kernels, kernels
from trainer.kernels.encode_topk import Selection
from trainer.reproducibility import deterministic

# Name -> dtypes of the parameters and of the products.
PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.float32, torch.bfloat16),
    "bf16 parameters": (torch.bfloat16, torch.bfloat16),
}
# The first layer of the six of the issue's first shape; GPT-2's, where the card has the memory.
CPU_SHAPE = LayerShape(1024, 256, 4096, 6 * 256, 16)
CUDA_SHAPES = (LayerShape(16384, 768, 32768, 12 * 768, 32), LayerShape(16384, 768, 32768, 768, 32))


def agreement(name: str, ours: list[Tensor], theirs: list[Tensor], inputs: Inputs) -> str:
    """How far the results are from the reference's, in words for the table."""
    if name in {"encode_topk", "encode_jumprelu"}:
        ours, theirs = (positions(Selection(*found), inputs) for found in (ours, theirs))
    if not ours[0].is_floating_point() and not (
        ours[0].shape == theirs[0].shape and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    ):
        if not name.startswith("encode"):
            return "DIFFERENT"
        shared = float(torch.isin(theirs[0], ours[0]).float().mean())
        if ours[0].numel() != theirs[0].numel() or shared < 1:
            return f"{100 * shared:.4f}% of entries"
        ours, theirs = ours[1:], theirs[1:]
    worst = max(
        (float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30))) if a.numel() else 0.0
        for a, b in zip(ours, theirs, strict=True)
    )
    return "exact" if worst == 0 else f"{worst:.0e}"


def measure(name: str, backend: Kernels, inputs: Inputs, rate: float, product_s: float) -> list[str]:
    """One row of the table."""
    op, shape = OPS[name], inputs.shape
    theirs = op.call(REFERENCE, inputs, op.scratch(inputs))
    scratch = op.scratch(inputs)
    try:
        ours = op.call(backend, inputs, scratch)
    except (ValueError, NotImplementedError) as error:
        return [name, backend.name, f"refused: {error}", *["-"] * 4]
    words = agreement(name, ours, theirs, inputs) if backend.name != "reference" else "-"
    del ours, theirs
    seconds = typical_seconds(lambda: op.call(backend, inputs, scratch), inputs.x_BD.device)
    gathered = op.gathered(inputs)
    floor = product_s if op.encodes else (gathered + op.streamed(inputs)) / rate
    done = "-"
    if op.encodes:
        done = f"{2 * shape.n_tokens * shape.d_model * shape.n_features / seconds / 1e12:.3g} TFLOP/s"
    elif gathered:
        done = f"{gathered / seconds / 1e9:.3g} GB/s"
    return [
        name,
        backend.name,
        f"{seconds * 1e3:.3g}",
        f"{floor * 1e3:.3g}",
        f"{100 * floor / seconds:.0f}%",
        done,
        words,
    ]


def section(shape: LayerShape, precision: str, device: torch.device, backends: list[str], ops: list[str]) -> str:
    """The table of one shape and precision."""
    parameters, compute = PRECISIONS[precision]
    inputs = make_inputs(shape, device, parameters, compute)
    rate = stream_rate(device)
    product_s = product_seconds(inputs.x_BD.to(compute), inputs.W_FD.to(compute))
    rows = [measure(op, kernels(backend, device), inputs, rate, product_s) for op in ops for backend in backends]
    flops = 2 * shape.n_tokens * shape.d_model * shape.n_features / product_s / 1e12
    lines = [
        f"## {shape}; {precision}",
        f"Memory streams {rate / 1e9:.0f} GB/s, read and written; torch.mm of the encoder's product runs at "
        f"{flops:.3g} TFLOP/s.",
        table(["op", "backend", "ms", "floor, ms", "floor / time", "rate", "against the reference"], rows),
    ]
    return "\n\n".join(lines)


def fits(shape: LayerShape, device: torch.device) -> bool:
    """Whether a comparison of this shape fits the card."""
    return device.type != "cuda" or shape.bytes_needed < torch.cuda.mem_get_info(device)[0]


def main() -> None:
    """Prints a table for each shape and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="B,D,F,C,K; default: the device's standard shapes")
    parser.add_argument("--ops", nargs="*", choices=list(OPS), default=list(OPS))
    parser.add_argument("--backends", nargs="*", choices=BACKENDS[1:], help="default: all that run here")
    parser.add_argument("--precisions", nargs="*", choices=list(PRECISIONS), help="default: fp32; on CUDA all")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", metavar="FILE", help="also write the markdown there")
    options: Any = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    backends = options.backends or [name for name in BACKENDS[1:] if runs(name, device)]
    precisions = options.precisions or (list(PRECISIONS) if device.type == "cuda" else ["fp32"])
    standard = CUDA_SHAPES if device.type == "cuda" else (CPU_SHAPE,)
    shapes = [LayerShape(*map(int, options.shape.split(",")))] if options.shape else standard
    title = ("# Kernels, op by op", f"    {command('benchmarks.kernels')}", f"Conditions: {machine(device)}.")
    page = Page(options.write, *title)
    for shape in shapes:
        if not fits(shape, device):
            page.add(f"{shape}: left out, it wants {shape.bytes_needed / 2**30:.0f} GiB.")
            continue
        for precision in precisions:
            with deterministic(device):
                page.add(section(shape, precision, device, backends, options.ops))


if __name__ == "__main__":
    main()
