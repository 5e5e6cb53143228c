"""`layerloom store repair`: harvests the damaged windows of a store once more, and nothing else.

What is damaged is deleted, then a harvest of the store's own config finds those windows not committed and fills them.
Shards of a damaged window that are whole stay where they are. On equal hardware the result has the same checksums as
before. However a repair ends, repairing again (or the harvest) continues it.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from activation_store.claims import PATIENCE, Claims
from activation_store.compare import config_differences
from activation_store.config import (
    BosRule,
    ChatSpecialTokens,
    Dtype,
    InputHook,
    Loader,
    StoreConfig,
    SubjectConfig,
    TextConfig,
    TextSource,
)
from activation_store.errors import UserError
from activation_store.harvest import harvest
from activation_store.manifest import (
    COMMITS,
    COMPLETE,
    FREE_STORE,
    HARVESTING,
    HELD_OUT,
    MANIFEST,
    Commit,
    DamagedRecordError,
    StoreManifest,
    commit_path,
    committed_windows,
    read_commits,
)
from activation_store.places import Place, storage_at, store_place
from activation_store.plan import make_plan
from activation_store.progress import report
from activation_store.rolling import check_not_rolling
from activation_store.shards import ShardRecord
from activation_store.storage import Storage
from activation_store.used import BITS, ENDS
from activation_store.verify import Damage, verify_store
from activation_store.windows import WINDOWS, WindowRecord

_REPAIR = "repair"
Files = dict[Place, dict[str, ShardRecord]]


@dataclass(frozen=True, slots=True)
class Places:
    """Where subject and text are now, if elsewhere than when the store was harvested ("": there)."""

    subject: str = ""
    text: str = ""
    # Of the converted subjects, as `subject.cache_dir`.
    cache_dir: str = ""
    # How the store is reached and harvested (`remote_...`, `scratch`, `claim_seconds`); the rest is the store's own.
    reach: StoreConfig = field(default_factory=StoreConfig)


@dataclass(frozen=True, slots=True)
class RepairSummary:
    """`windows` were harvested again; `changed` of their shards have another checksum than they once had."""

    windows: int
    changed: list[str]


def repair_store(path: Place | str, places: Places = Places(), *, device: str = "auto") -> RepairSummary:
    """Verifies a store and harvests again what is damaged; a store that was only half repaired is finished.

    Raises UserError, before anything is deleted, if `path` is no store, its manifest is damaged, it was merged, or its
    subject or text is not there any more.
    """
    folder = store_place(places.reach, str(path))
    check_not_rolling(folder, "repair")
    configs = stored_configs(folder, places)
    with Claims(pause_seconds=configs[2].claim_seconds / PATIENCE) as claims:
        storage = storage_at(folder)
        while not claims.observe(storage, _REPAIR):
            report(f"repair: another process is repairing {folder}; waiting for it")
            claims.pause()
        found = verify_store(folder).found
        half = any(StoreManifest.load(part).status != COMPLETE for part in _parts(folder))
        if not found and not half:
            return RepairSummary(0, [])
        _check(folder, configs, found)
        files = _take_out(folder, found)
    _same_threads(folder)
    harvest(*configs, device=device)
    return RepairSummary(_windows(found), _changed(files))


def _same_threads(folder: Place) -> None:
    """As many threads as harvested the store: sums of another number of parts may differ in their last bits."""
    if threads := StoreManifest.load(folder).provenance.get("threads"):
        torch.set_num_threads(int(threads))


def stored_configs(folder: Place, places: Places) -> tuple[SubjectConfig, TextConfig, StoreConfig]:
    """The configs that a store was harvested with. Raises UserError for a store that was merged from others."""
    manifest = StoreManifest.load(folder)
    subject, store = manifest.config["subject"], manifest.config["store"]
    if manifest.config.get("merged"):
        raise UserError(
            f"store {folder} was merged from others and cannot be harvested again as one; repair those and merge them "
            "again"
        )
    text = _text_config(manifest.text)
    return (
        SubjectConfig(
            path=places.subject or manifest.subject["path"],
            revision=manifest.subject["asked_revision"],
            dtype=Dtype(subject["dtype"]),
            bos=BosRule(subject["bos"]),
            cache_dir=places.cache_dir,
        ),
        replace(text, path=places.text or text.path),
        _store_config(store, folder, places.reach),
    )


def _text_config(values: dict[str, Any]) -> TextConfig:
    sources = [TextSource(**source | {"loader": Loader(source["loader"])}) for source in values["sources"]]
    kinds = {
        "loader": Loader(values["loader"]),
        "chat_special_tokens": ChatSpecialTokens(values["chat_special_tokens"]),
        "sources": sources,
    }
    return TextConfig(**values | kinds)


def _store_config(values: dict[str, Any], folder: Place, reach: StoreConfig) -> StoreConfig:
    kinds = {"input_hook": InputHook, "dtype": _kind("dtype"), "compression": _kind("compression")}
    known = {field.name for field in fields(StoreConfig)}
    typed = {key: kinds[key](value) if key in kinds else value for key, value in values.items() if key in known}
    told = {key: getattr(reach, key) for key in FREE_STORE}
    return StoreConfig(**typed | told | {"path": str(folder)})


def _kind(name: str) -> Any:
    return next(type(field.default) for field in fields(StoreConfig) if field.name == name)


def _parts(folder: Place) -> list[Place]:
    """The folders of a store's parts that have a manifest."""
    return [part for part in (folder, folder / HELD_OUT) if (part / MANIFEST).is_file()]


