"""`layerloom harvest`: refuses what cannot work before anything is written, then joins whoever else harvests."""

import errno
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from activation_store.atomic import free_bytes
from activation_store.blocks import BlockRunner, measure_rate
from activation_store.chat import untrained_token_ids
from activation_store.claims import CLAIMS, PATIENCE, Claims
from activation_store.compare import config_differences
from activation_store.config import StoreConfig, SubjectConfig, TextConfig
from activation_store.device import resolve_device
from activation_store.errors import UserError, os_error_line
from activation_store.hooks import CaptureHooks
from activation_store.manifest import (
    COMMITS,
    HELD_OUT,
    MANIFEST,
    StoreManifest,
    provenance,
    read_commits,
)
from activation_store.places import Place, remove_all, storage_at
from activation_store.plan import (
    HarvestPlan,
    check_disk,
    check_folder,
    has_rows,
    is_complete,
    make_plan,
    mismatch,
    missing_rows,
    needed_bytes,
)
from activation_store.progress import Progress, human_bytes, human_seconds, report
from activation_store.rolling import check_not_rolling
from activation_store.store import ActivationStore
from activation_store.subject import load_subject
from activation_store.text import check_documents
from activation_store.windows import WINDOWS, Part, Windows
from activation_store.work import PartWork, Worker, finish
from activation_store.writer import WindowWriter


@dataclass(frozen=True, slots=True)
class HarvestSummary:
    """What a harvest left on disk. `skipped`: it was all there before."""

    path: Place
    rows: int
    held_out_rows: int
    used_rows: int
    bytes: int
    seconds: float
    skipped: bool


def harvest(subject: SubjectConfig, text: TextConfig, store: StoreConfig, *, device: str = "auto") -> HarvestSummary:
    """Fills `store.path` with activations of `subject` on `text`, together with every other process that does.

    Continues what was started before. A store that is complete and matches is left alone, and the subject is not
    loaded. Raises UserError, before anything is written: for a subject, text or layer range that is not there, a store
    of another config (naming what differs), or a disk that is too small; and later, for a non-finite activation or a
    disk that fills. Whatever happens, committed windows stay and the same call continues after them.
    """
    started = time.monotonic()
    plan = make_plan(subject, text, store)
    check_not_rolling(plan.folder, "a harvest with source=disk")
    if is_complete(plan):
        report(f"harvest: {plan.folder} is complete and matches its config; nothing to do")
        return _summary(plan, started, skipped=True)
    check_folder(plan.folder)
    check_disk(plan)
    with continuable(plan):
        check_documents(text)
        _fill(plan, resolve_device(own_device(device)))
    summary = _summary(plan, started, skipped=False)
    report(
        f"harvest: {summary.rows:,} rows ({summary.used_rows:,} to train on) and {summary.held_out_rows:,} "
        f"held-out rows, {human_bytes(summary.bytes)}, are in {plan.folder} after {human_seconds(summary.seconds)}"
    )
    return summary


