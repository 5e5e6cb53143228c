"""Rules across configs that need nothing but the config: checked before a verb reads or writes anything.

Pure. Each function below is one group's rules and yields one line for each rule that is broken: what was given, what is
wanted, what to do. The rules of a training run are `trainer.rules`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from activation_store.config import SourceKind
from activation_store.errors import UserError
from launch.config import LayerloomConfig
from launch.verbs import VERBS
from trainer.rules import check_run_config

Rule = Callable[[LayerloomConfig], Iterator[str]]


def validate(config: LayerloomConfig, verb: str) -> None:
    """Raises UserError with the first rule that `config` breaks, among those of the groups that `verb` reads."""
    groups = set(VERBS[verb].groups)
    for needed, rule in _RULES:
        if needed <= groups:
            for problem in rule(config):
                raise UserError(problem)
    if verb == "harvest" and config.source.kind is SourceKind.live:
        raise UserError("source=live needs no harvest: layerloom train source=live runs the subject itself")
    for problem in _paths(config, verb):
        raise UserError(problem)


def _text(config: LayerloomConfig) -> Iterator[str]:
    text = config.text
    if text.context_length < 2:
        yield f"text.context_length={text.context_length} must be at least 2: position 0 is not trained on"
    if text.held_out_documents == 0 and config.store.held_out_tokens > 0:
        yield (
            f"store.held_out_tokens={config.store.held_out_tokens} with text.held_out_documents=0: hold out some "
            "documents, or set store.held_out_tokens=0 for no evaluation during training"
        )
    for source in text.sources:
        if not source.path:
            yield "text.sources: a source has no path; give each one {path: ..., weight: ...}"
        elif not source.weight > 0:
            yield f"text.sources: {source.path} has weight={source.weight}; want a number above 0, or leave it out"
    yield from _at_least(text, "text", {"held_out_documents": 0, "contexts_per_document": 0})
    yield from _at_least(text, "text", {"documents_per_block": 1, "shuffle_buffer": 1})


def _store(config: LayerloomConfig) -> Iterator[str]:
    store = config.store
    yield from _at_least(store, "store", {"tokens": 1, "held_out_tokens": 0, "layer_start": 0})
    yield from _at_least(store, "store", {"chunk_rows": 1, "batch_contexts": 1, "window_bytes": 1})
    if store.claim_seconds <= 0:
        yield f"store.claim_seconds={store.claim_seconds} must be greater than 0; 20 suits most file systems"
    if store.layer_stop is not None and store.layer_stop <= store.layer_start:
        yield (
            f"store.layer_stop={store.layer_stop} must be greater than store.layer_start={store.layer_start}; "
            "null means up to the last layer"
        )
    if store.shard_rows < 1 or store.shard_rows % max(store.chunk_rows, 1):
        wanted = max(1, round(store.shard_rows / max(store.chunk_rows, 1))) * store.chunk_rows
        yield f"store.shard_rows={store.shard_rows} is no multiple of store.chunk_rows={store.chunk_rows}; use {wanted}"
    if store.outlier_factor <= 1:
        yield f"store.outlier_factor={store.outlier_factor} must be greater than 1: it multiplies the mean norm"


def _train(config: LayerloomConfig) -> Iterator[str]:
    check_run_config(config)
    yield from ()


def _eval(config: LayerloomConfig) -> Iterator[str]:
    from trainer.evaluation.evaluate import check_eval_config  # imports torch

    if config.sweep.evaluate:
        check_eval_config(config.eval, config)
    yield from ()


def _launch(config: LayerloomConfig) -> Iterator[str]:
    yield from _at_least(config.launch, "launch", {"threads": 0})


def _sweep(config: LayerloomConfig) -> Iterator[str]:
    if config.source.kind is not SourceKind.disk:
        yield (
            f"source.kind={config.source.kind}: the points of a sweep share one store on disk; harvest it and use "
            "source=disk"
        )


def _tune(config: LayerloomConfig) -> Iterator[str]:
    tune = config.tune
    yield from _at_least(tune, "tune", {"n_layers": 0, "d_model": 0})
    if (tune.n_layers == 0) != (tune.d_model == 0):
        yield f"tune.n_layers={tune.n_layers}, tune.d_model={tune.d_model}: give both, or neither for the store's"
    if tune.seconds <= 0:
        yield f"tune.seconds={tune.seconds} must be greater than 0"


def _paths(config: LayerloomConfig, verb: str) -> Iterator[str]:
    """The folders that a verb reads and writes must not be one another."""
    groups, keys = VERBS[verb].groups, VERBS[verb].keys
    folders = {"run": config.run, "output": config.output}
    used = {key: value for key, value in folders.items() if key in keys}
    if "store" in groups:
        used["store.path"] = config.store.path
    for key, value in used.items():
        if not value.strip():
            yield f"{key} is empty; give a folder"
        for other, taken in used.items():
            if other < key and Path(value).resolve() == Path(taken).resolve():
                yield f"{other} and {key} are both {value}; give two folders"


def _at_least(group_config: object, group: str, lowest: dict[str, int]) -> Iterator[str]:
    for name, low in lowest.items():
        value = getattr(group_config, name)
        if value < low:
            yield f"{group}.{name}={value} must be at least {low}"


# Groups that a verb must read for a rule to matter to it.
_RULES: tuple[tuple[set[str], Rule], ...] = (
    ({"text"}, _text),
    ({"store"}, _store),
    ({"launch"}, _launch),
    ({"tune"}, _tune),
    ({"train"}, _train),
    ({"sweep"}, _sweep),
    ({"text", "eval"}, _eval),
)
