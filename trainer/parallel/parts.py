"""Where a rank's numbers lie in the serial model's tensors: what a checkpoint of any mesh and engine is made of.

A parameter is cut twice: by the feature axis along one dim (trainer.model.collectives), and by an engine that shards
over the data axis, anywhere. Both end up as boxes of the global tensor.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from trainer.model.collectives import Partition, Partitioning
from trainer.saving.pieces import Piece


def is_split(partition: Partition, partitioning: Partitioning) -> bool:
    """Whether ranks of the feature axis hold different parts of what is split so."""
    return partitioning.size > 1 and partitioning.split_dim(partition) is not None


def piece(
    tensor: Tensor,
    partition: Partition,
    partitioning: Partitioning,
    *,
    shape: torch.Size | None = None,
    offsets: tuple[int, ...] | None = None,
) -> Piece:
    """A box of a global tensor.

    tensor: the box. shape: of what this rank of the feature axis holds together with others of the data axis (None:
    it holds all of it), and `offsets` of the box in that.
    """
    whole = list(tensor.shape if shape is None else shape)
    at = list(offsets if offsets is not None else (0,) * tensor.ndim)
    if is_split(partition, partitioning) and whole:
        dim = partitioning.split_dim(partition)
        assert dim is not None
        at[dim] += partitioning.rank * whole[dim]
        whole[dim] *= partitioning.size
    return Piece(tensor.detach(), tuple(whole), tuple(at))


def whole_pieces(
    tensors: Mapping[str, Tensor], partition_of: Mapping[str, Partition], partitioning: Partitioning
) -> dict[str, Piece]:
    """Of tensors that lie whole on every rank of the data axis: model's, or the optimizer's, `<parameter>.<what>`."""
    return {name: piece(tensor, _partition(name, partition_of), partitioning) for name, tensor in tensors.items()}


def _partition(name: str, partition_of: Mapping[str, Partition]) -> Partition:
    """Of a parameter, a buffer, or an entry of a parameter's optimizer state."""
    while name not in partition_of and "." in name:
        name = name.rpartition(".")[0]
    return partition_of.get(name, Partition())


def flat_boxes(flat: Tensor, start: int, shape: torch.Size) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """A run of a tensor's numbers in row-major order, as boxes: offsets, and views of `flat` (1-dim).

    start: place of the run's first number.
    """
    if flat.numel() == 0:
        return
    if len(shape) <= 1:
        yield (start,) * len(shape), flat.view((flat.numel(),) * len(shape))
        return
    row, stop = math.prod(shape[1:]), start + flat.numel()
    first_whole, last_whole = -(-start // row), stop // row
    if first_whole > last_whole:  # within one row
        yield from _row_boxes(flat, start, shape, row)
        return
    head = first_whole * row - start
    yield from _row_boxes(flat[:head], start, shape, row)
    body = (last_whole - first_whole) * row
    if body:
        offsets = (first_whole, *([0] * (len(shape) - 1)))
        yield offsets, flat[head : head + body].view(last_whole - first_whole, *shape[1:])
    yield from _row_boxes(flat[head + body :], last_whole * row, shape, row)


def _row_boxes(flat: Tensor, start: int, shape: torch.Size, row: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Of a run within one row of the first dim."""
    for offsets, box in flat_boxes(flat, start % row, shape[1:]):
        yield (start // row, *offsets), box[None]