def own_device(device: str) -> str:
    """The GPU of this rank, where torchrun started several and none is named."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{int(rank) % torch.cuda.device_count()}"


def _fill(plan: HarvestPlan, device: torch.device) -> None:
    """Loads the subject and harvests until every part is complete."""
    subject = load_subject(plan.subject, device=device)
    hooks = CaptureHooks(
        subject, input_hook=plan.store.input_hook, layer_start=plan.layers.start, layer_stop=plan.layers.stop
    )
    rate = measure_rate(hooks, plan.text, plan.store)
    left = missing_rows(plan)
    report(f"harvest: about {human_seconds(left / rate)} for {left:,} rows at {rate:,.0f} tok/s on {device}")
    with Claims(pause_seconds=plan.store.claim_seconds / PATIENCE) as claims:
        if is_complete(plan):
            return
        _clear_begun(plan, claims)
        # A sign of life before the first change: who asks for another config sees that somebody is at work.
        claims.take(storage_at(plan.folder), f"worker-{claims.worker}")
        works = [begin_part(plan, part, hooks) for part in reversed(plan.parts)][::-1]
        total = sum(part.most_rows for part in plan.parts)
        with Progress("harvest", total=total, unit="tok", initial=max(0, total - left)) as progress:
            worker = Worker(works, claims, BlockRunner(hooks, plan.subject, plan.store), plan.window_rows(), progress)
            worker.run()
            progress.total = progress.done
        report(worker.times.line())
        for work in works:
            finish(work, claims)
        _report_short_text(plan)


def begin_part(plan: HarvestPlan, part: Part, hooks: CaptureHooks) -> PartWork:
    """Creates a part's manifest, or joins those who did. The outer store's comes first: it is known as a store then."""
    _manifest(plan, part, hooks).create(part.folder)
    manifest = StoreManifest.load(part.folder)
    if differences := config_differences(manifest.config, plan.identity):
        raise UserError(mismatch(plan, manifest, differences))
    storage = storage_at(part.folder)
    windows = Windows(part, storage, hooks.subject, plan.layout, contexts=plan.window_contexts)
    return PartWork(part, manifest, storage, windows, WindowWriter(part.folder, storage, manifest))


def _clear_begun(plan: HarvestPlan, claims: Claims) -> None:
    """Removes a store of another config that has no rows yet and no worker, the manifest last.

    Raises UserError if somebody is at work there.
    """
    folder = plan.folder
    if not (folder / MANIFEST).exists():
        return
    manifest = StoreManifest.load(folder)
    differences = config_differences(manifest.config, plan.identity)
    if not differences:
        return
    if _alive(plan, claims) or has_rows(folder):
        raise UserError(f"{mismatch(plan, manifest, differences)} (another process is harvesting into it now)")
    for name in (HELD_OUT, COMMITS, WINDOWS, CLAIMS, *(array.name for array in manifest.layout.arrays())):
        remove_all(folder / name)
    remove_all(folder / "zarr.json")
    remove_all(folder / MANIFEST)


def _alive(plan: HarvestPlan, claims: Claims) -> bool:
    """Whether a claim in the store changes, or a new one comes, within the time after which it would be taken over."""
    before = _claims_seen(plan.folder)
    for _ in range(PATIENCE if before else 0):
        claims.pause()
        now = _claims_seen(plan.folder)
        if any(before.get(key) != value for key, value in now.items()):
            return True
    return False


def _claims_seen(folder: Place) -> dict[Place, bytes]:
    seen = {}
    for part in (folder, folder / HELD_OUT):
        storage = storage_at(part)
        for key in storage.list(CLAIMS):
            try:
                seen[part / key] = storage.get(key)
            except FileNotFoundError:
                continue
    return seen


def _report_short_text(plan: HarvestPlan) -> None:
    rows = ActivationStore.open(plan.folder).n_rows
    if rows < plan.store.tokens:
        report(
            f"harvest: the text ended after {rows:,} rows, before store.tokens={plan.store.tokens:,}; the store is "
            "complete with what there was"
        )


def _manifest(plan: HarvestPlan, part: Part, hooks: CaptureHooks) -> StoreManifest:
    device = hooks.subject.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return StoreManifest(
        part=part.name,
        subject=plan.info.to_dict() | {"asked_revision": plan.subject.revision},
        bos_token_id=hooks.subject.bos_token_id,
        special_token_ids=untrained_token_ids(hooks.subject, plan.text),
        input_hook=plan.store.input_hook.value,
        layers=list(plan.layers),
        d_model=plan.info.d_model,
        dtype=plan.store.dtype,
        compression=plan.store.compression,
        config=plan.identity,
        text=asdict(part.text),
        chunk_rows=plan.store.chunk_rows,
        shard_rows=plan.store.shard_rows,
        outlier_factor=plan.store.outlier_factor,
        provenance=provenance(device=name, threads=str(torch.get_num_threads())),
    )


@contextmanager
def continuable(plan: HarvestPlan) -> Iterator[None]:
    """Says how to continue when the harvest is interrupted or the disk is full."""
    try:
        yield
    except KeyboardInterrupt:
        report(f"harvest: interrupted; what is committed stays. Continue with: {_command(plan)}")
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not isinstance(plan.folder, Path):
            raise UserError(
                f"harvest stopped: {os_error_line(error)}; committed windows stay: mend it and continue with: "
                f"{_command(plan)}"
            ) from error
        needed = needed_bytes(plan)
        raise UserError(
            f"the disk of {plan.folder} is full ({human_bytes(free_bytes(plan.folder))} free, at most "
            f"{human_bytes(needed)} more wanted); committed windows stay: make room and continue with: {_command(plan)}"
        ) from error


def _command(plan: HarvestPlan) -> str:
    """The command line that this process was started with, if it was Layerloom's."""
    if Path(sys.argv[0]).name == "layerloom":
        return shlex.join(["layerloom", *sys.argv[1:]])
    return f"layerloom harvest store.path={shlex.quote(str(plan.folder))} and the same other settings"


def _summary(plan: HarvestPlan, started: float, *, skipped: bool) -> HarvestSummary:
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
