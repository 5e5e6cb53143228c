"""`layerloom store info`: what a store holds and how it came to be, on one page."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from activation_store.completion import SourceCounts
from activation_store.manifest import Commit, StoreManifest, read_commits
from activation_store.places import Place
from activation_store.progress import counted, human_bytes, layer_range
from activation_store.store import ActivationStore
from activation_store.verify import store_folders


@dataclass(slots=True)
class _Totals:
    """Of all commits, which are not held: there may be many."""

    windows: int = 0
    rows: int = 0
    documents: set[int] = field(default_factory=set)
    files: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    sources: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, commits: Iterable[Commit], manifest: StoreManifest) -> "_Totals":
        total, sources = cls(), SourceCounts()
        for commit in commits:
            total.windows += 1
            total.rows += commit.rows
            total.documents.update(document.index for document in commit.documents)
            for key, record in commit.files.items():
                total.files[key.split("/")[0]] += 1
                total.sizes[key.split("/")[0]] += record.bytes
            sources.add(commit)
        if manifest.text.get("sources"):
            total.sources = sources.listed()
        return total


def store_info(path: Place | str) -> str:
    """A page about a store, complete or not. Raises UserError if `path` is not a store."""
    store = ActivationStore.open(path, allow_incomplete=True)
    total = _Totals.of(read_commits(store.path), store.manifest)
    lines = [*_described(store, total), *_made(store, total), *_scaled(store)]
    for folder in store_folders(path)[1:]:
        held_out = ActivationStore.open(folder, allow_incomplete=True)
        lines.append(f"held out    {held_out.manifest.status}, {counted(held_out.n_rows, 'row')} in {folder.name}/")
    return "\n".join(lines)


def _described(store: ActivationStore, total: _Totals) -> list[str]:
    m = store.manifest
    rows = f"{store.n_rows:,} in {counted(total.windows, 'window')}, {counted(len(total.documents), 'document')}"
    kind, _, numbers = layer_range(m.layers).partition(" ")
    return [
        f"store       {store.path} ({m.status}, format {m.format_version})",
        f"rows        {rows}, {human_bytes(store.n_rows * store.layout.row_bytes)}",
        *_on_disk(total, m.compression.value),
        f"arrays      mlp_in, mlp_out (rows, {counted(len(m.layers), 'layer')}, {m.d_model}) {m.dtype.value}",
        f"{kind:<12}{numbers}, {m.input_hook} -> mlp_out",
    ]


def _on_disk(total: _Totals, compression: str) -> list[str]:
    """Files and bytes of each array, as committed."""
    whole = f"{human_bytes(total.sizes.total())} in {counted(total.files.total(), 'shard')}, compression {compression}"
    arrays = ", ".join(f"{name} {human_bytes(size)}" for name, size in total.sizes.most_common())
    return [f"on disk     {whole}", *([f"            {arrays}"] if arrays else [])]


def _made(store: ActivationStore, total: _Totals) -> list[str]:
    m = store.manifest
    return [
        f"subject     {m.subject['path']} ({m.subject['architecture']}, {m.subject['dtype']})",
        f"            {m.subject['provenance']}",
        *_texts(m),
        *_sources(m, total),
        "made with   " + ", ".join(f"{name} {value}" for name, value in m.provenance.items()),
    ]


def _texts(m: StoreManifest) -> list[str]:
    """The text, or those of a merged store with the rows and documents of each."""
    contexts = f"contexts of {m.text['context_length']} tokens"
    if "merged" not in m.config:
        sources = m.text.get("sources")
        what = f"a mixture of {counted(len(sources), 'source')}" if sources else m.text["path"]
        return [f"text        {what}, {contexts}, seed {m.text['seed']}"]
    lines = [f"text        {len(m.config['merged'])} sources, merged; {contexts}"]
    for source in m.config["merged"]:
        share = source["rows"] / max(1, m.rows)
        counts = f"{counted(source['rows'], 'row')} ({share:.1%}), {counted(source['documents'], 'document')}"
        lines.append(f"            {source['text']['path']}, seed {source['text']['seed']}: {counts}")
    return lines


def _sources(m: StoreManifest, total: _Totals) -> list[str]:
    """Rows and documents of each source of a mixture, as committed so far; what became of chats' special tokens."""
    lines = [
        f"            {source['label']}: {counted(source['rows'], 'row')} ({source['rows'] / max(1, total.rows):.1%}), "
        f"{counted(source['documents'], 'document')}"
        for source in total.sources
    ]
    if m.text.get("chat") or any(source["chat"] for source in m.text.get("sources", [])):
        done = "kept" if m.text["chat_special_tokens"] == "keep" else "masked"
        lines.append(f"            chats by the subject's template, special tokens {done}")
    return lines


def _scaled(store: ActivationStore) -> list[str]:
    """Used rows and mean norms by layer."""
    statistics = store.manifest.statistics
    if statistics is None:
        return ["statistics  not final: run the harvest again to finish the store"]
    share = statistics.count / max(1, store.n_rows)
    lines = [
        f"used rows   {statistics.count:,} ({share:.1%}): without first tokens of a piece, special tokens and "
        f"{counted(store.manifest.outlier_rows, 'outlier')} above {store.manifest.outlier_factor:g} x the mean norm",
        "layer       mean |mlp_in|  mean |mlp_out|",
    ]
    norms = zip(store.layers, statistics.input_norm_mean_L, statistics.output_norm_mean_L, strict=True)
    return lines + [
        f"{layer:5d}       {float(mlp_in):13.4g}  {float(mlp_out):14.4g}" for layer, mlp_in, mlp_out in norms
    ]
