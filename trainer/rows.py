"""The rows that a run reads besides its training batches, and the checks that a store is the run's.

Legend: B rows of a batch, L layers, D d_model.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from activation_store.compare import config_differences
from activation_store.errors import UserError
from activation_store.manifest import FREE_STORE
from activation_store.places import store_place
from activation_store.store import ActivationStore
from trainer.config import RunConfig

# What may differ between a run's config and its store's: places and labels, and how many contexts went through at once.
_FREE_TEXT = ("path", "license")
_FREE_STORE = (*FREE_STORE, "batch_contexts")


def open_training_store(config: RunConfig) -> ActivationStore:
    """Opens `store.path` and checks that it is what the config describes, and large enough for one batch.

    Raises UserError: no store, half written, of another subject, text or store config, or too few rows.
    """
    store = open_matching_store(config)
    used = store.used.count
    if used < config.train.batch_size_tokens:
        raise UserError(
            f"store {store.path} has {used} rows to train on, fewer than one batch of "
            f"train.batch_size_tokens={config.train.batch_size_tokens}; harvest more (store.tokens) or lower it"
        )
    return store


def open_matching_store(config: RunConfig) -> ActivationStore:
    """Opens `store.path` and checks that it was harvested with the config's subject, text and store settings.

    A path that differs is looked up, and what it leads to compared by fingerprint. Raises UserError.
    """
    store = ActivationStore.open(store_place(config.store))
    manifest = store.manifest
    _check_subject(config, store)
    asked = harvest_settings(config)
    if asked["store"]["layer_stop"] is None:
        asked["store"]["layer_stop"] = manifest.subject["n_layers"]
    there = {
        group: {key: value for key, value in manifest.config[group].items() if key in asked[group]} for group in asked
    }
    if differences := config_differences(there, asked):
        raise UserError(
            f"store {store.path} was made with another config: {differences[0]}; give the same values, or harvest "
            "another store"
        )
    if config.text.path != manifest.text["path"]:
        check_text(config, store)
    return store


def harvest_settings(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What harvest and train must be told alike, by group (beside the subject itself)."""
    text, store = asdict(config.text), asdict(config.store)
    return {
        "subject": {"bos": config.subject.bos},
        "text": {key: value for key, value in text.items() if key not in _FREE_TEXT},
        "store": {key: value for key, value in store.items() if key not in _FREE_STORE},
    }


def check_text(config: RunConfig, store: ActivationStore) -> None:
    """Raises UserError if `text.path` does not hold the documents that were harvested.

    Which documents are held out is a function of all of them: with another one added, training documents would be.
    """
    from activation_store.text import text_fingerprint  # datasets: seconds

    found, harvested = text_fingerprint(config.text), store.manifest.config["text"]["fingerprint"]
    # What one of the stores of a merge holds out, none of them trains on.
    merged = [source["fingerprint"] for source in store.manifest.config.get("merged", [])]
    if found not in (harvested, *merged):
        raise UserError(
            f"text.path={config.text.path} is now {found}, and store {store.path} was harvested from {harvested}; put "
            "that text back, or harvest and train again"
        )


def store_identity(store: ActivationStore) -> str:
    """Another value when the rows or their statistics differ; what a checkpoint remembers of its store."""
    manifest = store.manifest
    statistics = None if manifest.statistics is None else manifest.statistics.to_dict()
    facts = [manifest.subject["fingerprint"], manifest.input_hook, manifest.layers, manifest.dtype, manifest.blocks]
    # What decides the order of the rows.
    facts += [manifest.chunk_rows, manifest.shard_rows, manifest.outlier_factor, manifest.special_token_ids]
    return xxhash.xxh3_64_hexdigest(json.dumps([facts, statistics], sort_keys=True).encode())


@dataclass(frozen=True, kw_only=True)
class CalibrationRows:
    """mlp_in (B, L, D) of `n_rows` training rows (or all, if fewer), spread evenly over the store, in batches.

    A function of the store and the sizes alone; may be iterated again. Rows are read by whole chunks; a batch mixes
    chunks that lie far apart, for a selection over the batch (batchtopk) is meant for shuffled rows.
    """

    store: ActivationStore
    n_rows: int
    batch_rows: int
    device: torch.device

    def __iter__(self) -> Iterator[Tensor]:
        left, pool = self.n_rows, torch.empty(0, self.store.n_layers, self.store.d_model)
        for start in self._starts():
            stop = min(start + self.store.layout.chunk_rows, self.store.n_rows)
            used_rows = torch.from_numpy(self.store.used_rows(start, stop))
            pool = torch.cat([pool, self.store[start:stop].mlp_in[used_rows]])
            while min(left, len(pool)) >= self.batch_rows:
                yield pool[: self.batch_rows].to(self.device)
                pool, left = pool[self.batch_rows :], left - self.batch_rows
        if min(left, len(pool)) > 0:
            yield pool[:left].to(self.device)

    def _starts(self) -> Iterator[int]:
        """First rows of the chunks to read: every chunk of a batch, then those of the next one."""
        chunk_rows = self.store.layout.chunk_rows
        n_chunks = -(-self.store.n_rows // chunk_rows)
        used_share = self.store.used.count / self.store.n_rows
        # One more, for the used rows are not spread evenly.
        n_read = min(n_chunks, math.ceil(self.n_rows / (chunk_rows * used_share)) + 1)
        chunks = np.linspace(0, n_chunks - 1, n_read).round().astype(np.int64)
        n_batches = -(-self.n_rows // self.batch_rows)
        for first in range(n_batches):
            yield from (int(chunk) * chunk_rows for chunk in chunks[first::n_batches])


def held_out_batches(
    store: ActivationStore, *, batch_rows: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """mlp_in and mlp_out (B, L, D) of the rows that training would use, in order."""
    for start in range(0, store.n_rows, batch_rows):
        stop = min(start + batch_rows, store.n_rows)
        rows, mask = store[start:stop], torch.from_numpy(store.used_rows(start, stop))
        if mask.any():
            yield rows.mlp_in[mask].to(device), rows.mlp_out[mask].to(device)


def _check_subject(config: RunConfig, store: ActivationStore) -> None:
    """By name, or where the names differ (a folder that moved) by what the names lead to."""
    there = store.manifest.subject
    asked = config.subject
    # Local subjects have no revision. Not looked up where it is the one that was asked for: training needs no hub.
    same_revision = not there["revision"] or asked.revision in (there["revision"], there.get("asked_revision"))
    if there["path"] == asked.path and there["dtype"] == asked.dtype.value and same_revision:
        return
    from activation_store.subject import describe_subject  # transformers: seconds, and rarely needed

    info = describe_subject(asked)
    if (info.fingerprint, info.dtype) != (there["fingerprint"], there["dtype"]):
        raise UserError(
            f"store {store.path} is of another subject: {there['path']} ({there['dtype']}, {there['fingerprint']}) "
            f"there, {asked.path} ({asked.dtype.value}, {info.fingerprint}) asked for; give that subject, or harvest "
            "another store"
        )
