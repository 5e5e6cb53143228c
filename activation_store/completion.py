"""The end of a store in the making: counts, final statistics and status, once all its windows are committed."""

from collections.abc import Iterable
from typing import Any

from activation_store.layout import create_zarr
from activation_store.manifest import COMPLETE, Commit, StoreManifest, count_documents, read_commits
from activation_store.mixture import source_of
from activation_store.places import Place
from activation_store.store import ActivationStore


def complete_store(folder: Place, manifest: StoreManifest) -> None:
    """Sets the rest of `manifest` from the commits and publishes it, after which the store is complete.

    Raises UserError if no row of the store would be trained on.
    """
    manifest.blocks = [[commit.start_row, commit.rows] for commit in read_commits(folder)]
    manifest.rows = sum(rows for _, rows in manifest.blocks)
    manifest.documents = count_documents(read_commits(folder))
    manifest.sources = count_sources(manifest, read_commits(folder))
    blocks = [(start, rows) for start, rows in manifest.blocks]
    manifest.statistics, manifest.outlier_rows = ActivationStore(folder, manifest, blocks).compute_statistics()
    manifest.status = COMPLETE
    ActivationStore(folder, manifest, blocks).used.save(folder)
    create_zarr(folder, manifest.layout, sum(manifest.blocks[-1]) if manifest.blocks else 0)
    manifest.save(folder)


def count_sources(manifest: StoreManifest, commits: Iterable[Commit]) -> list[dict[str, Any]]:
    """Rows and documents of each source of a mixture, by label; [] for one text."""
    if not manifest.text.get("sources"):
        return []
    rows: dict[str, int] = {}
    documents: dict[str, set[int]] = {}
    for commit in commits:
        for document in commit.documents:
            label = source_of(document.name)
            rows[label] = rows.get(label, 0) + document.rows
            documents.setdefault(label, set()).add(document.index)
    return [
        {"label": label, "rows": count, "documents": len(documents[label])} for label, count in sorted(rows.items())
    ]
