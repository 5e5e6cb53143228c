"""Time and memory of a whole training step: the sparse step of trainer against a tuned dense step.

    python -m benchmarks.step                          both of the standard shapes, time and memory
    python -m benchmarks.step --shape 6,256,4096,1024,16 --pairs 15 --kind batchtopk

The dense step does what a careful dense trainer would: one matmul per source layer for all its targets, torch.topk,
gradients by hand into kept buffers, clipping by the exact global norm, fused torch Adam. Both steps start from the same
parameters and see the same batch.
Times are medians over pairs that alternate in one process, so that a busy machine disturbs both alike; the ratio is the
median of the pairs' ratios. Peak memory is the resident-set peak of a process that runs one of them alone.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from trainer.config import ActivationConfig, ActivationKind
from trainer.loss import StepContext, compute_loss
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.spec import ModelSpec

# L, d, F, B, K of issue "Kernels".
SHAPES = ((6, 256, 4096, 1024, 16), (30, 576, 1024, 1024, 8))
LR = 1e-3
Step = Callable[[Tensor, Tensor], float]


def clip_and_update(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Exact global norm, clip at 1, Adam."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    torch._foreach_mul_(gradients, torch.clamp(1.0 / norm, max=1.0))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def sparse_step(shape: tuple[int, ...], kind: str, scope: str) -> Step:
    """One step of trainer: loss, backward, clip, Adam."""
    n_layers, d_model, n_features, _, k = shape
    spec = ModelSpec(n_layers=n_layers, d_model=d_model, n_features=n_features, kind=kind, k=k, scope=scope)
    model = CrossLayerTranscoder(spec, seed=0)
    model.gradient_buffers.enabled = True
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)
    activation = ActivationConfig(kind=ActivationKind(kind), k=k)
    context = StepContext(k=k, penalty_scale=1.0, dead_after_tokens=10**9)

    def step(x_BLD: Tensor, y_BLD: Tensor) -> float:
        output = compute_loss(model, x_BLD, y_BLD, context, activation=activation)
        output.total.backward()  # type: ignore[no-untyped-call]
        clip_and_update(parameters, optimizer)
        model.record_step(output.fired, x_BLD.shape[0], output.batch_threshold_L)
        return float(output.total.detach())

    return step


class DenseStep:
    """The same TopK step, dense and tuned: gradients by hand into kept buffers, so that nothing is copied or zeroed
    beyond what the matmuls need."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        n_layers, d_model, n_features, _, self.k = shape
        model = CrossLayerTranscoder(ModelSpec(n_layers=n_layers, d_model=d_model, n_features=n_features, k=self.k))
        self.layers = [
            (layer.W_enc.detach(), layer.b_enc.detach(), layer.W_dec.detach().flatten(1))
            for layer in model.source_layers
        ]
        self.b_dec = torch.zeros(n_layers * d_model)
        self.parameters = [*(p for layer in self.layers for p in layer), self.b_dec]
        self.gradients = [torch.empty_like(p) for p in self.parameters]
        self.optimizer = torch.optim.Adam(self.parameters, lr=LR, fused=True)

    def __call__(self, x_BLD: Tensor, y_BLD: Tensor) -> float:
        codes = []
        error_BC = self.b_dec - y_BLD.flatten(1)
        for s, (W_enc, b_enc, W_dec) in enumerate(self.layers):
            pre_BF = functional.linear(x_BLD[:, s], W_enc, b_enc)
            values_Bk, ids_Bk = torch.topk(pre_BF, self.k, dim=1, sorted=False)
            a_BF = pre_BF.zero_().scatter_(1, ids_Bk, values_Bk.relu_())
            error_BC[:, -W_dec.shape[1] :].addmm_(a_BF, W_dec)
            codes.append(a_BF)
        loss = float(error_BC.square().sum()) / x_BLD.shape[0]
        grad_BC = error_BC.mul_(2 / x_BLD.shape[0])
        for s, (_, _, W_dec) in enumerate(self.layers):
            grad_W_enc, grad_b_enc, grad_W_dec = self.gradients[3 * s : 3 * s + 3]
            suffix_BC = grad_BC[:, -W_dec.shape[1] :]
            torch.mm(codes[s].t(), suffix_BC, out=grad_W_dec)
            grad_pre_BF = (suffix_BC @ W_dec.t()).mul_(codes[s] > 0)
            torch.mm(grad_pre_BF.t(), x_BLD[:, s], out=grad_W_enc)
            torch.sum(grad_pre_BF, dim=0, out=grad_b_enc)
        torch.sum(grad_BC, dim=0, out=self.gradients[-1])
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        clip_and_update(self.parameters, self.optimizer)
        return loss


