"""`layerloom harvest`: plans, refuses what cannot work before anything is written, harvests, and finishes a store."""

import errno
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from activation_store.atomic import free_bytes
from activation_store.blocks import BlockRunner, Part, harvest_blocks, measure_rate, parts_of
from activation_store.compare import config_differences
from activation_store.config import StoreConfig, SubjectConfig, TextConfig
from activation_store.device import resolve_device
from activation_store.errors import UserError, os_error_line
from activation_store.hooks import CaptureHooks, layer_range
from activation_store.layout import StoreLayout
from activation_store.lock import LOCK, HarvestLock
from activation_store.manifest import (
    COMMITS,
    COMPLETE,
    HELD_OUT,
    MANIFEST,
    StoreManifest,
    identity,
    provenance,
    read_commits,
)
from activation_store.progress import Progress, human_bytes, human_seconds, report
from activation_store.store import ActivationStore
from activation_store.subject import SubjectInfo, describe_subject, load_subject
from activation_store.text import check_documents, open_documents
from activation_store.writer import ActivationWriter

# Besides the rows themselves: metadata, commits, and chunks that the ends of blocks do not fill.
_DISK_MARGIN = 1.02


@dataclass(frozen=True, slots=True)
class HarvestSummary:
    """What a harvest left on disk. `skipped`: it was all there before."""

    path: Path
    rows: int
    held_out_rows: int
    used_rows: int
    bytes: int
    seconds: float
    skipped: bool


@dataclass(frozen=True, slots=True)
class _Plan:
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
    def folder(self) -> Path:
        return Path(self.store.path)


def harvest(subject: SubjectConfig, text: TextConfig, store: StoreConfig, *, device: str = "auto") -> HarvestSummary:
    """Fills `store.path` with activations of `subject` on `text`, from where it stopped if it was started before.

    A store that is complete and matches is left alone, and the subject is not loaded. Raises UserError, before anything
    is written: for a subject, text or layer range that is not there, a store of another config (naming what differs), a
    disk that is too small, or a store that another process harvests into; and later, for a non-finite activation or a
    disk that fills. Whatever happens, committed blocks stay and the same call continues after them.
    """
    started = time.monotonic()
    plan = _make_plan(subject, text, store)
    if _is_complete(plan):
        report(f"harvest: {plan.folder} is complete and matches its config; nothing to do")
        return _summary(plan, started, skipped=True)
    _check_folder(plan.folder)
    _check_disk(plan)
    with _continuable(plan):
        check_documents(text)
    lock = HarvestLock(plan.folder)
    try:
        if plan.folder.exists():
            # Before the subject is loaded; a folder that is not there yet is made when all that can be checked is.
            lock.acquire()
        with _continuable(plan):
            _fill(plan, lock, resolve_device(device))
    finally:
        lock.release()
    summary = _summary(plan, started, skipped=False)
    report(
        f"harvest: wrote {summary.rows:,} rows ({summary.used_rows:,} to train on) and {summary.held_out_rows:,} "
        f"held-out rows, {human_bytes(summary.bytes)}, to {plan.folder} in {human_seconds(summary.seconds)}"
    )
    return summary


def _make_plan(subject: SubjectConfig, text: TextConfig, store: StoreConfig) -> _Plan:
    info = describe_subject(subject)
    layers = layer_range(info.n_layers, store.layer_start, store.layer_stop)
    documents = open_documents(text)
    asked = identity(
        subject, text, store, layers=layers, subject_fingerprint=info.fingerprint, files=documents.fingerprint
    )
    layout = StoreLayout(len(layers), info.d_model, store.dtype, store.chunk_rows, store.shard_rows)
    return _Plan(subject, text, store, info, layers, layout, parts_of(text, store), asked, documents.count)


def _is_complete(plan: _Plan) -> bool:
    """Whether all parts are there. Raises UserError for a folder that is something else, or another config's store."""
    statuses = []
    for part in plan.parts:
        if (part.folder / MANIFEST).exists():
            manifest = StoreManifest.load(part.folder)
            differences = config_differences(manifest.config, plan.identity)
            if differences and _has_rows(plan.folder):
                raise UserError(_mismatch(plan, manifest, differences))
            statuses.append(manifest.status == COMPLETE and not differences)
        else:
            statuses.append(False)
    folder = plan.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"store.path={folder} is a file; give a folder")
    if not (folder / MANIFEST).exists() and folder.exists():
        others = [path.name for path in folder.iterdir() if path.name != LOCK and not path.name.endswith(".partial")]
        if others:
            raise UserError(
                f"store.path={folder} exists and is not a store (it holds {others[0]}); give a new or empty folder"
            )
    return all(statuses)


