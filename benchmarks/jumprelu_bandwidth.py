"""What a narrower band costs JumpReLU: one small real run for each bandwidth eps, same seed, same rows.

    python -m benchmarks.jumprelu_bandwidth STORE --write benchmarks/results/jumprelu_bandwidth.md

The gradient of theta comes from the pre-activations within eps / 2 of it: a wide band is dense (slow), a narrow one has
few entries to learn from (noisy). Each run trains the first layers of the store with the tanh penalty of the recipe and
the target-L0 penalty; b_enc is set so that L0 starts at the target. FVU is measured on held-out rows, as the run ended,
and again with one constant added to all log theta so that L0 on a training batch is the target: runs compare at equal
L0 alone. `band` is the share of all pre-activations within eps / 2 of theta, on that batch, at the start and at the
end; the time of a step is the median over the run, with the dense path where the config's rule takes it.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from activation_store.batch import ActivationBatch
from activation_store.device import resolve_device
from activation_store.shuffle import ShuffledBatches
from activation_store.statistics import ScalingStatistics
from activation_store.store import ActivationStore
from benchmarks.measure import command, machine, synchronize, table, write_page
from trainer.build import build_model
from trainer.config import (
    ActivationConfig,
    ActivationKind,
    KernelsConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from trainer.held_out import evaluate_rows
from trainer.loss import StepContext
from trainer.memory import freed_memory_kept
from trainer.model.clt import CrossLayerTranscoder
from trainer.parallel.engine import build_engine
from trainer.rows import held_out_batches
from trainer.schedule import build_schedule

_INITIAL_ROWS = 2048


@dataclass(slots=True)
class Result:
    """One run. band: share at the start and at the end. matched: FVU and L0 on held-out rows at the target's L0."""

    eps: float
    band: tuple[float, float]
    step_s: float
    fvu: float
    l0: float
    matched: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Rows:
    """The first layers of a store: statistics, shuffled training batches, held-out rows."""

    store: ActivationStore
    n_layers: int
    batch_tokens: int
    device: torch.device

    def statistics(self) -> ScalingStatistics:
        """Of these layers."""
        whole = self.store.statistics()
        names = ("in_mean_LD", "in_mean_square_LD", "out_mean_LD", "out_mean_square_LD")
        return replace(whole, **{name: getattr(whole, name)[: self.n_layers] for name in names})

    def batches(self) -> Iterator[ActivationBatch]:
        """The same ones at every call, without end."""
        with ShuffledBatches(self.store, batch_size_tokens=self.batch_tokens) as whole:
            for batch in whole:
                x_BLD, y_BLD = (rows[:, : self.n_layers].contiguous() for rows in (batch.mlp_in, batch.mlp_out))
                yield replace(batch, mlp_in=x_BLD, mlp_out=y_BLD)

    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        """mlp_in and mlp_out, in batches."""
        rows = self.store.held_out()
        if rows is None:
            raise SystemExit(
                f"store {self.store.path} has no held-out rows; harvest with store.held_out_tokens above 0"
            )
        found = held_out_batches(rows, batch_rows=self.batch_tokens, device=self.device)
        return [(x[:, : self.n_layers].contiguous(), y[:, : self.n_layers].contiguous()) for x, y in found]


def run_config(options: argparse.Namespace, eps: float) -> RunConfig:
    """The recipe's JumpReLU, held at an L0."""
    activation = ActivationConfig(
        kind=ActivationKind.jumprelu,
        bandwidth=eps,
        threshold_init=options.threshold,
        tanh_lambda=options.tanh_lambda,
        l0_lambda=options.l0_lambda,
        l0_target=float(options.k * options.layers),
        auxk_coefficient=0.0,
        penalty_ramp_fraction=0.2,
    )
    return RunConfig(
        model=ModelConfig(n_features=options.n_features, initial_density=options.k / options.n_features),
        activation=activation,
        optim=OptimConfig(lr=options.lr),
        train=TrainConfig(tokens=options.tokens, batch_size_tokens=options.batch),
        kernels=KernelsConfig(),
    )


