"""What a storage dtype costs: bytes, the error of the round trip, and a CLT trained on it against one on float32.

    python -m benchmarks.store_dtypes FOLDER                            the demo's job, once for each dtype
    python -m benchmarks.store_dtypes FOLDER --tokens 4000 --steps 8 activation.k=8 store.layer_stop=2   to try

Harvests a float32 store of the default subject once and re-encodes its rows, in their order, to each dtype; trains a
run on each store with the same config and seeds, and evaluates it with the subject itself (`layerloom evaluate`), so
that only what training saw differs. The last row is float32 trained from another `model.seed`: how large a difference
without a cause is. Further words are overrides of the command line's. What is in FOLDER is used again.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activation_store.codec import decode, encode
from activation_store.config import StoreDtype
from activation_store.harvest import harvest
from activation_store.layout import create_zarr
from activation_store.manifest import COMPLETE, HARVESTING, HELD_OUT, MANIFEST, Commit, StoreManifest, read_commits
from activation_store.storage import LocalStorage
from activation_store.store import ActivationStore
from activation_store.windows import WindowRecord
from activation_store.writer import StoredRows, WindowRows, WindowWriter
from benchmarks.measure import command, machine, table, write_page
from launch.compose import compose_config
from launch.config import LayerloomConfig
from trainer.evaluation.evaluate import evaluate
from trainer.train import train

STEP_ROWS = 1_024
NAMES = ("mlp_in", "mlp_out")


def reencode(source: Path, target: Path, dtype: StoreDtype) -> None:
    """The rows of a float32 store in the same order and windows, in another dtype."""
    store, manifest = ActivationStore.open(source), StoreManifest.load(source)
    manifest.dtype, manifest.status = dtype, HARVESTING
    manifest.config["store"]["dtype"] = dtype.value
    manifest.save(target)
    writer, first = WindowWriter(target, LocalStorage(target), manifest), 0
    for commit in read_commits(source):
        window = WindowRows(manifest.layout, commit.rows)
        for start in range(first, first + commit.rows, STEP_ROWS):
            stop = min(start + STEP_ROWS, first + commit.rows)
            rows = store[start:stop]
            pieces = torch.from_numpy(store.read_small("pieces", start, stop))
            encoded = (encode(getattr(rows, name), dtype) for name in NAMES)
            window.append(StoredRows(*encoded, rows.token_ids, rows.document_ids, rows.positions, pieces))
        names = {document.index: document.name for document in commit.documents}
        writer.write(window, np.arange(commit.rows), _record(commit, first), names)
        first += commit.rows
    again = ActivationStore(target, manifest, [(start, rows) for start, rows in manifest.blocks])
    manifest.statistics, manifest.outlier_rows = again.compute_statistics()
    again.used.save(target)
    create_zarr(target, manifest.layout, sum(manifest.blocks[-1]))
    manifest.status = COMPLETE
    manifest.save(target)


def _record(commit: Commit, rows_before: int) -> WindowRecord:
    """A window's record as its commit tells it; where the next one begins is not needed."""
    return WindowRecord(
        window=commit.window, block=commit.first_block, context=commit.first_context, contexts=commit.contexts,
        next_block=commit.first_block, next_context=0, start_row=commit.start_row, rows=commit.rows,
        rows_before=rows_before, last=False,
    )  # fmt: skip


def used_parts(store: ActivationStore) -> Iterator[tuple[Tensor, Tensor]]:
    """mlp_in and mlp_out of the rows that training uses."""
    for start in range(0, store.n_rows, STEP_ROWS):
        stop = min(start + STEP_ROWS, store.n_rows)
        rows, used = store[start:stop], torch.from_numpy(store.used_rows(start, stop))
        yield rows.mlp_in[used], rows.mlp_out[used]


def round_trip_fvu(store: ActivationStore, dtype: StoreDtype) -> dict[str, Tensor]:
    """Residual over centred sum of squares, by layer, of what `dtype` keeps of a float32 store's used rows."""
    statistics = store.statistics()
    means = {"mlp_in": statistics.in_mean_LD, "mlp_out": statistics.out_mean_LD}
    sums = {name: torch.zeros(2, store.n_layers, dtype=torch.float64) for name in NAMES}
    for parts in used_parts(store):
        for name, x_BLD in zip(NAMES, parts, strict=True):
            residual = decode(encode(x_BLD, dtype)).double() - x_BLD
            sums[name][0] += residual.square().sum((0, 2))
            sums[name][1] += (x_BLD - means[name]).square().sum((0, 2))
    return {name: residual / total for name, (residual, total) in sums.items()}


