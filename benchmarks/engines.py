"""What the engines cost in time against plain, on the same mesh of real processes over gloo, and the bytes they send.

    python -m benchmarks.engines                          # two ranks of the data axis
    python -m benchmarks.engines --ranks 4 --microbatches 2
    python -m benchmarks.engines --write benchmarks/results/engines.md

In every round each engine takes one step, so that a busy machine disturbs all alike; a ratio is the median over rounds
of the ratio to plain in the same round. Bytes are those that rank 0 hands to its process groups in a step, as what
a rank sends (trainer/parallel/traffic.py), beside the formula of docs/parallel.md; DDP sends from C++, uncounted.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from activation_store.batch import ActivationBatch
from benchmarks.measure import command, machine, median_ratio, table, take_turns, write_page
from trainer.config import (
    ActivationConfig,
    EngineConfig,
    EngineKind,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from trainer.loss import StepContext
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.spec import ModelSpec
from trainer.parallel.collectives import collectives_of
from trainer.parallel.engine import build_engine
from trainer.parallel.mesh import Mesh, mesh_of

ENGINES = {
    "plain": EngineConfig(),
    "fsdp": EngineConfig(kind=EngineKind.fsdp),
    "accelerate": EngineConfig(kind=EngineKind.accelerate),
    **{f"deepspeed, ZeRO {n}": EngineConfig(kind=EngineKind.deepspeed, zero_stage=n) for n in (1, 2, 3)},
}


# Bytes sent by one of n ranks, from the arguments of a process group's method.
_RULES: dict[str, Callable[[tuple[Any, ...], int], float]] = {
    "allreduce": lambda args, n: 2 * (n - 1) / n * _bytes(args[0]),
    "reduce": lambda args, n: (n - 1) / n * _bytes(args[0]),
    "_allgather_base": lambda args, n: (n - 1) * _bytes(args[1]),
    "allgather": lambda args, n: (n - 1) * _bytes(args[1]),
    "_reduce_scatter_base": lambda args, n: (n - 1) / n * _bytes(args[1]),
    "all_gather_single": lambda args, n: (n - 1) * _bytes(args[1]),
    "allgather_into_tensor_coalesced": lambda args, n: (n - 1) * _bytes(args[1]),
    "reduce_scatter_single": lambda args, n: (n - 1) / n * _bytes(args[1]),
}


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in ([tensors] if isinstance(tensors, torch.Tensor) else tensors))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes that this rank sends while the context lasts, by method: libraries keep torch.distributed's functions, but
    all of them call the process group.
    """
    sent: Counter[str] = Counter()
    kept = {name: getattr(dist.ProcessGroup, name) for name in _RULES if hasattr(dist.ProcessGroup, name)}

    def method(name: str) -> Callable[..., Any]:
        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            sent[name] += _RULES[name](args, group.size())
            return kept[name](group, *args, **kwargs)

        return call

    for name in kept:
        setattr(dist.ProcessGroup, name, method(name))
    try:
        yield sent
    finally:
        for name, function in kept.items():
            setattr(dist.ProcessGroup, name, function)


def formula(name: str, parameters: int, ranks: int, microbatches: int) -> float:
    """Bytes that a rank sends in a step (docs/parallel.md)."""
    share = (ranks - 1) / ranks * 4 * parameters
    return (
        share
        * {
            "plain": 2,
            "accelerate": 2,
            "fsdp": 2 * microbatches,
            "deepspeed, ZeRO 1": 3,
            "deepspeed, ZeRO 2": 2 * microbatches + 1,
            "deepspeed, ZeRO 3": 2 * microbatches,
        }[name]
    )


