"""A step with decoders split by columns against one with rows, over how many entries a token selects.

    python -m benchmarks.splits                                  # two ranks of the feature axis, over gloo
    python -m benchmarks.splits --ranks 4 --shape 6,256,4096,1024 --shares 0.25 0.5 1
    python -m benchmarks.splits --link 1gbit                     # over a link with that rate, each way (root, Linux)

topk, whose k says how many entries there are: E = k L over all layers. Shares are those of E*, at which either way
sends equally many bytes (docs/parallel.md). A step is whole: the feed's exchange (in turn with the rest, for it takes
the same cores), forward and backward pass, norm and Adam. In every round each way takes one step, so that a busy
machine disturbs both alike; a ratio is the median over rounds of columns to rows in the same round. Where it crosses 1
is what `parallel.decoder_split=auto` goes by (`trainer/parallel/split_table.py`).
"""

import argparse
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import torch

from activation_store.batch import ActivationBatch
from benchmarks.links import link
from benchmarks.measure import command, machine, median_ratio, table, take_turns, write_page
from benchmarks.ranks import in_ranks
from trainer.config import (
    ActivationConfig,
    KernelBackend,
    KernelsConfig,
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
from trainer.parallel.feed import Spread
from trainer.parallel.mesh import Mesh, mesh_of
from trainer.parallel.split import columns_bytes, id_bytes, rows_bytes

SHAPES = ["6,256,4096,512", "6,256,1024,1024"]
SHARES = [1 / 32, 1 / 8, 1 / 2, 1.0]
_WAYS = {"columns": True, "rows": False}


class Shape(NamedTuple):
    """L, d, F and the tokens of a microbatch."""

    n_layers: int
    d_model: int
    n_features: int
    tokens: int


class Point(NamedTuple):
    """A share of E*: k there, bytes of columns to those of rows, and by way the seconds of every round."""

    share: float
    k: int
    bytes_ratio: float
    seconds: dict[str, list[float]]

    def ratio(self) -> float:
        """Time of columns to that of rows."""
        return median_ratio(self.seconds["columns"], self.seconds["rows"])


def k_at(shape: Shape, ranks: int, share: float) -> int:
    """The k with which a token has so large a share of the entries at which both ways send equally many bytes."""
    each = 2 * 4 + id_bytes(shape.n_features // ranks)
    return max(1, min(shape.n_features, round(share * 2 * shape.d_model * 4 / each)))


def measured(shape: Shape, ranks: int, shares: list[float], rounds: int, backend: str) -> list[Point]:
    """On every rank."""
    device = torch.device("cpu")
    mesh = mesh_of(1, ranks, device)
    points = []
    for share in shares:
        spec = _spec(shape, k_at(shape, ranks, share))
        steps = {name: _new_step(spec, shape, mesh, backend, by_columns=way) for name, way in _WAYS.items()}
        seconds = take_turns(steps, rounds, device, warm=2, tolerance=1e-3)
        sent = columns_bytes(spec, ranks, spec.k * spec.n_layers) / rows_bytes(spec, ranks)
        points.append(Point(share, spec.k, sent, seconds))
    return points


def _spec(shape: Shape, k: int) -> ModelSpec:
    return ModelSpec(n_layers=shape.n_layers, d_model=shape.d_model, n_features=shape.n_features, kind="topk", k=k)


def _new_step(spec: ModelSpec, shape: Shape, mesh: Mesh, backend: str, *, by_columns: bool) -> Callable[[], float]:
    config = RunConfig(
        model=ModelConfig(n_features=spec.n_features),
        activation=ActivationConfig(k=spec.k, auxk_coefficient=0.0),
        train=TrainConfig(batch_size_tokens=shape.tokens, microbatch_tokens=shape.tokens),
        parallel=ParallelConfig(feature=mesh.feature.size),
        kernels=KernelsConfig(backend=KernelBackend(backend)),
    )
    collectives = collectives_of(mesh, by_columns=by_columns)
    model = CrossLayerTranscoder(spec, collectives=collectives, backend=backend)
    engine = build_engine(config, model, mesh)
    spread = Spread(mesh, collectives.partitioning, torch.device("cpu"))
    g = torch.Generator().manual_seed(mesh.feature.rank)
    rows = shape.tokens // mesh.feature.size
    part_BLD = [torch.randn(rows, spec.n_layers, spec.d_model, generator=g).half() for _ in range(2)]
    share = ActivationBatch(*part_BLD, torch.arange(rows), 0)
    context = StepContext(k=spec.k, penalty_scale=1.0, dead_after_tokens=10**12, lr=1e-6)

    def step() -> float:
        loss = engine.backward([spread(share)], context)
        engine.update(float(engine.gradient_norm()))
        return float(loss.total)

    return step


def crossing(points: list[Point]) -> float | None:
    """The ratio of bytes at which both ways take equally long, between neighbours by the logarithm; None: nowhere."""
    for before, after in pairwise(points):
        low, high = torch.tensor([before.ratio(), after.ratio()]).log().tolist()
        if low <= 0 < high:
            return float(before.bytes_ratio * (after.bytes_ratio / before.bytes_ratio) ** (-low / (high - low)))
    return None


def _section(shape: Shape, ranks: int, points: list[Point]) -> str:
    rows = []
    for point in points:
        columns, others = (median(point.seconds[name]) * 1e3 for name in _WAYS)
        pairs = sorted(c / r for c, r in zip(*(point.seconds[name] for name in _WAYS), strict=True))
        rows.append(
            [
                f"{point.share:.3g}",
                f"{point.k * shape.n_layers:,}",
                f"{point.k / shape.n_features:.2%}",
                f"{point.bytes_ratio:.2f}",
                f"{columns:.0f}",
                f"{others:.0f}",
                f"{point.ratio():.2f}",
                f"{pairs[len(pairs) // 4]:.2f} to {pairs[-1 - len(pairs) // 4]:.2f}",
            ]
        )
    header = [
        "E / E*",
        "E",
        "density",
        "bytes, columns / rows",
        "columns, ms",
        "rows, ms",
        "time, columns / rows",
        "middle half",
    ]
    found = crossing(points)
    said = "nowhere here" if found is None else f"at {found:.2f} of the bytes of rows"
    title = f"## L = {shape.n_layers}, d = {shape.d_model}, F = {shape.n_features:,}, B = {shape.tokens:,}; 1x{ranks}"
    return f"{title}\n\n{table(header, rows)}\n\nEqually long: {said}."


def main() -> None:
    """Prints or writes a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes, all on the feature axis")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shape", nargs="*", default=SHAPES, help="L,d,F,tokens of a microbatch")
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES, help="of the entries with equal bytes")
    parser.add_argument("--backend", default="auto", help="of the kernels")
    parser.add_argument("--link", metavar="RATE", help="between two ranks, in tc's words: 1gbit; as root")
    parser.add_argument("--write", metavar="FILE", help="write the page there")
    arguments = parser.parse_args()
    if arguments.link and (arguments.ranks != 2 or os.geteuid() or not (shutil.which("ip") and shutil.which("tc"))):
        parser.error("--link is for two ranks, and wants root and iproute2 (ip, tc); leave it out, or see to these")
    for text in arguments.shape:
        _, d_model, n_features, _ = (int(number) for number in text.split(","))
        if d_model % arguments.ranks or n_features % arguments.ranks:
            parser.error(f"--shape {text}: d and F must be divisible by --ranks {arguments.ranks}")
    over = f"a link of {arguments.link} each way between them" if arguments.link else "loopback between them"
    page = [
        "# Decoders by columns and by rows",
        f"    {command('benchmarks.splits')}",
        f"{arguments.ranks} processes over gloo on one machine, one thread each, {over}; "
        f"kernels.backend={arguments.backend}; {machine(torch.device('cpu'))}; {arguments.rounds} rounds.",
    ]
    with link(arguments.link) if arguments.link else nullcontext([]) as ends:
        for text in arguments.shape:
            shape = Shape(*(int(number) for number in text.split(",")))
            words = (shape, arguments.ranks, arguments.shares, arguments.rounds, arguments.backend)
            page.append(_section(shape, arguments.ranks, in_ranks(arguments.ranks, measured, *words, ends=ends)))
    if arguments.write:
        write_page(arguments.write, "\n\n".join(page))
    else:
        print("\n\n".join(page))


if __name__ == "__main__":
    main()
