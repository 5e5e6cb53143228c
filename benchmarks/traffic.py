"""Counts the bytes of every collective of a forward and backward pass on a mesh, beside the model's formula.

    python -m benchmarks.traffic                # every case below, in real processes over gloo
    python -m benchmarks.traffic --only topk    # those whose name has one of these words

Counted at the calls into torch.distributed, as what a rank sends (trainer/parallel/traffic.py says how), per rank and
token of its microbatch, on average over the ranks. Exit 1 where a sum is off by more than 5%.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.config import ActivationConfig, ActivationKind, KernelsConfig
from trainer.loss import LossOutput, StepContext, compute_loss
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.spec import ModelSpec
from trainer.parallel.collectives import collectives_of
from trainer.parallel.mesh import mesh_of
from trainer.parallel.traffic import Shares, model_bytes

TOLERANCE = 0.05


@dataclass(frozen=True)
class Case:
    """A mesh, a split, and a model of L = 4, D = 256, F = 4,096 on B = 512 tokens a rank."""

    name: str
    data: int
    feature: int
    by_columns: bool = True
    spec: tuple[tuple[str, Any], ...] = ()
    b_enc: float = 0.0
    dense: bool = False
    tanh: float = 0.0


def _spec(**values: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(values.items())


TOPK, ALL = _spec(kind="topk", k=16), _spec(kind="topk", k=16, scope="all_layers")
BATCHTOPK = _spec(kind="batchtopk", k=16, scope="all_layers")
RELU, JUMPRELU = _spec(kind="relu"), _spec(kind="jumprelu", bandwidth=0.05)
CASES = [
    Case("topk columns", 1, 2, spec=TOPK),
    Case("topk columns", 1, 4, spec=TOPK),
    Case("topk columns", 2, 2, spec=TOPK),
    Case("topk rows", 1, 4, by_columns=False, spec=TOPK),
    Case("topk all layers, columns", 1, 4, spec=ALL),
    Case("topk all layers, norm score, columns", 1, 4, spec=(*ALL, ("score", "decoder_norm"))),
    Case("batchtopk all layers, columns", 1, 4, spec=BATCHTOPK),
    Case("batchtopk all layers, columns", 2, 2, spec=BATCHTOPK),
    Case("batchtopk all layers", 4, 1, spec=BATCHTOPK),
    Case("batchtopk a layer, columns", 2, 2, spec=_spec(kind="batchtopk", k=16)),
    Case("relu columns", 1, 4, spec=RELU, b_enc=-0.3),
    Case("relu tanh, columns", 1, 4, spec=RELU, b_enc=-0.3, tanh=0.1),
    Case("relu rows", 1, 4, by_columns=False, spec=RELU, b_enc=-0.3),
    Case("relu dense, columns", 1, 4, spec=RELU, dense=True),
    Case("jumprelu columns", 1, 4, spec=JUMPRELU, b_enc=-0.3),
]
N_LAYERS, D_MODEL, N_FEATURES, TOKENS = 4, 256, 4096, 512


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes that this rank sends while the context lasts, by the name of the call."""
    sent: Counter[str] = Counter()
    kept = {name: getattr(dist, name) for name in (*_RULES, "batch_isend_irecv") if hasattr(dist, name)}

    def call(name: str, *args: Any, **kwargs: Any) -> Any:
        sent[name] += _RULES[name](args, dist.get_world_size(kwargs.get("group")))
        return kept[name](*args, **kwargs)

    def batch(operations: list[dist.P2POp]) -> Any:
        sent["isend"] += sum(op.tensor.nbytes for op in operations if op.op is dist.isend)
        return kept["batch_isend_irecv"](operations)

    for name in kept:
        setattr(dist, name, batch if name == "batch_isend_irecv" else partial(call, name))
    try:
        yield sent
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


# Bytes sent by one of n ranks, from the positional arguments of the call.
_RULES: dict[str, Callable[[tuple[Any, ...], int], float]] = {
    "all_reduce": lambda args, n: 2 * (n - 1) / n * args[0].nbytes,
    "all_to_all_single": lambda args, n: (n - 1) / n * args[1].nbytes,
    "all_gather_single": lambda args, n: (n - 1) * args[1].nbytes,
    "all_gather_into_tensor": lambda args, n: (n - 1) * args[1].nbytes,
    "reduce_scatter_tensor": lambda args, n: (n - 1) / n * args[1].nbytes,
}


