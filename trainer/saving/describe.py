"""`layerloom checkpoint info`: what a checkpoint holds and how it came to be, on one page."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from activation_store.errors import UserError
from activation_store.places import Place
from activation_store.progress import counted, human_bytes, human_count, layer_range
from trainer.saving.examine import read_state
from trainer.saving.index import KINDS, TensorEntry, files_of
from trainer.saving.reader import read_index
from trainer.tensor_file import DTYPE_NAMES


def checkpoint_info(path: Place) -> str:
    """A page about a checkpoint. Raises UserError if its state.json cannot be used; other files are not checked."""
    problem, state = read_state(path)
    if problem is not None:
        raise UserError(
            f"checkpoint {path}: {problem.text}; look at an older one, or `layerloom checkpoint verify {path}`"
        )
    index = read_index(path)
    total = sum(file["bytes"] for file in state["files"].values())
    lines = [
        f"checkpoint  {path} (format {state['format_version']})",
        f"step        {state['step']:,}, {counted(state.get('tokens', 0), 'token')}",
        *_written_by(state),
        *_model(state),
        f"on disk     {human_bytes(total)} in {counted(len(state['files']), 'file')}",
    ]
    lines += [f"{kind:<12}{_summary(index[kind])}, {counted(len(files_of(index, [kind])), 'file')}" for kind in KINDS]
    for kind in KINDS:
        lines += ["", f"tensors of the {kind}", *_table(index[kind])]
    if "config" in state:
        lines += [
            "",
            "config",
            *(f"  {line}" for line in yaml.safe_dump(state["config"], sort_keys=False).splitlines()),
        ]
    return "\n".join(lines)


def _written_by(state: Mapping[str, Any]) -> list[str]:
    lines = []
    if by := state.get("written_by"):
        split = f", decoder_split={by['decoder_split']}" if by["feature"] > 1 else ""
        lines.append(
            f"written by  {counted(by['data'] * by['feature'], 'process', 'processes')}, parallel.data={by['data']} "
            f"parallel.feature={by['feature']}{split}, engine={by['engine']}"
        )
    if environment := state.get("environment"):
        versions = ", ".join(f"{name} {value}" for name, value in environment["versions"].items())
        lines += [
            f"            {environment['hardware']}, {counted(environment['threads'], 'thread')}",
            f"            {versions}",
        ]
    return lines


def _model(state: Mapping[str, Any]) -> list[str]:
    if "spec" not in state:
        return []
    spec, layers = state["spec"], state["layers"]
    calibrated = state["calibrated_step"]
    subject = f"{state['subject']['path']}, {layer_range(layers)}"
    return [
        f"model       {spec['kind']}, {spec['span']}, {counted(spec['n_layers'], 'layer')} of {spec['d_model']}, "
        f"{spec['n_features']:,} features each",
        f"            thresholds {'not calibrated' if calibrated is None else f'calibrated at step {calibrated:,}'}",
        f"subject     {subject}",
    ]


def _summary(entries: Mapping[str, TensorEntry]) -> str:
    """Tensors, numbers and bytes, with the bytes of each dtype."""
    by_dtype: Counter[str] = Counter()
    for entry in entries.values():
        by_dtype[DTYPE_NAMES[entry.dtype]] += entry.n_bytes
    dtypes = ", ".join(f"{name} {human_bytes(size)}" for name, size in by_dtype.most_common())
    numbers = human_count(sum(entry.n_values for entry in entries.values()))
    return f"{len(entries)} tensors, {numbers} numbers, {human_bytes(by_dtype.total())} ({dtypes})"


def _table(entries: Mapping[str, TensorEntry]) -> list[str]:
    width = max((len(name) for name in entries), default=0)
    return [
        f"  {name:<{width}}  {DTYPE_NAMES[entry.dtype]:<4}  {human_bytes(entry.n_bytes):>8}  {list(entry.shape)}"
        + (f" in {len(entry.chunks)} parts" if len(entry.chunks) > 1 else "")
        for name, entry in entries.items()
    ]
