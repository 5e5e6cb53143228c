"""`layerloom store info`: what a store holds and how it came to be, on one page."""

from collections import Counter
from pathlib import Path

from activation_store.completion import count_sources
from activation_store.manifest import Commit, StoreManifest, count_documents, read_commits
from activation_store.progress import human_bytes
from activation_store.store import ActivationStore
from activation_store.verify import store_folders


def store_info(path: Path | str) -> str:
    """A page about a store, complete or not. Raises UserError if `path` is not a store."""
    store = ActivationStore.open(path, allow_incomplete=True)
    commits = list(read_commits(store.path))
    lines = [*_described(store, commits), *_made(store, commits), *_scaled(store)]
    for folder in store_folders(path)[1:]:
        held_out = ActivationStore.open(folder, allow_incomplete=True)
        lines.append(f"held out    {held_out.manifest.status}, {held_out.n_rows:,} rows in {folder.name}/")
    return "\n".join(lines)


def _described(store: ActivationStore, commits: list[Commit]) -> list[str]:
    m = store.manifest
    rows = f"{store.n_rows:,} in {len(commits)} windows, {count_documents(commits)} documents"
    return [
        f"store       {store.path} ({m.status}, format {m.format_version})",
        f"rows        {rows}, {human_bytes(store.n_rows * store.layout.row_bytes)}",
        *_on_disk(commits, m.compression.value),
        f"arrays      mlp_in, mlp_out (rows, {len(m.layers)} layers, {m.d_model}) {m.dtype.value}",
        f"layers      {m.layers[0]}-{m.layers[-1]}, {m.input_hook} -> mlp_out",
    ]


def _on_disk(commits: list[Commit], compression: str) -> list[str]:
    """Files and bytes of each array, as committed."""
    files: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for commit in commits:
        for key, record in commit.files.items():
            files[key.split("/")[0]] += 1
            sizes[key.split("/")[0]] += record.bytes
    total = f"{human_bytes(sizes.total())} in {files.total()} shards, compression {compression}"
    arrays = ", ".join(f"{name} {human_bytes(size)}" for name, size in sizes.most_common())
    return [f"on disk     {total}", *([f"            {arrays}"] if arrays else [])]


def _made(store: ActivationStore, commits: list[Commit]) -> list[str]:
    m = store.manifest
    return [
        f"subject     {m.subject['path']} ({m.subject['architecture']}, {m.subject['dtype']})",
        f"            {m.subject['provenance']}",
        *_texts(m),
        *_sources(m, commits),
        "made with   " + ", ".join(f"{name} {value}" for name, value in m.provenance.items()),
    ]


def _texts(m: StoreManifest) -> list[str]:
    """The text, or those of a merged store with the rows and documents of each."""
    contexts = f"contexts of {m.text['context_length']} tokens"
    if "merged" not in m.config:
        sources = m.text.get("sources")
        what = f"a mixture of {len(sources)} sources" if sources else m.text["path"]
        return [f"text        {what}, {contexts}, seed {m.text['seed']}"]
    lines = [f"text        {len(m.config['merged'])} sources, merged; {contexts}"]
    for source in m.config["merged"]:
        share = source["rows"] / max(1, m.rows)
        counts = f"{source['rows']:,} rows ({share:.1%}), {source['documents']:,} documents"
        lines.append(f"            {source['text']['path']}, seed {source['text']['seed']}: {counts}")
    return lines


def _sources(m: StoreManifest, commits: list[Commit]) -> list[str]:
    """Rows and documents of each source of a mixture, as committed so far; what became of chats' special tokens."""
    total = max(1, sum(commit.rows for commit in commits))
    lines = [
        f"            {source['label']}: {source['rows']:,} rows ({source['rows'] / total:.1%}), "
        f"{source['documents']:,} documents"
        for source in count_sources(m, commits)
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
        f"{store.manifest.outlier_rows} outliers above {store.manifest.outlier_factor:g} x the mean norm",
        "layer       mean |mlp_in|  mean |mlp_out|",
    ]
    norms = zip(store.layers, statistics.input_norm_mean_L, statistics.output_norm_mean_L, strict=True)
    return lines + [
        f"{layer:5d}       {float(mlp_in):13.4g}  {float(mlp_out):14.4g}" for layer, mlp_in, mlp_out in norms
    ]