def _windows(found: list[Damage]) -> int:
    return len({(damage.folder, damage.window) for damage in found})


def _check(folder: Place, configs: tuple[SubjectConfig, TextConfig, StoreConfig], found: list[Damage]) -> None:
    """Refuses what cannot be harvested again."""
    for damage in found:
        if damage.window < 0:
            raise UserError(
                f"{damage} and says what to harvest, so it cannot be repaired; delete {folder} and harvest it again"
            )
    plan = make_plan(*configs)
    if differences := config_differences(StoreManifest.load(folder).config, plan.identity):
        raise UserError(
            f"store {folder} cannot be repaired: what it was harvested from is not there any more "
            f"({'; '.join(differences)}); say where it is with subject.path or text.path"
        )


def _take_out(folder: Place, found: list[Damage]) -> Files:
    """Deletes damaged shards and then the commits of their windows; what those commits said of their shards."""
    files: Files = {}
    for part in _parts(folder):
        damaged: dict[int, list[str]] = {}
        for damage in found:
            if damage.folder == part:
                damaged.setdefault(damage.window, []).append(damage.key)
        if damaged:
            files[part] = _reopen(part, damaged)
    return files


def _reopen(part: Place, damaged: dict[int, list[str]]) -> dict[str, ShardRecord]:
    storage, manifest = storage_at(part), StoreManifest.load(part)
    # Those that say where the damaged windows lie, not all: there may be many.
    near = {number + step for number in damaged for step in (-1, 0, 1)} | {len(manifest.blocks) - 1}
    there = near.intersection(committed_windows(part))
    commits = {window: commit for window in there if (commit := _readable(part, window)) is not None}
    _keep_records(storage, manifest, commits, sorted(damaged))
    blocks = manifest.blocks
    if manifest.status == COMPLETE:
        # From here on it is no store to train on, until the harvest has completed it again.
        manifest.status, manifest.blocks, manifest.statistics = HARVESTING, [], None
        manifest.rows = manifest.outlier_rows = manifest.documents = 0
        manifest.save(part)
        for name in (BITS, ENDS):
            storage.delete(name)
    files: dict[str, ShardRecord] = {}
    for window, keys in damaged.items():
        if window in commits:
            files |= commits[window].files
        # Nothing vouches for a shard whose commit is gone. The commit goes last: while it is there, its shards are
        # what verify and repair look for.
        for key in keys if window in commits else _shards_of(part, manifest, blocks, window):
            storage.delete(key)
        storage.delete(f"{COMMITS}/{window:08d}.json")
    return files


def _readable(part: Place, window: int) -> Commit | None:
    try:
        return Commit.load(commit_path(part, window))
    except DamagedRecordError:
        return None


def _keep_records(storage: Storage, manifest: StoreManifest, commits: dict[int, Commit], damaged: list[int]) -> None:
    """Writes where windows lie, as far as the commits know it: else the harvest would tokenise all text before them."""
    if manifest.status != COMPLETE:
        return
    last = len(manifest.blocks) - 1
    for window in {*damaged, *(number - 1 for number in damaged), last}:
        here, following = commits.get(window), commits.get(window + 1)
        if here is None or (following is None and window != last):
            continue
        record = WindowRecord(
            window=window,
            block=here.first_block,
            context=here.first_context,
            contexts=here.contexts,
            next_block=following.first_block if following else here.first_block,
            next_context=following.first_context if following else here.first_context + here.contexts,
            start_row=here.start_row,
            rows=here.rows,
            rows_before=sum(rows for _, rows in manifest.blocks[:window]),
            last=window == last,
        )
        storage.put_if_absent(f"{WINDOWS}/{window:08d}.json", [json.dumps(asdict(record)).encode()])


def _shards_of(part: Place, manifest: StoreManifest, blocks: list[list[int]], window: int) -> list[str]:
    """The shards of a window without a readable commit."""
    if window < len(blocks):
        start, rows = blocks[window]
    else:
        data = json.loads((part / WINDOWS / f"{window:08d}.json").read_bytes())
        start, rows = data["start_row"], data["rows"]
    first = start // manifest.shard_rows
    numbers = range(first, first + manifest.layout.shards_of(rows))
    return [array.shard_key(number) for array in manifest.layout.arrays() for number in numbers]


def _changed(files: Files) -> list[str]:
    """Shards whose checksum is not what it was before the damage."""
    changed = []
    for part, before in files.items():
        now = {key: record for commit in read_commits(part) for key, record in commit.files.items()}
        changed += [str(part / key) for key, record in before.items() if now.get(key) != record]
    return changed
