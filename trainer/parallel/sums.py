"""Sums over an axis of the mesh, with the backward that the model's convention wants (trainer/model/collectives.py).

Sums of parts that ranks send to one another are added in the order of ranks, so two runs agree bit for bit.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from trainer.parallel.mesh import Axis


class Sum(Function):
    """Sum over the axis; the gradient is multiplied by `factor` (1: what each rank has of a sum that all see)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, factor: int) -> Tensor:
        ctx.factor = factor
        total = x.contiguous().clone()
        dist.all_reduce(total, group=axis.group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] if ctx.factor == 1 else grads[0] * ctx.factor, None, None


class SumInPlace(Function):
    """As Sum with factor 1, in the memory of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        dist.all_reduce(x, group=axis.group)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class SumToOwners(Function):
    """(G * f) parts of every rank -> (f): their sum, of this rank's f; the gradients of all come back."""

    @staticmethod
    def forward(ctx: Any, x_F: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return sum_parts(exchange_equal(x_F.contiguous(), axis).view(axis.size, -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather_equal(grads[0].contiguous(), ctx.axis).flatten(0, 1), None


def all_gather(out: Tensor, x: Tensor, *, group: dist.ProcessGroup | None, async_op: bool = False) -> dist.Work | None:
    """torch's, under the name that it has since 2.13, where the one before warns."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(out, x, group=group, async_op=async_op)
    return work


def exchange_equal(x: Tensor, axis: Axis) -> Tensor:
    """Equal parts of dim 0 by rank that is to have them -> by rank that they come from."""
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=axis.group)
    return received


def gather_equal(x: Tensor, axis: Axis) -> Tensor:
    """(G, ...): x of every rank."""
    gathered = x.new_empty(axis.size, *x.shape)
    all_gather(gathered, x[None], group=axis.group)
    return gathered


def sum_parts(parts: Tensor | list[Tensor]) -> Tensor:
    """Sum over the first dim, in its order."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def gather_lists(x_N: Tensor, size: int, group: dist.ProcessGroup | None) -> Tensor:
    """Lists of any lengths, one after the other."""
    lengths = x_N.new_empty(size, dtype=torch.int64)
    all_gather(lengths, lengths.new_tensor([x_N.numel()]), group=group)
    counts = lengths.tolist()
    padded = x_N.new_zeros(max(counts))
    padded[: x_N.numel()] = x_N
    gathered = x_N.new_empty(size * padded.numel())
    all_gather(gathered, padded, group=group)
    rows = gathered.view(size, -1)
    return torch.cat([rows[rank, :count] for rank, count in enumerate(counts)])