def _has_rows(folder: Path) -> bool:
    """Whether a block was committed in the store or its held-out part, or the store is complete without any."""
    parts = [part for part in (folder, folder / HELD_OUT) if (part / MANIFEST).exists()]
    return any(
        StoreManifest.load(part).status == COMPLETE or next(read_commits(part), None) is not None for part in parts
    )


def _clear_begun(plan: _Plan) -> None:
    """Removes a store of another config that has no rows yet, the manifest last: until then it is known as a store."""
    folder = plan.folder
    if not (folder / MANIFEST).exists():
        return
    if not config_differences(StoreManifest.load(folder).config, plan.identity):
        return
    for name in (HELD_OUT, COMMITS, *(array.name for array in plan.layout.arrays())):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "zarr.json").unlink(missing_ok=True)
    (folder / MANIFEST).unlink()


def _check_folder(folder: Path) -> None:
    """Refuses a place where no folder can be made or written."""
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"store.path={folder} cannot be made: {nearest} is a file; give another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"store.path={folder} cannot be written: no permission for {nearest}; give another folder")


def _mismatch(plan: _Plan, manifest: StoreManifest, differences: list[str]) -> str:
    name = f"store {plan.folder} ({manifest.status}) was made with another config ({'; '.join(differences)})"
    if len(differences) == 1 and differences[0].startswith("store.tokens:"):
        return f"{name}; a store is not extended: use its store.tokens, or another store.path"
    return f"{name}; use that config, or another store.path"


def _rows_there(folder: Path) -> int:
    if not (folder / MANIFEST).exists():
        return 0
    return ActivationStore.open(folder, allow_incomplete=True).n_rows


def _missing_rows(plan: _Plan) -> int:
    """Rows that are still to be harvested, at most."""
    return sum(max(0, part.most_rows - _rows_there(part.folder)) for part in plan.parts)


