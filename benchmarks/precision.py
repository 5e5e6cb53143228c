"""What the precisions of parameters and optimizer states cost in loss, and what they save in memory.

    python -m benchmarks.precision                                     about ten minutes on two cores, without a hub
    python -m benchmarks.precision --work DIR train.tokens=40000       shorter; words are those of `layerloom train`
    python -m benchmarks.precision --work DIR store.path=STORE WORDS   on a store that is there (WORDS as it was made)
    python -m benchmarks.precision --only fp32 "8-bit states" --write docs/precision.md

Harvests once (the first six layers of the bundled subject, as preset=bench_smollm2_6l does but fewer tokens), then
trains one run per option, each in a process of its own: same store, batches, seed and initial parameters. A run from
other initial parameters shows how far two runs in float32 are apart. Peak memory is what a process that has
trained a few steps already adds to its resident set (on CUDA: to the allocator) from before its model is built to the
end of training, its last evaluation and checkpoint included. Runs that are done are not repeated: the same
command continues.
"""

import argparse
import copy
import gc
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.measure import PeakMemory, command, machine, table, write_page
from launch.compose import compose_config
from launch.config import LayerloomConfig
from trainer.build import checkpoint_bytes, model_spec, table_bytes, table_rows
from trainer.metrics import read_metrics

PRESET = [
    "preset=bench_smollm2_6l",
    "store.tokens=74000",
    "store.held_out_tokens=4096",
    "model.n_features=1024",
    "train.tokens=65536",
    "train.batch_size_tokens=512",
    "train.eval_every=0",
    "train.checkpoint_every=0",
]
NO_MASTER = ["optim.param_dtype=bf16", "optim.master=none"]
# Name -> words. The first is what the others are compared with.
OPTIONS: dict[str, list[str]] = {
    "fp32": [],
    "fp32, another seed": ["model.seed=1"],
    "bf16 products": ["train.precision=bf16"],
    "bf16 states": ["optim.state_dtype=bf16"],
    "8-bit states": ["optim.state_dtype=int8"],
    "bf16 parameters, fp32 master": ["optim.param_dtype=bf16"],
    "bf16 parameters": NO_MASTER,
    "bf16 parameters and states": [*NO_MASTER, "optim.state_dtype=bf16"],
    "bf16 parameters, 8-bit states": [*NO_MASTER, "optim.state_dtype=int8"],
}
# Of the steps, at the end: over them the training loss is averaged.
LAST_SHARE = 0.1
# Of the run that warms a process up: a small model, of which little memory stays.
WARM_STEPS, WARM_FEATURES = 4, 128


@dataclass(frozen=True)
class Result:
    """One run: the process's peak, its seconds, the held-out evaluation, and the mean training loss at the end."""

    peak_mib: float
    seconds: float
    fvu: float
    l0: float
    loss: float


def main() -> int:
    """Prints the table, and writes it with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as for `layerloom train`, for every run")
    parser.add_argument("--work", default="runs/precision", help="folder of the store and the runs")
    parser.add_argument("--only", nargs="+", metavar="OPTION", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--write", metavar="FILE", help="write the table to this markdown file")
    parser.add_argument("--child", choices=list(OPTIONS), help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    work = Path(options.work)
    if options.child:
        print(json.dumps(run_one(compose(options.child, work, options.words))))
        return 0
    harvest(compose("fp32", work, options.words))
    names = [name for name in OPTIONS if name in {"fp32", *options.only}]
    results = {name: in_a_process(name, work, options.words, torch.get_num_threads()) for name in names}
    text = page(results, work, options.words)
    print(text)
    if options.write:
        write_page(options.write, text)
    return 0


def compose(name: str, work: Path, words: list[str]) -> LayerloomConfig:
    """The config of one option's run."""
    run = work / name.replace(",", "").replace(" ", "_")
    places = [f"store.path={work / 'store'}", f"run={run}"]
    return compose_config([*PRESET, "train.log_every=1", *places, *words, *OPTIONS[name]], verb="train")


