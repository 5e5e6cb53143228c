"""The codes of one source layer between the ranks of a feature group, when decoders are split by columns.

Forward, every rank sends its entries to every other: a value, the feature's id within the rank (2 bytes where that is
enough, else 4), and how many entries each token has (1, 2 or 4 bytes, by the largest). Backward, every rank has a
gradient for each entry, from its columns, and sends it to the entry's owner, which adds them in the order of ranks. The
numbers of entries go ahead, so that nothing is padded. All transfers run while the next layers are encoded (or, on the
way back, decoded); `wait` comes where the result is needed.

Legend: B tokens, G ranks, n entries of a rank, N entries of all ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from trainer.kernels.encode_topk import Selection
from trainer.model.features import LayerCodes
from trainer.parallel.mesh import Axis
from trainer.parallel.sums import all_gather

# What a rank says that has more entries than it keeps.
_TOO_MANY = -1
_WIDTHS = ((2**8, torch.uint8), (2**16, torch.int16), (2**31, torch.int32))


class CountsExchange:
    """Tells the ranks of a feature group how many entries each has; the codes stay where they are."""

    def __init__(self, selection: Selection | LayerCodes | None, axis: Axis, device: torch.device) -> None:
        self.axis = axis
        header = torch.tensor([_TOO_MANY, 0], device=device)
        if selection is not None:
            header[0] = selection.values.numel()
            header[1] = selection.offsets.diff().max() if selection.offsets.numel() > 1 else 0
        self._headers = header.new_empty(axis.size, 2)
        self._header = header
        self._work = all_gather(self._headers, header[None], group=axis.group, async_op=True)
        self._counts: list[list[int]] | None = None
        self._codes: LayerCodes | None = None

    def headers(self) -> list[list[int]]:
        """By rank: number of entries, largest number of a token."""
        if self._counts is None:
            assert self._work is not None
            self._work.wait()
            self._counts = self._headers.tolist()
        return self._counts

    def total(self) -> int | None:
        """See Exchange."""
        counts = [count for count, _ in self.headers()]
        return None if _TOO_MANY in counts else sum(counts)

    def send(self, codes: LayerCodes) -> None:
        """See Exchange."""
        self._codes = codes

    def receive(self) -> LayerCodes:
        """See Exchange."""
        assert self._codes is not None
        return self._codes


class CodesExchange(CountsExchange):
    """Hands the codes round."""

    def send(self, codes: LayerCodes) -> None:
        """See Exchange."""
        self._codes, self._n_tokens = codes, codes.n_tokens
        # The node of autograd at which the gradients are waited for, as late as the order of nodes allows.
        self._values: Tensor = _Outgoing.apply(codes.values, self)  # type: ignore[no-untyped-call]
        layouts = [_Layout(codes, count, largest) for count, largest in self.headers()]
        self._layouts = layouts
        mine = layouts[self.axis.rank].pack(codes)
        self._buffers = [
            mine if rank == self.axis.rank else mine.new_empty(layout.n_bytes) for rank, layout in enumerate(layouts)
        ]
        others = [rank for rank in range(self.axis.size) if rank != self.axis.rank]
        self._works = transfer([(rank, mine) for rank in others], [(r, self._buffers[r]) for r in others], self.axis)

    def receive(self) -> LayerCodes:
        """See Exchange."""
        codes = self._codes
        assert codes is not None
        wait(self._works)
        parts = [layout.unpack(buffer) for layout, buffer in zip(self._layouts, self._buffers, strict=True)]
        self._buffers, self._codes = [], None
        self._counts_GB = torch.stack([part.counts_B for part in parts])
        self._offsets = functional.pad(self._counts_GB.sum(dim=0).cumsum(0), (1, 0))
        ids_N = codes.feature_ids.new_empty(sum(part.ids_n.numel() for part in parts))
        for rank, part in enumerate(parts):
            ids_N[self._places(rank)] = part.ids_n + rank * codes.n_features
        values_N = _Incoming.apply(self._values, self, [part.values_n for part in parts])  # type: ignore[no-untyped-call]
        del self._values
        received = LayerCodes(self._offsets, ids_N, values_N, codes.n_features * self.axis.size)
        self._received = received.detach()
        return received

    def merge(self, parts: list[Tensor]) -> Tensor:
        """(n) values by rank -> (N) in order of (token, feature)."""
        merged_N = parts[0].new_empty(sum(part.numel() for part in parts))
        for rank, part in enumerate(parts):
            merged_N[self._places(rank)] = part
        return merged_N

    def start_back(self, grad_N: Tensor) -> Tensor:
        """Sends each rank the gradients of its entries; returns room for this rank's, filled by finish_back."""
        # The decoder is done with the index, which would wait for the other layers.
        self._received.forget_index()
        grad_N = grad_N.contiguous()
        parts = [grad_N[self._places(rank)] for rank in range(self.axis.size)]
        mine = parts[self.axis.rank]
        others = [rank for rank in range(self.axis.size) if rank != self.axis.rank]
        self._back = [mine if rank == self.axis.rank else torch.empty_like(mine) for rank in range(self.axis.size)]
        self._works = transfer([(r, parts[r]) for r in others], [(r, self._back[r]) for r in others], self.axis)
        self._sent = parts
        return torch.empty_like(mine)

    def finish_back(self, grad_n: Tensor) -> Tensor:
        """The sum of what the ranks sent."""
        wait(self._works)
        grad_n.copy_(self._back[0])
        for part in self._back[1:]:
            grad_n += part
        self._back, self._sent = [], []
        return grad_n

    def _places(self, rank: int) -> Tensor:
        """(n) where a rank's entries stand among those of all: in a token, in the order of ranks."""
        counts_B = self._counts_GB[rank]
        before_B = self._offsets[:-1] + self._counts_GB[:rank].sum(dim=0)
        shift_B = before_B - (counts_B.cumsum(0) - counts_B)
        n = self._layouts[rank].count
        return shift_B.repeat_interleave(counts_B, output_size=n) + torch.arange(n, device=counts_B.device)


