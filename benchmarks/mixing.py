"""What mixing does to training: the same rows, in the same number, in orders that differ.

    python -m benchmarks.mixing STORE WORDS            WORDS as for `layerloom train`
    python -m benchmarks.mixing STORE WORDS --seeds 2 --write benchmarks/results/mixing.md

Orders: `store`, as Layerloom reads (rows mixed over the whole store); `chunks`, as a reader that has no windows would
give its batches: 256 rows of the text's order stay together, their chunks are mixed; `buffer`, documents one after
another through a shuffle buffer of 16,384 rows, as trainers with a contiguous buffer do; `documents`, one after another
as they stand in the text. Each order trains a model from the same initial parameters on `train.tokens` rows, which are
the same ones for all orders, and is measured on the store's held-out rows by the inference rule. The rows are held in
memory, in float32.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_store.batch import ActivationBatch
from activation_store.order import IntRows
from activation_store.progress import Progress
from activation_store.shuffle import ShuffledBatches
from activation_store.store import ActivationStore
from benchmarks.measure import command, machine, table, write_page
from launch.compose import compose_config
from launch.config import LayerloomConfig
from trainer.build import build_model
from trainer.calibrate import calibrate_thresholds
from trainer.held_out import evaluate_rows
from trainer.loss import StepContext, dead_features
from trainer.model.clt import CrossLayerTranscoder
from trainer.parallel.engine import build_engine
from trainer.rows import CalibrationRows, held_out_batches
from trainer.schedule import build_schedule, dead_after_tokens

ORDERS = ("store", "chunks", "buffer", "documents")
BUFFER_ROWS, CHUNK_ROWS = 16_384, 256
_READ_ROWS = 4_096


@dataclass(frozen=True)
class Result:
    """Held-out figures of a model, and the share of its features that had been silent for long when training ended."""

    fvu: float
    training_rule_fvu: float
    l0: float
    dead: float
    # Largest share of one document among the rows of a batch, mean over the batches.
    document_share: float


@dataclass(frozen=True)
class Rows:
    """Used rows in memory: activations (n, L, D), and each one's document; `names` are their numbers in the store."""

    mlp_in: Tensor
    mlp_out: Tensor
    documents: IntRows
    # Places of the rows in the order of the text.
    in_text: IntRows
    names: IntRows


def read_rows(store: ActivationStore) -> Rows:
    """All rows that training may use."""
    count = store.used.count
    x, y = (torch.empty(count, store.n_layers, store.d_model) for _ in range(2))
    keys: list[np.ndarray[Any, Any]] = []
    at = 0
    for start in range(0, store.n_rows, _READ_ROWS):
        stop = min(start + _READ_ROWS, store.n_rows)
        used = store.used_rows(start, stop)
        rows, mask = store[start:stop], torch.from_numpy(used)
        found = int(mask.sum())
        x[at : at + found], y[at : at + found] = rows.mlp_in[mask], rows.mlp_out[mask]
        pieces = store.read_small("pieces", start, stop)[used]
        keys.append(np.stack([rows.document_ids[mask], pieces, rows.positions[mask], start + np.flatnonzero(used)]))
        at += found
    documents, pieces, positions, names = np.concatenate(keys, axis=1)
    return Rows(x, y, documents, np.lexsort((positions, pieces, documents)), names)


