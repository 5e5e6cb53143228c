"""torch.distributed.checkpoint's planners for `Piece`s: who writes which box, and who reads what.

DCP itself removes the boxes that several ranks hold from all plans but one, checks that the rest covers every tensor
exactly once, and works out on loading which parts of which boxes a rank wants.
"""

from typing import Any

from torch import Size, Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from trainer.saving.pieces import Piece, Pieces

# DCP logs every entry of a state dict, twice: all pieces are one.
PIECES = "pieces"


class PieceSavePlanner(DefaultSavePlanner):
    """Plans the boxes of a state dict {PIECES: Pieces}."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._tensors: dict[MetadataIndex, Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        """Every box of this rank."""
        pieces: Pieces = self.state_dict[PIECES]
        items = []
        for name, boxes in pieces.items():
            for piece in boxes:
                items.append(_write_item(name, piece))
                self._tensors[items[-1].index] = piece.tensor.detach()
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The numbers of a box, where they are."""
        return self._tensors[write_item.index]


class PieceLoadPlanner(DefaultLoadPlanner):
    """Plans what fills the boxes of a state dict {PIECES: Pieces}."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces: Pieces = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keeps the targets."""
        self._pieces, self.metadata, self.is_coordinator = state_dict[PIECES], metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Parts of stored boxes, and where they go."""
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, boxes in self._pieces.items():
            entry = self.metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            chunks = [ChunkStorageMetadata(Size(piece.offsets), Size(piece.sizes)) for piece in boxes]
            items += create_read_items_for_chunk_list(name, entry, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The target that holds a box."""
        assert index.index is not None
        return self._pieces[index.fqn][index.index].tensor.detach()


def _write_item(name: str, piece: Piece) -> WriteItem:
    tensor = TensorWriteData(
        chunk=ChunkStorageMetadata(Size(piece.offsets), Size(piece.sizes)),
        properties=TensorProperties(dtype=piece.tensor.dtype),
        size=Size(piece.shape),
    )
    return WriteItem(index=MetadataIndex(name, piece.offsets), type=WriteItemType.SHARD, tensor_data=tensor)
