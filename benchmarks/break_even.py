"""From which density on the dense path of a layer is faster: what trainer/model/break_even.py ships.

    python -m benchmarks.break_even                              the standard shapes on this machine, both families
    python -m benchmarks.break_even --backend triton --device cuda --dtype bfloat16 --shape 12,768,32768,16384

It is what `layerloom tune` runs, without a config and without a cache; needs torch alone (and the backend's package).
"""

import argparse

import torch

from activation_store.device import resolve_device
from trainer.kernels.dispatch import choose
from trainer.model.break_even import mean_span
from trainer.model.spec import ModelSpec
from trainer.tune import measure

# L, d, F, B: rows of 896 and of 4,992 columns, on average.
SHAPES = ((6, 256, 4096, 1024), (12, 768, 8192, 512))


def main() -> None:
    """Prints a line for each shape and family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="L,d,F,B; default: the standard shapes")
    parser.add_argument("--kinds", default="topk,relu", help="relu stands for jumprelu, topk for batchtopk")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the products")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--seconds", type=float, default=30, help="of each line")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = resolve_device(options.device), getattr(torch, options.dtype)
    choice = choose(options.backend, device)
    shapes = [tuple(map(int, options.shape.split(",")))] if options.shape else list(SHAPES)
    print(f"torch {torch.__version__}, {choice.kernels.name} ({choice.reason}), {options.dtype}, {device}")
    for n_layers, d_model, n_features, n_tokens in shapes:
        for kind in options.kinds.split(","):
            spec = ModelSpec(n_layers=n_layers, d_model=d_model, n_features=n_features, kind=kind, k=8)
            found = measure(
                spec,
                n_tokens=n_tokens,
                kernels=choice.kernels,
                device=device,
                compute_dtype=dtype,
                seconds=options.seconds,
            )
            ratios = ", ".join(f"{t.density:.1%}: {t.sparse_s / t.dense_s:.2f}" for t in found.timings)
            shape = f"L={n_layers} d={d_model} F={n_features} B={found.tokens} {kind}"
            columns = f"rows of {mean_span(spec) * d_model:.0f} columns"
            print(f"{shape}: {columns}, break-even {found.density:.2%}; sparse / dense time {ratios}", flush=True)


if __name__ == "__main__":
    main()
