"""Counts the bytes of every collective of a step on a mesh, beside the formulas of trainer/parallel/traffic.py.

    python -m benchmarks.traffic                # every case below, in real processes over gloo
    python -m benchmarks.traffic --only topk    # those whose name has one of these words
    python -m benchmarks.traffic --write benchmarks/results/traffic.md

Three parts: the model's forward and backward pass of a microbatch; the feed, which spreads its rows; a step of each
engine. Counted at the calls into torch.distributed (of engines: of its process groups), as what a rank sends, per rank
and token, on average over the ranks. Exit 1 where a sum is off by more than 5%.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from activation_store.batch import ActivationBatch
from benchmarks.engines import ENGINES, bytes_sent
from benchmarks.measure import command, table, write_page
from benchmarks.ranks import in_ranks
from benchmarks.sent import calls_counted
from trainer.config import ActivationConfig, ActivationKind, KernelsConfig
from trainer.loss import LossOutput, StepContext, compute_loss
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.collectives import Partitioning
from trainer.model.spec import ModelSpec
from trainer.parallel.collectives import collectives_of
from trainer.parallel.feed import Spread
from trainer.parallel.mesh import mesh_of
from trainer.parallel.traffic import AuxK, Shares, feed_bytes, model_bytes

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
    # `activation.auxk_k`; every fourth feature is then dead: enough for each token to have so many in each layer.
    auxk: int = 0


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
    Case("topk auxk, columns", 1, 4, spec=TOPK, auxk=32),
    Case("topk auxk, columns", 2, 2, spec=TOPK, auxk=32),
    Case("topk auxk, rows", 1, 4, by_columns=False, spec=TOPK, auxk=32),
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
_DEAD_AFTER = 10**9


@dataclass(frozen=True)
class FeedCase:
    """A mesh and a split, for the same rows."""

    name: str
    data: int
    feature: int
    by_columns: bool = True


FEED_CASES = [
    FeedCase("feed columns", 1, 2),
    FeedCase("feed columns", 1, 4),
    FeedCase("feed columns", 2, 2),
    FeedCase("feed rows", 1, 4, by_columns=False),
]


@dataclass(frozen=True)
class EngineCase:
    """An engine by the name that benchmarks.engines gives it."""

    name: str
    data: int
    feature: int = 1


ENGINE_CASES = [EngineCase(name, data) for data in (2, 4) for name in ENGINES]
ENGINE_SHAPE, MICROBATCHES = (2, 64, 512, 128, 4), 2


def measure(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """(counted by call, formula by kind), in bytes per rank and token; the same on every rank."""
    mesh = mesh_of(case.data, case.feature, torch.device("cpu"))
    spec = ModelSpec(n_layers=N_LAYERS, d_model=D_MODEL, n_features=N_FEATURES, **dict(case.spec))
    model = CrossLayerTranscoder(spec, collectives=collectives_of(mesh, by_columns=case.by_columns))
    with torch.no_grad():
        for layer in model.source_layers:
            layer.b_enc.fill_(case.b_enc)
        model.tokens_since_active_LF[:, ::4] = _DEAD_AFTER if case.auxk else 0
    generator = torch.Generator().manual_seed(1 + mesh.data.rank)
    x_BLD = torch.randn(TOKENS, N_LAYERS, D_MODEL, generator=generator)
    y_BLD = model.local_columns(torch.randn(TOKENS, N_LAYERS, D_MODEL, generator=generator))
    activation = ActivationConfig(
        kind=ActivationKind(spec.kind),
        k=spec.k,
        tanh_lambda=case.tanh,
        auxk_coefficient=1 / 32 if case.auxk else 0.0,
        auxk_k=case.auxk or 1,
    )
    step = StepContext(k=spec.k, penalty_scale=1.0, dead_after_tokens=_DEAD_AFTER)
    kernels = KernelsConfig(dense_above_density=0.0 if case.dense else 1.0)
    with calls_counted() as sent:
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
        auxk=AuxK(layers=N_LAYERS, k=case.auxk, entries=N_LAYERS * case.auxk) if case.auxk else None,
        norms=2 * norms if spec.score == "decoder_norm" and spec.kind == "batchtopk" else norms,
    )
    return _per_token(sent, mesh.size, TOKENS), model_bytes(spec, shares)


def _entries(output: LossOutput) -> tuple[float, int]:
    """Entries per token, summed over all ranks, and the most of one token on one rank and layer."""
    mine = [codes for codes in output.codes if codes is not None]
    total = torch.tensor([float(sum(codes.values.numel() for codes in mine))])
    largest = torch.tensor([max((int(codes.offsets.diff().max()) for codes in mine), default=0)])
    dist.all_reduce(total)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(total) / TOKENS, int(largest)


def measure_feed(case: FeedCase) -> tuple[dict[str, float], dict[str, float]]:
    """As `measure`, for each token of the feature group's microbatch."""
    mesh = mesh_of(case.data, case.feature, torch.device("cpu"))
    partitioning = Partitioning(mesh.feature.size, mesh.feature.rank, case.by_columns)
    spread = Spread(mesh, partitioning, torch.device("cpu"))
    rows = [torch.zeros(TOKENS // case.feature, N_LAYERS, D_MODEL, dtype=torch.float16) for _ in range(2)]
    with calls_counted() as sent:
        spread(ActivationBatch(rows[0], rows[1], torch.arange(len(rows[0])), 0))
    formula = feed_bytes(N_LAYERS, D_MODEL, case.feature, by_columns=case.by_columns)
    return _per_token(sent, mesh.size, TOKENS), formula


def measure_engine(case: EngineCase) -> tuple[dict[str, float], dict[str, float]]:
    """As `measure`, for each token that a rank has in a step."""
    mesh = mesh_of(case.data, case.feature, torch.device("cpu"))
    sent, formula, tokens = bytes_sent(case.name, mesh, ENGINE_SHAPE, MICROBATCHES)
    return _per_token(Counter(sent), mesh.size, tokens), {kind: n / tokens for kind, n in formula.items()}


def _per_token(sent: Counter[str], ranks: int, tokens: int) -> dict[str, float]:
    """By call, mean over the ranks."""
    names = sorted(_gathered(sorted(sent)))
    totals = torch.tensor([sent[name] for name in names], dtype=torch.float64)
    dist.all_reduce(totals)
    return dict(zip(names, (totals / ranks / tokens).tolist(), strict=True))


def _gathered(names: list[str]) -> set[str]:
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, names)
    return {name for found in lists for name in found}


AnyCase = Case | FeedCase | EngineCase


def _measured(case: AnyCase) -> tuple[dict[str, float], dict[str, float]]:
    match case:
        case FeedCase():
            return measure_feed(case)
        case EngineCase():
            return measure_engine(case)
        case _:
            return measure(case)


def _all_measured(cases: list[AnyCase]) -> list[tuple[dict[str, float], dict[str, float]]]:
    return [_measured(case) for case in cases]


def _row(case: AnyCase, found: dict[str, float], formula: dict[str, float]) -> list[str]:
    total, expected = sum(found.values()), sum(formula.values())
    by_call = ", ".join(f"{name} {n:,.1f}" for name, n in found.items() if n >= 0.05)
    by_kind = ", ".join(f"{kind} {n:,.1f}" for kind, n in formula.items() if n >= 0.05)
    off = f"{total / expected - 1:+.1%}"
    return [case.name, f"{case.data}x{case.feature}", f"{total:,.1f}", f"{expected:,.1f}", off, by_call, by_kind]


def run_cases(cases: Sequence[AnyCase]) -> dict[AnyCase, tuple[dict[str, float], dict[str, float]]]:
    """(counted, formula) of each, in processes of their own."""
    results = {}
    for size in sorted({case.data * case.feature for case in cases}):
        ours = [case for case in cases if case.data * case.feature == size]
        results |= dict(zip(ours, in_ranks(size, _all_measured, ours), strict=True))
    return results


PARTS: list[tuple[str, str, Sequence[AnyCase]]] = [
    (
        "The model",
        f"Forward and backward pass of one microbatch, L = {N_LAYERS}, d = {D_MODEL}, F = {N_FEATURES:,}, B = {TOKENS} "
        "tokens a rank, k = 16 (relu and jumprelu: `b_enc` = -0.3; auxk: `auxk_k` = 32, a quarter of the features "
        "dead), float32. Per token of a rank's microbatch. The formula leaves out a few numbers a microbatch for "
        "losses.",
        CASES,
    ),
    (
        "The feed",
        f"Spreads the rows of a feature group's microbatch of {TOKENS} tokens, stored as float16. Per token of that.",
        FEED_CASES,
    ),
    (
        "The engines",
        f"A step, (L, d, F, tokens of a global microbatch, k) = {ENGINE_SHAPE}, {MICROBATCHES} microbatches. Per token "
        "that a rank has in a step; a step's bytes do not depend on how many these are.",
        ENGINE_CASES,
    ),
]


def main() -> int:
    """Prints tables of Markdown, or writes a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="WORD", help="cases whose name has one of these words")
    parser.add_argument("--write", metavar="FILE", help="write the page there")
    arguments = parser.parse_args()
    words = arguments.only or [""]
    parts = [(title, text, [c for c in cases if any(word in c.name for word in words)]) for title, text, cases in PARTS]
    results = run_cases([case for _, _, cases in parts for case in cases])
    header = ["case", "mesh", "counted", "formula", "off", "counted by call", "formula by kind"]
    page = [
        "# Bytes of a mesh, counted beside the formula",
        f"    {command('benchmarks.traffic')}",
        "Bytes that a rank sends, mean over the ranks, counted at the calls into torch.distributed, over gloo; the "
        "formulas of docs/parallel.md. Mesh: data x feature.",
    ]
    for title, text, cases in parts:
        if cases:
            page += [f"## {title}", text, table(header, [_row(case, *results[case]) for case in cases])]
    text = "\n\n".join(page)
    print(text)
    if arguments.write:
        write_page(arguments.write, text)
    sums = [(sum(found.values()), sum(formula.values())) for found, formula in results.values()]
    return int(any(abs(found / formula - 1) > TOLERANCE for found, formula in sums))


if __name__ == "__main__":
    sys.exit(main())