class _Part:
    """What one rank sent: values, ids within that rank, entries of each token."""

    def __init__(self, values_n: Tensor, ids_n: Tensor, counts_B: Tensor) -> None:
        self.values_n, self.ids_n, self.counts_B = values_n, ids_n, counts_B


class _Layout:
    """The bytes of one rank's codes: values, ids, counts (in this order, the widest first, so that all are aligned)."""

    def __init__(self, like: LayerCodes, count: int, largest: int) -> None:
        self.count, self._n_tokens, self._dtype = count, like.n_tokens, like.values.dtype
        self._ids, self._counts = id_dtype(like.n_features), _narrowest(largest + 1)
        self._lengths = (
            count * self._dtype.itemsize,
            count * self._ids.itemsize,
            self._n_tokens * self._counts.itemsize,
        )
        self.n_bytes = sum(self._lengths)

    def pack(self, codes: LayerCodes) -> Tensor:
        """(n_bytes) uint8."""
        values_n = codes.values.detach().contiguous()
        counts_B = codes.offsets.diff().to(self._counts)
        return torch.cat([t.view(torch.uint8) for t in (values_n, codes.feature_ids.to(self._ids), counts_B)])

    def unpack(self, buffer: Tensor) -> _Part:
        """Its inverse; ids and counts as int64."""
        values, ids, counts = torch.split(buffer, list(self._lengths))
        return _Part(values.view(self._dtype), _widen(ids.view(self._ids)), _widen(counts.view(self._counts)))


def id_dtype(n_features: int) -> torch.dtype:
    """The type in which ids of a rank's features travel."""
    return torch.int16 if n_features <= 2**16 else torch.int32


def _narrowest(n: int) -> torch.dtype:
    """The type that tells 0..n-1 apart."""
    return next(dtype for limit, dtype in _WIDTHS if n <= limit)


def _widen(x: Tensor) -> Tensor:
    """int64; 16 bits are read without a sign."""
    return x.to(torch.int64) & 0xFFFF if x.dtype == torch.int16 else x.to(torch.int64)


class _Outgoing(Function):
    """The values as they leave their owner; backward: the sum of the gradients that came back."""

    @staticmethod
    def forward(ctx: Any, values_n: Tensor, exchange: CodesExchange) -> Tensor:
        ctx.exchange = exchange
        return values_n.view_as(values_n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.finish_back(grads[0]), None


class _Incoming(Function):
    """The values of all ranks; backward: hands their gradients out, and does not wait."""

    @staticmethod
    def forward(ctx: Any, values_n: Tensor, exchange: CodesExchange, parts: list[Tensor]) -> Tensor:
        ctx.exchange = exchange
        return exchange.merge(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.start_back(grads[0]), None, None


def transfer(sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], axis: Axis) -> list[dist.Work]:
    """Starts sends to and receives from ranks of the axis; tensors without elements are left out on both sides."""
    operations = []
    for (to, outgoing), (source, incoming) in zip(sends, receives, strict=True):
        if outgoing.numel():
            operations.append(dist.P2POp(dist.isend, outgoing, group=axis.group, group_peer=to))
        if incoming.numel():
            operations.append(dist.P2POp(dist.irecv, incoming, group=axis.group, group_peer=source))
    return dist.batch_isend_irecv(operations) if operations else []


def wait(works: list[dist.Work]) -> None:
    """For all of them."""
    for work in works:
        work.wait()