def harvest(config: LayerloomConfig) -> None:
    """The store, unless it is there."""
    from activation_store.harvest import harvest as run_harvest

    run_harvest(config.subject, config.text, config.store, device=config.device)


def run_one(config: LayerloomConfig) -> dict[str, float]:
    """Trains in this process; peak and seconds. Before that a few steps of a small run: what is compiled, read or
    allocated once is there then, whichever option runs first on a machine."""
    from activation_store.device import resolve_device
    from trainer.train import train

    with tempfile.TemporaryDirectory() as folder:
        warm = copy.deepcopy(config)
        warm.run, warm.train.tokens = str(Path(folder) / "warm"), WARM_STEPS * config.train.batch_size_tokens
        warm.model.n_features = WARM_FEATURES
        train(warm)
    gc.collect()
    memory = PeakMemory(resolve_device(config.device))
    memory.start()
    start = time.perf_counter()
    train(config)
    return {"peak_mib": memory.added_mib(), "seconds": time.perf_counter() - start}


def in_a_process(name: str, work: Path, words: list[str], threads: int) -> Result:
    """The run of one option in a process of its own, unless it is done."""
    config = compose(name, work, words)
    done = Path(config.run) / "precision.json"
    if not done.is_file():
        arguments = ["--child", name, "--work", str(work), "--threads", str(threads), *words]
        child = [sys.executable, "-m", "benchmarks.precision", *arguments]
        output = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
        done.write_text(output.splitlines()[-1] + "\n", encoding="utf-8")
    measured: dict[str, float] = json.loads(done.read_text(encoding="utf-8"))
    records = list(read_metrics(Path(config.run) / "metrics.jsonl"))
    losses = [record["loss"] for record in records if "loss" in record]
    held_out: dict[str, Any] = [record["eval"] for record in records if "eval" in record][-1]
    last = losses[-max(1, round(LAST_SHARE * len(losses))) :]
    return Result(**measured, fvu=held_out["fvu"], l0=held_out["l0"], loss=mean(last))


def page(results: dict[str, Result], work: Path, words: list[str]) -> str:
    """The table, with what it was measured on."""
    from activation_store.store import ActivationStore

    config = compose("fp32", work, words)
    store = ActivationStore.open(config.store.path)
    header = ["option", "weights", "master", "moments", "bytes a parameter", "checkpoint MB", "peak MiB", "s"]
    header += ["FVU", "FVU - fp32", "L0", "loss", "loss / fp32 - 1"]
    first = results["fp32"]
    rows = []
    for name, result in results.items():
        each = compose(name, work, words)
        spec = model_spec(each.model, each.activation, store.n_layers, store.d_model)
        values = table_rows(spec) * spec.d_model
        stored = table_bytes(spec, each.optim)
        sizes = [stored.weights / values, stored.master / values, stored.moments / values]
        rows.append(
            [
                name,
                *(f"{size:.2f}" for size in (*sizes, sum(sizes))),
                f"{checkpoint_bytes(spec, each.optim) / 1e6:.0f}",
                f"{result.peak_mib:.0f}",
                f"{result.seconds:.0f}",
                f"{result.fvu:.4f}",
                f"{result.fvu - first.fvu:+.4f}",
                f"{result.l0:.1f}",
                f"{result.loss:.1f}",
                f"{result.loss / first.loss - 1:+.2%}",
            ]
        )
    train, model = config.train, config.model
    lines = [
        "# Precision: memory and loss",
        "",
        f"`{command('benchmarks.precision')}` on {machine(torch.device('cpu'))}.",
        "",
        f"{store.n_layers} layers of width {store.d_model}, {model.n_features} features a layer, "
        f"{config.activation.kind} with k = {config.activation.k}; {train.tokens} tokens in batches of "
        f"{train.batch_size_tokens}. Weights, master and moments: bytes of each parameter of W_enc and W_dec "
        "(gradients take 4 more). Peak: what the process added while it trained, after a short run that compiles, the "
        "shuffled pool of rows included. "
        f"FVU and L0: held-out rows, inference rule, at the end. Loss: of training, mean of the last {LAST_SHARE:.0%} "
        "of steps.",
        "",
        table(header, rows),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
