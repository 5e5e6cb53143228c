"""What the engines cost in time against plain, on the same mesh of real processes over gloo, and the bytes they send.

    python -m benchmarks.engines                          # two ranks of the data axis
    python -m benchmarks.engines --ranks 4 --microbatches 2
    python -m benchmarks.engines --write benchmarks/results/engines.md

In every round each engine takes one step, so that a busy machine disturbs all alike; a ratio is the median over rounds
of the ratio to plain in the same round. Bytes are those that rank 0 hands to its process groups in a step, as what
a rank sends, beside the formula (trainer/parallel/traffic.py). DDP sends from C++; to be counted, an engine of its own
sends the same messages by a hook.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from activation_store.batch import ActivationBatch
from benchmarks.measure import command, machine, median_ratio, table, take_turns, write_page
from benchmarks.ranks import in_ranks
from benchmarks.sent import groups_counted
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
from trainer.parallel.accelerate_engine import AccelerateEngine
from trainer.parallel.collectives import collectives_of
from trainer.parallel.engine import Engine, build_engine
from trainer.parallel.mesh import Mesh, mesh_of
from trainer.parallel.traffic import engine_bytes

ENGINES = {
    "plain": EngineConfig(),
    "fsdp": EngineConfig(kind=EngineKind.fsdp),
    "accelerate": EngineConfig(kind=EngineKind.accelerate),
    **{f"deepspeed, ZeRO {n}": EngineConfig(kind=EngineKind.deepspeed, zero_stage=n) for n in (1, 2, 3)},
}
Shape = tuple[int, int, int, int, int]


def bytes_sent(
    name: str, mesh: Mesh, shape: Shape, microbatches: int
) -> tuple[dict[str, float], dict[str, float], int]:
    """(counted by call, formula by kind) of a step of this rank, and the tokens that it has in one."""
    engine, step = _new(ENGINES[name], mesh, shape, microbatches)
    if isinstance(engine, AccelerateEngine) and isinstance(engine._ddp, DistributedDataParallel):
        # The same messages, of the same buckets, from where they can be counted.
        engine._ddp.register_comm_hook(mesh.data.group, allreduce_hook)
    step()
    with groups_counted() as sent:
        step()
    parameters = sum(p.numel() for p in _model(mesh, shape).parameters())
    tokens = shape[3] // mesh.data.size * microbatches
    return dict(sent), engine_bytes(ENGINES[name], parameters, mesh.data.size, microbatches), tokens


def _model(mesh: Mesh, shape: Shape) -> CrossLayerTranscoder:
    n_layers, d_model, n_features, _, k = shape
    spec = ModelSpec(n_layers=n_layers, d_model=d_model, n_features=n_features, kind="topk", k=k)
    return CrossLayerTranscoder(spec, collectives=collectives_of(mesh, by_columns=True))


def _new(
    engine_config: EngineConfig, mesh: Mesh, shape: Shape, microbatches: int
) -> tuple[Engine, Callable[[], float]]:
    n_layers, d_model, n_features, tokens, k = shape
    config = RunConfig(
        model=ModelConfig(n_features=n_features),
        activation=ActivationConfig(k=k, auxk_coefficient=0.0),
        train=TrainConfig(batch_size_tokens=tokens * microbatches, microbatch_tokens=tokens),
        parallel=ParallelConfig(data=mesh.data.size),
        engine=engine_config,
    )
    engine = build_engine(config, _model(mesh, shape), mesh)
    g = torch.Generator().manual_seed(mesh.data.rank)
    rows = tokens // mesh.data.size
    parts = [
        ActivationBatch(*(torch.randn(rows, n_layers, d_model, generator=g) for _ in range(2)), torch.arange(rows), 0)
        for _ in range(microbatches)
    ]
    context = StepContext(k=k, penalty_scale=1.0, dead_after_tokens=10**12, lr=1e-4)

    def step() -> float:
        loss = engine.backward(parts, context)
        engine.update(float(engine.gradient_norm()))
        return float(loss.total)

    return engine, step


def _measured(arguments: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, tuple[float, float]]]:
    """By engine: seconds of every round; bytes by the formula, and counted. On every rank."""
    device = torch.device("cpu")
    mesh = mesh_of(arguments.ranks, 1, device)
    shape, microbatches = arguments.shape, arguments.microbatches
    steps = {name: _new(ENGINES[name], mesh, shape, microbatches)[1] for name in arguments.engines}
    seconds = take_turns(steps, arguments.rounds, device, warm=2, tolerance=1e-4)
    sent = {}
    for name in steps:
        found, formula, _ = bytes_sent(name, mesh, shape, microbatches)
        sent[name] = (sum(formula.values()), sum(found.values()))
    return seconds, sent


def _page(arguments: argparse.Namespace, seconds: dict[str, list[float]], sent: dict[str, tuple[float, float]]) -> str:
    n_layers, d_model, n_features, tokens, k = arguments.shape
    spec = ModelSpec(n_layers=n_layers, d_model=d_model, n_features=n_features, kind="topk", k=k)
    parameters = sum(p.numel() for p in CrossLayerTranscoder(spec).parameters())
    rows = []
    for name, found in seconds.items():
        expected, found_bytes = sent[name]
        ratio = f"{median_ratio(found, seconds['plain']):.2f}" if "plain" in seconds else ""
        rows.append(
            [name, f"{median(found) * 1e3:.0f}", ratio, f"{expected / 2**20:.1f}", f"{found_bytes / 2**20:.1f}"]
        )
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
    page = _page(arguments, *in_ranks(arguments.ranks, _measured, arguments))
    if arguments.write:
        write_page(arguments.write, page)
    else:
        print(page)


if __name__ == "__main__":
    main()