def _step(engine_config: EngineConfig, mesh: Mesh, arguments: argparse.Namespace) -> Callable[[], float]:
    n_layers, d_model, n_features, tokens, k = arguments.shape
    spec = ModelSpec(n_layers=n_layers, d_model=d_model, n_features=n_features, kind="topk", k=k)
    model = CrossLayerTranscoder(spec, collectives=collectives_of(mesh, by_columns=True))
    batch = tokens * arguments.microbatches
    config = RunConfig(
        model=ModelConfig(n_features=n_features),
        activation=ActivationConfig(k=k, auxk_coefficient=0.0),
        train=TrainConfig(batch_size_tokens=batch, microbatch_tokens=tokens),
        parallel=ParallelConfig(data=mesh.data.size),
        engine=engine_config,
    )
    engine = build_engine(config, model, mesh)
    g = torch.Generator().manual_seed(mesh.data.rank)
    rows = tokens // mesh.data.size
    microbatches = [
        ActivationBatch(*(torch.randn(rows, n_layers, d_model, generator=g) for _ in range(2)), torch.arange(rows), 0)
        for _ in range(arguments.microbatches)
    ]
    context = StepContext(k=k, penalty_scale=1.0, dead_after_tokens=10**12, lr=1e-4)

    def step() -> float:
        loss = engine.backward(microbatches, context)
        engine.update(float(engine.gradient_norm()))
        return float(loss.total)

    return step


def _rank(rank: int, arguments: argparse.Namespace, store: str, queue: Any) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=arguments.ranks)
    mesh = mesh_of(arguments.ranks, 1, device)
    steps = {name: _step(ENGINES[name], mesh, arguments) for name in arguments.engines}
    seconds = take_turns(steps, arguments.rounds, device, warm=2, tolerance=1e-4)
    sent = {}
    for name, step in steps.items():
        with counted() as bytes_by_call:
            step()
        sent[name] = sum(bytes_by_call.values())
    if rank == 0:
        queue.put((seconds, sent))
    dist.barrier()
    dist.destroy_process_group()


def _page(arguments: argparse.Namespace, seconds: dict[str, list[float]], sent: dict[str, float]) -> str:
    n_layers, d_model, n_features, tokens, k = arguments.shape
    spec = ModelSpec(n_layers=n_layers, d_model=d_model, n_features=n_features, kind="topk", k=k)
    parameters = sum(p.numel() for p in CrossLayerTranscoder(spec).parameters())
    rows = []
    for name, found in seconds.items():
        expected = formula(name, parameters, arguments.ranks, arguments.microbatches)
        ratio = f"{median_ratio(found, seconds['plain']):.2f}" if "plain" in seconds else ""
        counted_mib = "" if name == "accelerate" else f"{sent[name] / 2**20:.1f}"
        rows.append([name, f"{median(found) * 1e3:.0f}", ratio, f"{expected / 2**20:.1f}", counted_mib])
    header = ["engine", "ms a step", "against plain", "MiB sent, formula", "MiB sent, counted"]
    return "\n".join(
        [
            "# What the engines cost",
            "",
            f"`{command('benchmarks.engines')}`: {arguments.ranks} processes over gloo, data={arguments.ranks} x "
            f"feature=1; L = {n_layers}, d = {d_model}, F = {n_features}, K = {k}, {parameters:,} parameters, "
            f"{arguments.microbatches} microbatches of {tokens} tokens a step; {arguments.rounds} rounds.",
            "",
            f"{machine(torch.device('cpu'))}; one thread a process.",
            "",
            table(header, rows),
        ]
    )


def main() -> None:
    """Prints or writes a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes, all on the data axis")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--shape", default="6,256,1024,1024,16", help="L,d,F,tokens of a microbatch,K")
    parser.add_argument("--write", metavar="FILE", help="write the page there")
    arguments = parser.parse_args()
    arguments.shape = tuple(int(number) for number in arguments.shape.split(","))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="layerloom-engines-") as folder:
        processes = [
            context.Process(target=_rank, args=(rank, arguments, str(Path(folder) / "store"), queue))
            for rank in range(arguments.ranks)
        ]
        for process in processes:
            process.start()
        found = None
        for process in processes:
            while process.is_alive() and found is None:
                process.join(0.2)
                if not queue.empty():
                    found = queue.get()
            process.join()
        if found is None or any(process.exitcode for process in processes):
            sys.exit("a process failed: see above")
    page = _page(arguments, *found)
    if arguments.write:
        write_page(arguments.write, page)
    else:
        print(page)


if __name__ == "__main__":
    main()