def _needed_bytes(plan: _Plan) -> int:
    """Bytes still to be written, at most: rows, and what fills up the last chunk of every block."""
    rows = _missing_rows(plan)
    for part in plan.parts:
        held_out = part.tokens is None
        known = plan.text.held_out_documents if held_out else (plan.documents or 0) - plan.text.held_out_documents
        # A stream does not say how many documents it has: taken as one context each.
        documents = known if held_out or plan.documents is not None else part.most_rows // plan.text.context_length
        rows += -(-documents // plan.text.documents_per_block) * (plan.store.chunk_rows - 1)
    return int(rows * plan.layout.row_bytes * _DISK_MARGIN)


def _check_disk(plan: _Plan) -> None:
    """Says how much will be written, and refuses a disk that is too small."""
    rows = sum(part.most_rows for part in plan.parts)
    needed = _needed_bytes(plan)
    free = free_bytes(plan.folder)
    size = (
        f"{rows:,} rows x {len(plan.layers)} layers x {plan.info.d_model} x 2 in {plan.store.dtype.value}: "
        f"{human_bytes(rows * plan.layout.row_bytes)}"
    )
    if needed > free:
        raise UserError(
            f"store.path={plan.folder} needs {human_bytes(needed)} ({needed} bytes; {size}) and its disk has "
            f"{human_bytes(free)} ({free} bytes) free; use fewer store.tokens, fewer layers or another disk"
        )
    report(f"harvest: at most {size} into {plan.folder} ({human_bytes(free)} free)")


def _fill(plan: _Plan, lock: HarvestLock, device: torch.device) -> None:
    """Loads the subject and harvests every part that is not complete."""
    subject = load_subject(plan.subject, device=device)
    hooks = CaptureHooks(
        subject, input_hook=plan.store.input_hook, layer_start=plan.layers.start, layer_stop=plan.layers.stop
    )
    rate = measure_rate(hooks, plan.text, plan.store)
    left = _missing_rows(plan)
    report(f"harvest: about {human_seconds(left / rate)} for {left:,} rows at {rate:,.0f} tok/s on {device}")
    lock.acquire()
    if _is_complete(plan):
        return
    _clear_begun(plan)
    manifests = {part.name: _manifest(plan, part, hooks) for part in plan.parts}
    runner = BlockRunner(hooks, plan.subject, plan.store)
    for part in reversed(plan.parts):
        # Both before the first row, the outer one first: a folder that was begun is recognised as a store.
        if not (part.folder / MANIFEST).exists():
            manifests[part.name].save(part.folder)
    for part in plan.parts:
        manifest = StoreManifest.load(part.folder)
        if manifest.status != COMPLETE:
            _harvest_part(part, manifest, runner)


def _manifest(plan: _Plan, part: Part, hooks: CaptureHooks) -> StoreManifest:
    device = hooks.subject.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return StoreManifest(
        part=part.name,
        subject=plan.info.to_dict() | {"asked_revision": plan.subject.revision},
        bos_token_id=hooks.subject.bos_token_id,
        special_token_ids=sorted(hooks.subject.special_token_ids),
        input_hook=plan.store.input_hook.value,
        layers=list(plan.layers),
        d_model=plan.info.d_model,
        dtype=plan.store.dtype,
        config=plan.identity,
        text=asdict(part.text),
        chunk_rows=plan.store.chunk_rows,
        shard_rows=plan.store.shard_rows,
        outlier_factor=plan.store.outlier_factor,
        provenance=provenance(device=name, threads=str(torch.get_num_threads())),
    )


def _harvest_part(part: Part, manifest: StoreManifest, runner: BlockRunner) -> None:
    writer = ActivationWriter(part.folder, manifest)
    name = "harvest" if part.tokens is not None else "harvest held-out"
    done = False
    with Progress(name, total=part.most_rows, unit="tok", initial=writer.rows) as progress:
        try:
            harvest_blocks(part, runner, writer, progress)
            done = True
        finally:
            if not done:
                writer.discard_block()
        progress.total = writer.rows
    if part.tokens is not None and writer.rows < part.tokens:
        report(
            f"harvest: the text ended after {writer.rows:,} rows, before store.tokens={part.tokens:,}; the store is "
            "complete with what there was"
        )
    _finish(part.folder, manifest)


def _finish(folder: Path, manifest: StoreManifest) -> None:
    """Counts, final statistics, and the status `complete`."""
    documents = 0
    for commit in read_commits(folder):
        manifest.blocks.append([commit.start_row, commit.rows])
        manifest.rows += commit.rows
        documents += len(commit.documents)
    manifest.documents = documents
    store = ActivationStore(folder, manifest, [(start, rows) for start, rows in manifest.blocks])
    manifest.statistics, manifest.outlier_rows = store.compute_statistics()
    manifest.status = COMPLETE
    manifest.save(folder)


@contextmanager
def _continuable(plan: _Plan) -> Iterator[None]:
    """Says how to continue when the harvest is interrupted or the disk is full."""
    try:
        yield
    except KeyboardInterrupt:
        report(f"harvest: interrupted; what is committed stays. Continue with: {_command(plan)}")
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"harvest stopped: {os_error_line(error)}; committed blocks stay: mend it and continue with: "
                f"{_command(plan)}"
            ) from error
        needed = _needed_bytes(plan)
        raise UserError(
            f"the disk of {plan.folder} is full ({human_bytes(free_bytes(plan.folder))} free, at most "
            f"{human_bytes(needed)} more wanted); committed blocks stay: make room and continue with: {_command(plan)}"
        ) from error


def _command(plan: _Plan) -> str:
    """The command line that this process was started with, if it was Layerloom's."""
    if Path(sys.argv[0]).name == "layerloom":
        return shlex.join(["layerloom", *sys.argv[1:]])
    return f"layerloom harvest store.path={shlex.quote(str(plan.folder))} and the same other settings"


def _summary(plan: _Plan, started: float, *, skipped: bool) -> HarvestSummary:
    store = ActivationStore.open(plan.folder)
    held_out = store.held_out() if len(plan.parts) > 1 else None
    held_out_rows = held_out.n_rows if held_out is not None else 0
    return HarvestSummary(
        path=plan.folder,
        rows=store.n_rows,
        held_out_rows=held_out_rows,
        used_rows=store.statistics().count,
        bytes=sum(
            record.bytes
            for part in plan.parts
            for commit in read_commits(part.folder)
            for record in commit.files.values()
        ),
        seconds=time.monotonic() - started,
        skipped=skipped,
    )