def train(config: RunConfig, rows: Rows, l0_target: float) -> Result:
    """One run, through the engine, as `trainer.loop` does it."""
    first = next(rows.batches())
    initial = first.mlp_in[:_INITIAL_ROWS].to(rows.device)
    statistics = rows.statistics()
    model = build_model(config, statistics, device=rows.device, initial_rows_BLD=initial)
    engine, schedule, eps = build_engine(config, model), build_schedule(config), config.activation.bandwidth
    seconds, band = [], band_share(model, initial, eps)
    batches = rows.batches()
    for n in range(1, schedule.total_steps + 1):
        batch = next(batches)
        context = StepContext(
            k=1, penalty_scale=schedule.penalty_scale(n), dead_after_tokens=2**62, lr=schedule.learning_rate(n)
        )
        start = time.perf_counter()
        loss = engine.backward([batch], context)
        engine.update(float(engine.gradient_norm()))
        model.record_step(loss.fired, rows.batch_tokens)
        synchronize(rows.device)
        seconds.append(time.perf_counter() - start)
    batches.close()  # type: ignore[attr-defined]
    ended = _evaluate(model, rows, statistics)
    band_end = band_share(model, initial, eps)
    match_l0(model, initial, l0_target)
    matched = _evaluate(model, rows, statistics)
    return Result(eps, (band, band_end), median(seconds), ended["fvu"], ended["l0"], (matched["fvu"], matched["l0"]))


def _evaluate(model: CrossLayerTranscoder, rows: Rows, statistics: ScalingStatistics) -> dict[str, Any]:
    return evaluate_rows(model, rows.held_out(), mean_out_LD=statistics.out_mean_LD.to(rows.device))


@torch.no_grad()
def band_share(model: CrossLayerTranscoder, mlp_in_BLD: Tensor, eps: float) -> float:
    """Share of all pre-activations within eps / 2 of theta."""
    shares = [
        ((model.pre_activations(s, x_BD) - model.inference_threshold(s)).abs_() < eps / 2).float().mean()
        for s, x_BD in enumerate(mlp_in_BLD.unbind(1))
    ]
    return float(torch.stack(shares).mean())


@torch.no_grad()
def match_l0(model: CrossLayerTranscoder, mlp_in_BLD: Tensor, l0_target: float) -> None:
    """Adds one constant to all log theta, so that on these rows the total L0 is the target's."""

    def l0() -> float:
        return sum(float(model.encode_layer(s, x_BD).l0()) for s, x_BD in enumerate(mlp_in_BLD.unbind(1)))

    def shift(by: float) -> None:
        for layer in model.source_layers:
            layer.log_threshold.add_(by)  # type: ignore[union-attr]

    step = 4.0
    shift(-step)
    for _ in range(24):
        shift(step)
        # Up while too many are active; the last place where they were, then half as far.
        if l0() <= l0_target:
            shift(-step)
            step /= 2


def page(results: list[Result], options: argparse.Namespace, device: torch.device) -> str:
    """The markdown."""
    table_rows = [
        [
            f"{r.eps:g}",
            f"{100 * r.band[0]:.1f}% / {100 * r.band[1]:.1f}%",
            f"{r.step_s * 1e3:.0f}",
            f"{r.fvu:.4f} at {r.l0:.1f}",
            f"{r.matched[0]:.4f} at {r.matched[1]:.1f}",
        ]
        for r in results
    ]
    header = [
        "eps",
        "band, start / end",
        "ms a step",
        "FVU at L0, as trained",
        "FVU at L0, theta shifted to the target",
    ]
    sections = [
        "# What JumpReLU's bandwidth costs",
        f"    {command('benchmarks.jumprelu_bandwidth')}",
        f"First {options.layers} layers of the store, F = {options.n_features:,}, {options.tokens:,} tokens in batches "
        f"of {options.batch}, target L0 {options.k * options.layers} in all, theta0 {options.threshold:g}, lr "
        f"{options.lr:g}, tanh penalty {options.tanh_lambda:g}, one seed. FVU by the inference rule on the "
        f"store's held-out rows. Conditions: {machine(device)}.",
        table(header, table_rows),
    ]
    return "\n\n".join(sections)


def main() -> None:
    """Trains one run for each eps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a harvested store with held-out rows")
    parser.add_argument("--eps", nargs="*", type=float, default=[1.0, 0.3, 0.1, 0.03])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--n-features", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16, help="target L0 per layer")
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--tanh-lambda", type=float, default=2.5)
    parser.add_argument("--l0-lambda", type=float, default=10.0)
    parser.add_argument("--threshold", type=float, default=0.5, help="theta0")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", metavar="FILE", help="also write the markdown there")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, store = resolve_device(options.device), ActivationStore.open(options.store)
    if options.layers > store.n_layers:
        raise SystemExit(f"--layers={options.layers}, but the store has {store.n_layers}; use at most that many")
    rows, results = Rows(store, options.layers, options.batch, device), []
    for eps in options.eps:
        with freed_memory_kept(device):
            results.append(train(run_config(options, eps), rows, float(options.k * options.layers)))
        print(results[-1], flush=True)
    text = page(results, options, device)
    print(f"\n{text}")
    if options.write:
        write_page(options.write, text)


if __name__ == "__main__":
    main()