def trained(config: LayerloomConfig, folder: Path, dtype: StoreDtype, *, seed: int | None = None) -> dict[str, Any]:
    """The evaluation of a run on the store of a dtype; of one from another `model.seed`, if given."""
    store = replace(config.store, path=str(folder / "stores" / dtype.value), dtype=dtype)
    name, model = dtype.value, config.model
    if seed is not None:
        name, model = f"{name}_seed_{seed}", replace(config.model, seed=seed)
    run = replace(config, store=store, model=model, run=str(folder / "runs" / name))
    train(run)
    return evaluate(run.run, config.eval, show_table=False)


def row(name: str, store: ActivationStore, now: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """Bytes of a token, and what training on them gave; differences are from float32."""
    size = sum(a.row_bytes * a.chunks_abreast for a in store.layout.arrays() if a.name.startswith(NAMES))
    replaced = [
        f"{now['replacement'][key]:.4f} ({now['replacement'][key] - base['replacement'][key]:+.4f})"
        for key in ("ce_recovered", "kl", "top1_agreement")
    ]
    return [name, f"{size:,}", f"{now['fvu']:.4f} ({now['fvu'] - base['fvu']:+.4f})", *replaced]


def page(
    exact: ActivationStore, rows: list[list[str]], errors: dict[str, dict[str, Tensor]], base: dict[str, Any]
) -> str:
    """The results as markdown. `errors`: FVU of the round trip by dtype, array and layer."""
    header = ["dtype", "bytes per token", "FVU", "CE recovered", "KL", "top-1 agreement"]
    uncertain = ", ".join(
        f"{name} {value:.4f}"
        for name, value in [("FVU", base["fvu_se"])]
        + [(key, base["replacement"][f"{key}_se"]) for key in ("ce_recovered", "kl", "top1_agreement")]
    )
    by_layer = [
        [f"{dtype}, {name}", *(f"{float(error):.1e}" for error in parts[name])]
        for dtype, parts in errors.items()
        for name in NAMES
    ]
    return "\n".join(
        [
            "# What a storage dtype costs",
            "",
            f"    {command('benchmarks.store_dtypes')}",
            "",
            f"{machine(torch.device('cpu'))}. {exact!r}; evaluated on {base['tokens']:,} tokens of {base['documents']} "
            "held-out documents.",
            f"Standard errors of float32's figures over documents: {uncertain}.",
            "",
            table(header, rows),
            "",
            "FVU of the round trip (what the dtype alone loses of the rows that training uses), by layer:",
            "",
            table(["", *(str(layer) for layer in exact.layers)], by_layer),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, help="store.tokens")
    parser.add_argument("--steps", type=int, help="training steps; default: the config's train.tokens")
    parser.add_argument("--dtype", type=StoreDtype, action="append", help="repeatable; default: all")
    parser.add_argument("--write", help="the page's file; default: printed")
    parser.add_argument("overrides", nargs="*", help="such as store.layer_stop=6")
    arguments = parser.parse_intermixed_args()
    folder = arguments.folder
    config = compose_config([*arguments.overrides, "train.checkpoint_every=0"])
    if arguments.tokens:
        config.store.tokens = arguments.tokens
    if arguments.steps:
        config.train.tokens = arguments.steps * config.train.batch_size_tokens
    config.store.dtype = StoreDtype.float32
    config.store.path = str(folder / "stores" / "float32")
    harvest(config.subject, config.text, config.store, device=config.device)
    exact = ActivationStore.open(config.store.path)
    base = trained(config, folder, StoreDtype.float32)
    rows: list[list[str]] = []
    errors: dict[str, dict[str, Tensor]] = {}
    for dtype in arguments.dtype or list(StoreDtype):
        target = folder / "stores" / dtype.value
        for part in (HELD_OUT, "."):
            if (exact.path / part / MANIFEST).exists() and not (target / part / MANIFEST).exists():
                reencode(exact.path / part, target / part, dtype)
        now = base if dtype is StoreDtype.float32 else trained(config, folder, dtype)
        rows.append(row(dtype.value, ActivationStore.open(target), now, base))
        errors[dtype.value] = round_trip_fvu(exact, dtype)
    again = trained(config, folder, StoreDtype.float32, seed=config.model.seed + 1)
    rows.append(row("float32, another seed", exact, again, base))
    text = page(exact, rows, errors, base)
    print(text)
    if arguments.write:
        write_page(arguments.write, text)


if __name__ == "__main__":
    main()