def measure(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """(counted by call, formula by kind), in bytes per rank and token; the same on every rank."""
    mesh = mesh_of(case.data, case.feature, torch.device("cpu"))
    spec = ModelSpec(n_layers=N_LAYERS, d_model=D_MODEL, n_features=N_FEATURES, **dict(case.spec))
    model = CrossLayerTranscoder(spec, collectives=collectives_of(mesh, by_columns=case.by_columns))
    with torch.no_grad():
        for layer in model.source_layers:
            layer.b_enc.fill_(case.b_enc)
    generator = torch.Generator().manual_seed(1 + mesh.data.rank)
    x_BLD = torch.randn(TOKENS, N_LAYERS, D_MODEL, generator=generator)
    y_BLD = model.local_columns(torch.randn(TOKENS, N_LAYERS, D_MODEL, generator=generator))
    activation = ActivationConfig(kind=ActivationKind(spec.kind), k=spec.k, tanh_lambda=case.tanh, auxk_coefficient=0.0)
    step = StepContext(k=spec.k, penalty_scale=1.0, dead_after_tokens=10**9)
    kernels = KernelsConfig(dense_above_density=0.0 if case.dense else 1.0)
    with counted() as sent:
        output = compute_loss(model, x_BLD, y_BLD, step, activation=activation, kernels=kernels)
        output.total.backward()
    entries, largest = _entries(output)
    norms = 2 if case.tanh else int(spec.score == "decoder_norm")
    shares = Shares(
        data=case.data,
        feature=case.feature,
        by_columns=case.by_columns,
        tokens=TOKENS,
        entries=entries / case.data,
        largest_count=largest,
        dense=N_LAYERS if case.dense else 0,
        norms=2 * norms if spec.score == "decoder_norm" and spec.kind == "batchtopk" else norms,
    )
    names = sorted(_gathered(sorted(sent)))
    totals = torch.tensor([sent[name] for name in names], dtype=torch.float64)
    dist.all_reduce(totals)
    per_token = (totals / mesh.size / TOKENS).tolist()
    return dict(zip(names, per_token, strict=True)), model_bytes(spec, shares)


def _entries(output: LossOutput) -> tuple[float, int]:
    """Entries per token, summed over all ranks, and the most of one token on one rank and layer."""
    mine = [codes for codes in output.codes if codes is not None]
    total = torch.tensor([float(sum(codes.values.numel() for codes in mine))])
    largest = torch.tensor([max((int(codes.offsets.diff().max()) for codes in mine), default=0)])
    dist.all_reduce(total)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(total) / TOKENS, int(largest)


def _gathered(names: list[str]) -> set[str]:
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, names)
    return {name for found in lists for name in found}


def _rank(rank: int, size: int, store: str, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    bad = 0
    for case in cases:
        found, formula = measure(case)
        total, expected = sum(found.values()), sum(formula.values())
        off = total / expected - 1
        bad += abs(off) > TOLERANCE
        if rank == 0:
            by_call = ", ".join(f"{name} {n:,.1f}" for name, n in found.items() if n >= 0.05)
            by_kind = ", ".join(f"{kind} {n:,.1f}" for kind, n in formula.items() if n >= 0.05)
            print(
                f"| {case.name} | {case.data}x{case.feature} | {total:,.1f} | {expected:,.1f} | {off:+.1%} | {by_call} "
                f"| {by_kind} |",
                flush=True,
            )
    dist.destroy_process_group()
    if bad:
        raise SystemExit(1)


def main() -> int:
    """Prints a table of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="WORD", help="cases whose name has one of these words")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cases = [case for case in CASES if not arguments.only or any(word in case.name for word in arguments.only)]
    print(
        "| case | mesh | counted | formula | off | counted by call | formula by kind |\n|---|---|---|---|---|---|---|"
    )
    bad = False
    for size in sorted({case.data * case.feature for case in cases}):
        ours = [case for case in cases if case.data * case.feature == size]
        with tempfile.TemporaryDirectory(prefix="layerloom-traffic-") as folder:
            context = torch.multiprocessing.get_context("spawn")
            store = str(Path(folder) / "store")
            processes = [context.Process(target=_rank, args=(rank, size, store, ours)) for rank in range(size)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            bad = bad or any(process.exitcode for process in processes)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
