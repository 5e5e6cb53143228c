"""The end of a store in the making: counts, final statistics and status, once all its windows are committed."""

from collections.abc import Iterable
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class SourceCounts:
    """Rows and documents of each source of a mixture, by label, counted commit by commit."""

    rows: dict[str, int] = field(default_factory=dict)
    documents: dict[str, set[int]] = field(default_factory=dict)

    def add(self, commit: Commit) -> None:
        """Counts one more."""
        for document in commit.documents:
            label = source_of(document.name)
            self.rows[label] = self.rows.get(label, 0) + document.rows
            self.documents.setdefault(label, set()).add(document.index)

    def listed(self) -> list[dict[str, Any]]:
        """As the manifest has them."""
        return [
            {"label": label, "rows": count, "documents": len(self.documents[label])}
            for label, count in sorted(self.rows.items())
        ]


def count_sources(manifest: StoreManifest, commits: Iterable[Commit]) -> list[dict[str, Any]]:
    """Rows and documents of each source of a mixture, by label; [] for one text."""
    if not manifest.text.get("sources"):
        return []
    counts = SourceCounts()
    for commit in commits:
        counts.add(commit)
    return counts.listed()