def order_of(name: str, rows: Rows, store: ActivationStore, config: LayerloomConfig, seed: int) -> IntRows:
    """Places of `rows` in the order in which a model sees them, as many as are trained on."""
    rng, size = np.random.default_rng(seed), config.train.batch_size_tokens
    count = config.train.tokens // size * size
    if name == "store":
        with ShuffledBatches(
            store, batch_size_tokens=size, seed=seed, pool_rows=config.source.pool_rows, lanes=config.source.lanes,
            run_rows=config.source.run_rows, layers=store.layers[:1], decoded=False,
        ) as batches:  # fmt: skip
            seen = np.concatenate([next(batches).rows.numpy() for _ in range(count // size)])
        return np.searchsorted(rows.names, seen)
    # The rows that `store` trains on.
    chosen = np.zeros(len(rows.names), dtype=np.bool_)
    chosen[order_of("store", rows, store, config, seed)] = True
    in_text = rows.in_text[chosen[rows.in_text]]
    if name == "documents":
        return in_text
    if name == "chunks":
        chunks = [in_text[start : start + CHUNK_ROWS] for start in range(0, count, CHUNK_ROWS)]
        return np.concatenate([chunks[i] for i in rng.permutation(len(chunks))])
    return np.fromiter(through_buffer(in_text, rng), dtype=np.int64)


def through_buffer(rows: IntRows, rng: np.random.Generator) -> Iterator[int]:
    """Rows by way of a buffer: a row drawn from it makes room for the next one."""
    buffer = rows[:BUFFER_ROWS].copy()
    for row in rows[BUFFER_ROWS:]:
        place = int(rng.integers(len(buffer)))
        yield int(buffer[place])
        buffer[place] = row
    yield from rng.permutation(buffer).tolist()


def trained(name: str, rows: Rows, store: ActivationStore, config: LayerloomConfig, seed: int) -> Result:
    """A model that saw the rows in this order."""
    config = replace(config, model=replace(config.model, seed=seed))
    size, order = config.train.batch_size_tokens, order_of(name, rows, store, config, seed)
    torch.manual_seed(seed)
    model = build_model(config, store.statistics(), device=torch.device("cpu"))
    engine, schedule, dead_after = build_engine(config, model), build_schedule(config), dead_after_tokens(config)
    shares = []
    with Progress(f"{name}, seed {seed}", total=len(order), unit="tok") as progress:
        for step, places in enumerate(order.reshape(-1, size), start=1):
            shares.append(np.unique(rows.documents[places], return_counts=True)[1].max() / size)
            chosen = torch.from_numpy(places)
            batch = ActivationBatch(rows.mlp_in[chosen], rows.mlp_out[chosen], torch.from_numpy(rows.names[places]), 0)
            context = StepContext(
                k=schedule.k(step), penalty_scale=schedule.penalty_scale(step), dead_after_tokens=dead_after,
                per_token=schedule.per_token(step), lr=schedule.learning_rate(step),
            )  # fmt: skip
            loss = engine.backward(batch, context, residual=False)
            engine.update(float(engine.gradient_norm()))
            model.record_step(loss.fired, size, loss.batch_threshold_L, config.activation.threshold_decay)
            progress.advance(size)
    return measured(model, store, config, dead_after, float(np.mean(shares)))


def measured(
    model: CrossLayerTranscoder, store: ActivationStore, config: LayerloomConfig, dead_after: int, share: float
) -> Result:
    """Thresholds from training rows, then the held-out rows."""
    held_out = store.held_out()
    if held_out is None:
        raise SystemExit("the store has no held-out rows: harvest it with store.held_out_tokens")
    size, device = config.train.batch_size_tokens, torch.device("cpu")
    rows = CalibrationRows(
        store=store, n_rows=config.activation.calibration_tokens, batch_rows=size, device=device
    )  # fmt: skip
    calibrate_thresholds(model, rows, config.activation.threshold_scope.value)
    batches = held_out_batches(held_out, batch_rows=size, device=device)
    found = evaluate_rows(model, batches, mean_out_LD=store.statistics().out_mean_LD)
    dead = torch.cat(dead_features(model, dead_after)).float().mean()
    return Result(found["fvu"], found["training_rule"]["fvu"], found["l0"], float(dead), share)


def page(results: dict[str, list[Result]], store: ActivationStore, config: LayerloomConfig) -> str:
    """The table, and what it was measured on."""
    base = results[next(iter(results))]
    lines = []
    for name, found in results.items():
        fvus = ", ".join(f"{result.fvu:.4f}" for result in found)
        change = mean(result.fvu / first.fvu - 1 for result, first in zip(found, base, strict=True))
        figures = [f"{mean(values):.{digits}f}" for digits, values in (
            (4, [result.training_rule_fvu for result in found]),
            (1, [result.l0 for result in found]),
            (3, [result.dead for result in found]),
            (3, [result.document_share for result in found]),
        )]  # fmt: skip
        lines.append([name, fvus, f"{change:+.1%}", *figures])
    header = ["order", "FVU, by seed", "change", "FVU, training rule", "L0", "dead", "a document's share of a batch"]
    train, model = config.train, config.model
    return "\n".join(
        [
            "# What mixing does to training",
            "",
            f"    {command('benchmarks.mixing')}",
            "",
            f"{machine(torch.device('cpu'))}. {store!r}; {model.n_features} features a layer, {config.activation.kind} "
            f"with k = {config.activation.k}; {train.tokens:,} rows once, the same for all orders, in batches of "
            f"{train.batch_size_tokens:,}. Held-out rows, inference rule; dead: silent for "
            f"{dead_after_tokens(config):,} tokens when training ends; a document's share: the largest in a batch, "
            "mean of the batches.",
            "",
            table(header, lines),
        ]
    )


def main() -> int:
    """Prints the page, and writes it with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="folder of a harvested store with held-out rows")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as for `layerloom train`")
    parser.add_argument("--seeds", type=int, default=1, help="models for each order")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", metavar="FILE", help="write the page to this markdown file")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(options.threads)
    config = compose_config([f"store.path={options.store}", *options.words], verb="train")
    store = ActivationStore.open(options.store)
    rows = read_rows(store)
    results: dict[str, list[Result]] = {name: [] for name in options.orders}
    for seed in range(options.seeds):
        for name in options.orders:
            results[name].append(trained(name, rows, store, config, seed))
            print(name, seed, results[name][-1], file=sys.stderr, flush=True)
    text = page(results, store, config)
    print(text)
    if options.write:
        write_page(options.write, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
