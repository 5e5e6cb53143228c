"""What a harvest is to do, and every reason to refuse it, before anything is written."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activation_store.atomic import free_bytes
from activation_store.blocks import parts_of
from activation_store.claims import CLAIMS
from activation_store.compare import config_differences
from activation_store.config import StoreConfig, SubjectConfig, TextConfig
from activation_store.errors import UserError
from activation_store.hooks import layer_range
from activation_store.layout import StoreLayout
from activation_store.manifest import COMPLETE, HELD_OUT, MANIFEST, StoreManifest, committed_windows, identity
from activation_store.places import Place
from activation_store.progress import human_bytes, report
from activation_store.store import ActivationStore
from activation_store.subject import SubjectInfo, describe_subject
from activation_store.text import open_documents
from activation_store.windows import Part, contexts_per_window

# Besides the rows themselves: metadata, commits, and windows whose contexts are not full.
_DISK_MARGIN = 1.02


@dataclass(frozen=True, slots=True)
class HarvestPlan:
    """A harvest as asked for, with what is known of its subject and text."""

    subject: SubjectConfig
    text: TextConfig
    store: StoreConfig
    info: SubjectInfo
    layers: range
    layout: StoreLayout
    parts: list[Part]
    identity: dict[str, Any]
    # Of the whole text; None for a stream.
    documents: int | None

    @property
    def folder(self) -> Place:
        return next(part.folder for part in self.parts if part.name != HELD_OUT)

    @property
    def window_contexts(self) -> int:
        """Contexts of a window."""
        return contexts_per_window(self.text, self.store, self.layout)

    def window_rows(self) -> int:
        """Most rows of a window."""
        return min(self.window_contexts * self.text.context_length, max(part.most_rows for part in self.parts))


def make_plan(subject: SubjectConfig, text: TextConfig, store: StoreConfig) -> HarvestPlan:
    """Looks at subject and text. Raises UserError for what is not there."""
    info = describe_subject(subject)
    layers = layer_range(info.n_layers, store.layer_start, store.layer_stop)
    documents = open_documents(text)
    asked = identity(
        subject, text, store, layers=layers, subject_fingerprint=info.fingerprint, files=documents.fingerprint
    )
    layout = StoreLayout(len(layers), info.d_model, store.dtype, store.chunk_rows, store.shard_rows, store.compression)
    return HarvestPlan(subject, text, store, info, layers, layout, parts_of(text, store), asked, documents.count)


def is_complete(plan: HarvestPlan) -> bool:
    """Whether all parts are there. Raises UserError for a folder that is something else, or another config's store."""
    statuses = []
    for part in plan.parts:
        if (part.folder / MANIFEST).exists():
            manifest = StoreManifest.load(part.folder)
            differences = config_differences(manifest.config, plan.identity)
            if differences and has_rows(plan.folder):
                raise UserError(mismatch(plan, manifest, differences))
            statuses.append(manifest.status == COMPLETE and not differences)
        else:
            statuses.append(False)
    folder = plan.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"store.path={folder} is a file; give a folder")
    if not (folder / MANIFEST).exists() and folder.exists():
        others = [path.name for path in folder.iterdir() if path.name != CLAIMS and not path.name.endswith(".partial")]
        if others:
            raise UserError(
                f"store.path={folder} exists and is not a store (it holds {others[0]}); give a new or empty folder"
            )
    return all(statuses)


def has_rows(folder: Place) -> bool:
    """Whether a block was committed in the store or its held-out part, or the store is complete without any."""
    parts = [part for part in (folder, folder / HELD_OUT) if (part / MANIFEST).exists()]
    return any(StoreManifest.load(part).status == COMPLETE or bool(committed_windows(part)) for part in parts)


def check_folder(folder: Place) -> None:
    """Refuses a place where no folder can be made or written."""
    if not isinstance(folder, Path):
        return
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"store.path={folder} cannot be made: {nearest} is a file; give another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"store.path={folder} cannot be written: no permission for {nearest}; give another folder")


def mismatch(plan: HarvestPlan, manifest: StoreManifest, differences: list[str]) -> str:
    name = f"store {plan.folder} ({manifest.status}) was made with another config ({'; '.join(differences)})"
    if len(differences) == 1 and differences[0].startswith("store.tokens:"):
        return f"{name}; a store is not extended: use its store.tokens, or another store.path"
    return f"{name}; use that config, or another store.path"


def _rows_there(folder: Place) -> int:
    if not (folder / MANIFEST).exists():
        return 0
    return ActivationStore.open(folder, allow_incomplete=True).n_rows


def missing_rows(plan: HarvestPlan) -> int:
    """Rows that are not committed yet, at most."""
    return sum(max(0, part.most_rows - _rows_there(part.folder)) for part in plan.parts)


def needed_bytes(plan: HarvestPlan) -> int:
    """Bytes still to be written, at most: rows, and what fills up the last chunk of every window."""
    rows = missing_rows(plan)
    for part in plan.parts:
        contexts = -(-part.most_rows // plan.text.context_length)
        rows += -(-contexts // plan.window_contexts) * (plan.store.chunk_rows - 1)
    return int(rows * plan.layout.row_bytes * _DISK_MARGIN)


def check_disk(plan: HarvestPlan) -> None:
    """Says how much will be written, and refuses a disk that is too small."""
    rows = sum(part.most_rows for part in plan.parts)
    needed = needed_bytes(plan)
    size = (
        f"{rows:,} rows x {len(plan.layers)} layers x {plan.info.d_model} x 2 in {plan.store.dtype.value}: "
        f"{human_bytes(rows * plan.layout.row_bytes)}"
    )
    if not isinstance(plan.folder, Path):
        report(f"harvest: at most {size} into {plan.folder}")
        return
    free = free_bytes(plan.folder)
    if needed > free:
        raise UserError(
            f"store.path={plan.folder} needs {human_bytes(needed)} ({needed} bytes; {size}) and its disk has "
            f"{human_bytes(free)} ({free} bytes) free; use fewer store.tokens, fewer layers or another disk"
        )
    report(f"harvest: at most {size} into {plan.folder} ({human_bytes(free)} free)")
