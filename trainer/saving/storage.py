"""torch.distributed.checkpoint's storage, here: a safetensors file for each rank, and index.json.

    model_00000.safetensors, model_00001.safetensors, ...   what rank 0, 1, ... writes of the model
    optimizer_00000.safetensors, ...                        and of the optimizer

DCP's own writer pickles an index and every tensor. These files need no unpickling, are hashed as they are written, and
are read a part at a time; their headers say where each box lies in its tensor as torch's HuggingFaceStorageReader
wants it, so that torch alone can read them.
"""

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Size
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from activation_store.places import Place
from trainer.saving.index import KINDS, Chunk, Index, TensorEntry
from trainer.saving.reader import CheckpointReader
from trainer.tensor_file import WrittenFile, bytes_of, file_layout, write_pieces


class CancelledError(Exception):
    """Writing was asked to stop."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a box was written, and what became of its file."""

    file: str
    begin: int
    written: WrittenFile


class PartsWriter(StorageWriter):
    """Writes each rank's boxes into files of its own below `folder`.

    begin: called on the coordinator before anybody writes; commit: on the coordinator, with the index and all files,
    once everybody has written. Names in the state dict are `kind/name`. cancelled: when set, writing stops with
    CancelledError.
    """

    def __init__(
        self,
        folder: Place,
        *,
        begin: Callable[[], None],
        commit: Callable[[Index, Mapping[str, WrittenFile]], None],
        cancelled: threading.Event,
    ) -> None:
        self._folder, self._begin, self._commit, self._cancelled = folder, begin, commit, cancelled

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a writer is of one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan itself."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Makes the folder ready, and tells every rank its number."""
        self._begin()
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One file for each kind of which this rank writes anything."""
        by_kind = defaultdict(list)
        for item in plan.items:
            by_kind[item.index.fqn.split("/", 1)[0]].append(item)
        results = []
        for kind, items in by_kind.items():
            results += self._write_file(f"{kind}_{plan.storage_data:05d}.safetensors", items, planner)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Makes the checkpoint whole."""
        stored = {result.index: result.storage_data for each in results for result in each}
        files = {where.file: where.written for where in stored.values()}
        self._commit(_index(metadata, stored), files)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never: folders are given to the constructor."""
        return False

    def _write_file(self, file: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        named = _keys(items)
        layout = file_layout(
            {key: (_data(item).properties.dtype, tuple(_data(item).chunk.sizes)) for key, item in named.items()},
            _sharding_info(named),
        )

        def pieces() -> Iterator[bytes | memoryview]:
            yield layout.head
            for key in layout.begins:
                for piece in bytes_of(planner.resolve_data(named[key])):  # type: ignore[arg-type]
                    if self._cancelled.is_set():
                        raise CancelledError
                    yield piece

        written = write_pieces(self._folder / file, pieces)
        return [WriteResult(item.index, 0, _Stored(file, layout.begins[key], written)) for key, item in named.items()]


class PartsReader(StorageReader):
    """Fills the boxes of a plan from a checkpoint's files."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self._entries = {f"{kind}/{name}": entry for kind in KINDS for name, entry in reader.entries(kind).items()}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a reader is of one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index as DCP has it."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=entry.dtype),
                    Size(entry.shape),
                    [ChunkStorageMetadata(Size(chunk.offsets), Size(chunk.sizes)) for chunk in entry.chunks],
                )
                for name, entry in self._entries.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan itself."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans themselves."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads every item straight into its target."""
        for item in plan.items:
            entry = self._entries[item.storage_index.fqn]
            assert item.storage_index.index is not None
            chunk = entry.chunks[item.storage_index.index]
            with torch.no_grad():
                target = planner.resolve_tensor(item)
                self._reader.read_box(entry.dtype, chunk, tuple(item.storage_offsets), target)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never: checkpoints are given to the constructor."""
        return False


def _index(metadata: Metadata, stored: Mapping[MetadataIndex, _Stored]) -> Index:
    index: dict[str, dict[str, TensorEntry]] = {kind: {} for kind in KINDS}
    for full_name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        kind, name = full_name.split("/", 1)
        chunks = []
        for chunk in entry.chunks:
            where = stored[MetadataIndex(full_name, chunk.offsets)]
            chunks.append(Chunk(where.file, where.begin, tuple(chunk.offsets), tuple(chunk.sizes)))
        index[kind][name] = TensorEntry(entry.properties.dtype, tuple(entry.size), tuple(chunks))
    return index


def _keys(items: list[WriteItem]) -> dict[str, WriteItem]:
    """The items by their key in the file: the tensor's name, with a number from its second box on."""
    named: dict[str, WriteItem] = {}
    for item in items:
        name = key = item.index.fqn.split("/", 1)[1]
        number = 1
        while key in named:
            number += 1
            key = f"{name}#{number}"
        named[key] = item
    return named


def _sharding_info(named: Mapping[str, WriteItem]) -> dict[str, str]:
    """Header strings for torch's HuggingFaceStorageReader."""
    offsets = {key: {"saved_offsets": list(_data(item).chunk.offsets)} for key, item in named.items()}
    return {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}


def _data(item: WriteItem) -> Any:
    assert item.tensor_data is not None
    return item.tensor_data