def batch(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Random inputs and targets (B, L, D)."""
    n_layers, d_model, _, n_tokens, _ = shape
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(n_tokens, n_layers, d_model, generator=generator),
        torch.randn(n_tokens, n_layers, d_model, generator=generator),
    )


def build(name: str, shape: tuple[int, ...], kind: str, scope: str) -> Step:
    """The step of that name."""
    return DenseStep(shape) if name == "dense" else sparse_step(shape, kind, scope)


def measure_times(shape: tuple[int, ...], kind: str, scope: str, pairs: int) -> dict[str, float]:
    """Median seconds of both steps, and the median ratio of pairs."""
    x_BLD, y_BLD = batch(shape)
    steps = {name: build(name, shape, kind, scope) for name in ("dense", "sparse")}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(pairs + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            losses[name].append(step(x_BLD, y_BLD))
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    if kind == "topk" and scope == "layer":
        difference = max(abs(a / b - 1) for a, b in zip(losses["dense"][:3], losses["sparse"][:3], strict=True))
        assert difference < 1e-4, f"the two steps do not train the same model: {losses}"
    ratios = [d / s for d, s in zip(seconds["dense"], seconds["sparse"], strict=True)]
    return {"dense_s": median(seconds["dense"]), "sparse_s": median(seconds["sparse"]), "speedup": median(ratios)}


def peak_mib(name: str, shape: tuple[int, ...], kind: str, scope: str) -> float:
    """Peak resident set that three steps add to a process that has only imported."""
    command = [sys.executable, "-m", "benchmarks.step", "--peak-of", name, "--kind", kind, "--scope", scope]
    command += ["--shape", ",".join(map(str, shape)), "--threads", str(torch.get_num_threads())]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["peak_mib"])


def peak_resident_mib() -> float:
    """Peak resident set of this process since it was started."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def run_for_peak(name: str, shape: tuple[int, ...], kind: str, scope: str) -> None:
    """Child process of `peak_mib`."""
    before = peak_resident_mib()
    x_BLD, y_BLD = batch(shape)
    step = build(name, shape, kind, scope)
    for _ in range(3):
        step(x_BLD, y_BLD)
    print(json.dumps({"peak_mib": peak_resident_mib() - before}))


def main() -> None:
    """Print one line per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="L,d,F,B,K; default: the standard shapes")
    parser.add_argument("--kind", default="topk", choices=["topk", "batchtopk"])
    parser.add_argument("--scope", default="layer", choices=["layer", "all_layers"])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak-of", choices=["dense", "sparse"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    shapes = [tuple(map(int, options.shape.split(",")))] if options.shape else list(SHAPES)
    if options.peak_of:
        run_for_peak(options.peak_of, shapes[0], options.kind, options.scope)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, {options.kind} over {options.scope}")
    for shape in shapes:
        n_layers, d_model, n_features, _, _ = shape
        values = n_features * d_model * (n_layers + n_layers * (n_layers + 1) // 2)
        times = measure_times(shape, options.kind, options.scope, options.pairs)
        line = " ".join(f"{name}={size}" for name, size in zip("LdFBK", shape, strict=True))
        line += f": dense {times['dense_s'] * 1e3:.0f} ms, sparse {times['sparse_s'] * 1e3:.0f} ms"
        line += f", {times['speedup']:.2f} times faster; parameters + Adam {values * 12 / 2**20:.0f} MiB"
        if not options.no_memory:
            for name in ("dense", "sparse"):
                line += f", peak {name} {peak_mib(name, shape, options.kind, options.scope):.0f} MiB"
        print(line)


if __name__ == "__main__":
    main()
