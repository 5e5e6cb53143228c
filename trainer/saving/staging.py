"""A copy of what a checkpoint will hold, in CPU memory, so that training may go on while it is written."""

import torch
from torch import Tensor

from trainer.saving.pieces import Piece, Pieces


class Staging:
    """Buffers that the copies of every checkpoint use again: as many bytes as this rank's part of a checkpoint."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def copy(self, pieces: Pieces) -> Pieces:
        """The same boxes, as they are now; valid until the next call."""
        copies: Pieces = {}
        with torch.no_grad():
            for name, boxes in pieces.items():
                copies[name] = []
                for number, piece in enumerate(boxes):
                    buffer = self._buffer((name, number), piece.tensor)
                    buffer.copy_(piece.tensor, non_blocking=True)
                    copies[name].append(Piece(buffer, piece.shape, piece.offsets))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _buffer(self, key: tuple[str, int], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # Pinned, a GPU copies into it at the speed of its bus.
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer
