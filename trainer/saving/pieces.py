"""What a rank gives to a checkpoint: its boxes of global tensors, under the names of the serial model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A rank's part of a global tensor of `shape`: the box that begins at `offsets` and is as large as `tensor`.

    Ranks that hold the same box hold the same numbers: one of them writes it.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The box's."""
        return tuple(self.tensor.shape)


# By name: a tensor that this rank holds whole, its box of one, or its boxes (an engine that cuts parameters anywhere).
State = Mapping[str, Tensor | Piece | Sequence[Piece]]
Pieces = dict[str, list[Piece]]


def as_pieces(state: State) -> Pieces:
    """Every entry as boxes."""
    return {name: _boxes(value) for name, value in state.items()}


def whole(tensor: Tensor) -> Piece:
    """A tensor that this rank holds whole."""
    return Piece(tensor.detach(), tuple(tensor.shape), (0,) * tensor.ndim)


def local_bytes(pieces: Iterable[list[Piece]]) -> int:
    """Bytes of this rank's boxes."""
    return sum(piece.tensor.numel() * piece.tensor.element_size() for boxes in pieces for piece in boxes)


def _boxes(value: Tensor | Piece | Sequence[Piece]) -> list[Piece]:
    if isinstance(value, Tensor):
        return [whole(value)]
    return [value] if isinstance(value, Piece) else list(value)
