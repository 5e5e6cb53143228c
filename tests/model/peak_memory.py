"""Peak memory of one training step by activation, measured in a process of its own: `python -m tests.model.peak_memory
BACKEND [DEVICE]` prints a JSON object, case -> bytes that the step held at most beyond what was there before it, and
bytes of the same step while a mask of all layers lies beside it.

On a CPU it is the process's resident set, whose peak Linux sets back on request, and whose large buffers go back to the
system at once (MALLOC_MMAP_THRESHOLD_, set by the test); on CUDA it is what the allocator counts.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.model.cases import all_losses, context, kill, make_model
from trainer.config import KernelsConfig
from trainer.kernels.dispatch import kernels
from trainer.loss import compute_loss
from trainer.model.break_even import MOST_SPARSE
from trainer.model.initialise import set_density

# B * L * F values are 64 MiB here, and 16 times what one layer's B * F are; parameters are 20 MiB, made before.
# k L is 1.2% of F, as it is for 12 layers of 32,768 features and k = 32.
SHAPE: dict[str, Any] = {"n_layers": 16, "d_model": 8, "n_features": 4096, "k": 3, "n_tokens": 256}
ALL_LAYERS_BYTES = 256 * 16 * 4096 * 4
# Case -> (spec, share above which a layer goes dense). relu and jumprelu at initialisation are half active.
# "relu sparse": the densest that is sparse by default, a tenth active in every layer.
CASES: dict[str, tuple[dict[str, Any], float | None]] = {
    "relu": ({"kind": "relu"}, None),
    "jumprelu": ({"kind": "jumprelu"}, None),
    "relu sparse": ({"kind": "relu"}, MOST_SPARSE),
    "topk": ({"kind": "topk"}, None),
    "topk by norm over all layers": ({"kind": "topk", "scope": "all_layers", "score": "decoder_norm"}, None),
    "topk dense": ({"kind": "topk"}, 0.0),
    "batchtopk": ({"kind": "batchtopk"}, None),
    "batchtopk over all layers": ({"kind": "batchtopk", "scope": "all_layers"}, None),
    "batchtopk dense": ({"kind": "batchtopk"}, 0.0),
}
# Shares of ALL_LAYERS_BYTES, with a margin over what was measured on two backends: 0.01 to 0.04 for topk, 0.08 for
# batchtopk, 0.13 to 0.18 for dense layers (three buffers of one layer, AuxK's among them), and 0.24 where the
# `cpu` backend selects over all layers. Codes of all layers wait for the backward pass, with the tanh penalty at 24
# bytes an entry: 0.6 at a tenth. A mask of all layers is a quarter, and puts every case above its limit.
LIMITS = {
    "relu": 0.24,
    "jumprelu": 0.24,
    "relu sparse": 0.75,
    "topk": 0.1,
    "topk by norm over all layers": 0.16,
    "topk dense": 0.2,
    "batchtopk": 0.14,
    "batchtopk over all layers": 0.29,
    "batchtopk dense": 0.2,
}


def prepare(case: str, backend: str, device: torch.device) -> Callable[[], None]:
    """A step with every loss on; parameters, moments, kept gradients and batch exist."""
    spec, dense_above = CASES[case]
    model, x, y = make_model(**SHAPE, **spec, dtype=torch.float32)
    model.backend = backend
    model.to(device)
    x, y = x.to(device), y.to(device)
    if case == "relu sparse":
        for s, layer in enumerate(model.source_layers):
            set_density(layer, model.scale_input(s, x[:, s]), 0.99 * MOST_SPARSE)
    kill(model)
    model.running_threshold_L.fill_(0.5)
    model.gradient_buffers.enabled = True
    config, _ = all_losses(model)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step(n_tokens: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        kernels_config = KernelsConfig(dense_above_density=dense_above)
        loss = compute_loss(
            model, x[:n_tokens], y[:n_tokens], context(model), activation=config, kernels=kernels_config
        )
        loss.total.backward()
        optimizer.step()

    # What is made or compiled once belongs to no step. All tokens: eight do not reach every kernel.
    step(x.shape[0])
    return lambda: step(x.shape[0])


def beside_a_mask(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The step, while a bool of [B, L, F] is alive: what the limits must tell from the step alone."""

    def both() -> None:
        mask = torch.ones(SHAPE["n_tokens"], SHAPE["n_layers"], SHAPE["n_features"], dtype=torch.bool, device=device)
        step()
        assert bool(mask[-1, -1, -1])

    return both


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """What the step held at most beyond what was there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    step()
    return (_status_kib("VmHWM") - before) * 1024


def _status_kib(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def main(backend: str, device_name: str = "cpu") -> None:
    """Prints the two peaks of every case."""
    device = torch.device(device_name)
    torch.set_num_threads(1)
    assert kernels(backend, device).name == backend
    peaks = {}
    for case in CASES:
        step = prepare(case, backend, device)
        peaks[case] = [peak_bytes(step, device), peak_bytes(beside_a_mask(step, device), device)]
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(*sys.argv[1:])
