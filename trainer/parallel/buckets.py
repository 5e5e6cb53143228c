"""The sum of gradients over the data axis, in buckets, while the backward pass still computes.

A bucket is one flat tensor with the gradients of a few parameters, in the reverse order of layers, which is that of the
backward pass. Which parameter lies where is decided before step 1, and buckets are summed in one order: so a sum over
ranks adds the same numbers in the same order in every step and in every run, and a resumed run has the same bits.
(DDP rebuilds its buckets after the first step.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.model.runtime import GradientBuffers, gradient_dtype
from trainer.parallel.mesh import Axis


@dataclass(slots=True)
class _Bucket:
    """A flat tensor of gradients, and how many of them the backward pass still owes."""

    flat: Tensor
    names: list[str]
    missing: set[str] = field(default_factory=set)


class GradientSum:
    """Sums the gradients of `parameters` over an axis of the mesh.

    Large gradients are written into the buckets by the backward pass itself (GradientBuffers); the others are copied.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], axis: Axis, buffers: GradientBuffers, *, bucket_bytes: int
    ) -> None:
        self._parameters, self._axis = parameters, axis
        self._buckets: list[_Bucket] = []
        self._views: dict[str, Tensor] = {}
        self._bucket_of: dict[str, _Bucket] = {}
        for names in _layout(parameters, bucket_bytes):
            self._allocate(names)
        for name, view in self._views.items():
            buffers.keep(parameters[name], view)
        self._launched: list[dist.Work] = []
        self._armed = False
        # The nodes are kept: torch drops those that nothing holds, and their hooks with them.
        self._nodes = [self._watch(name, parameter) for name, parameter in parameters.items()]

    def arm(self) -> None:
        """The next backward pass completes the gradients: sum them as they become ready."""
        self._armed = True
        for bucket in self._buckets:
            bucket.missing = set(bucket.names)

    def finish(self) -> None:
        """After that pass: what it left without a gradient counts as zeros; waits until every gradient is the sum."""
        for bucket in self._buckets:
            for name in sorted(bucket.missing):
                self._ready(name)
        for work in self._launched:
            work.wait()
        self._launched, self._armed = [], False

    def _allocate(self, names: list[str]) -> None:
        first = self._parameters[names[0]]
        sizes = [self._parameters[name].numel() for name in names]
        flat = torch.zeros(sum(sizes), dtype=gradient_dtype(first), device=first.device)
        bucket = _Bucket(flat, names)
        self._buckets.append(bucket)
        for name, part in zip(names, torch.split(flat, sizes), strict=True):
            self._views[name] = part.view(self._parameters[name].shape)
            self._bucket_of[name] = bucket

    def _watch(self, name: str, parameter: nn.Parameter) -> Any:
        """A hook that runs once a pass, after all gradients of `parameter`, those too that went to its buffer and of
        which autograd was given nothing.
        """
        node = torch.autograd.graph.get_gradient_edge(parameter).node
        node.register_hook(self._when_ready(name))
        return node

    def _when_ready(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if self._armed:
                self._ready(name)

        return hook

    def _ready(self, name: str) -> None:
        parameter, view, bucket = self._parameters[name], self._views[name], self._bucket_of[name]
        if parameter.grad is None:
            view.zero_()
        elif parameter.grad.data_ptr() != view.data_ptr():
            view.copy_(parameter.grad)
        parameter.grad = view
        bucket.missing.discard(name)
        # In the order of the layout on every rank, whatever the order in which they are filled.
        for waiting in self._buckets[len(self._launched) :]:
            if waiting.missing:
                return
            work = dist.all_reduce(waiting.flat, group=self._axis.group, async_op=True)
            assert work is not None
            self._launched.append(work)


def _layout(parameters: Mapping[str, nn.Parameter], bucket_bytes: int) -> list[list[str]]:
    """Names by bucket: parameters from the last to the first, a new bucket where the dtype changes or one is full."""
    buckets: list[list[str]] = []
    size, dtype = 0, None
    for name, parameter in reversed(list(parameters.items())):
        n_bytes = parameter.numel() * gradient_dtype(parameter).itemsize
        if not buckets or size + n_bytes > bucket_bytes or gradient_dtype(parameter) != dtype:
            buckets.append([])
            size, dtype = 0, gradient_dtype(parameter)
        buckets[-1].append(name)
        size += n_bytes
    return buckets
