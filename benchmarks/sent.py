"""Counts the bytes that this rank sends: at the calls into torch.distributed, or at its process groups.

An all-reduce of n bytes over G ranks counts as 2 (G - 1) / G n (a ring's), an exchange of equal parts as (G - 1) / G n,
a gather as (G - 1) n.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def calls_counted() -> Iterator[Counter[str]]:
    """Bytes that this rank sends while the context lasts, by the name of the call into torch.distributed."""
    sent: Counter[str] = Counter()
    kept = {name: getattr(dist, name) for name in (*_CALLS, "batch_isend_irecv") if hasattr(dist, name)}

    def call(name: str, *args: Any, **kwargs: Any) -> Any:
        sent[name] += _CALLS[name](args, dist.get_world_size(kwargs.get("group")))
        return kept[name](*args, **kwargs)

    def batch(operations: list[dist.P2POp]) -> Any:
        sent["isend"] += sum(op.tensor.nbytes for op in operations if op.op is dist.isend)
        return kept["batch_isend_irecv"](operations)

    for name in kept:
        setattr(dist, name, batch if name == "batch_isend_irecv" else partial(call, name))
    try:
        yield sent
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


# Bytes sent by one of n ranks, from the positional arguments of the call.
_CALLS: dict[str, Callable[[tuple[Any, ...], int], float]] = {
    "all_reduce": lambda args, n: 2 * (n - 1) / n * args[0].nbytes,
    "all_to_all_single": lambda args, n: (n - 1) / n * args[1].nbytes,
    "all_gather_single": lambda args, n: (n - 1) * args[1].nbytes,
    "all_gather_into_tensor": lambda args, n: (n - 1) * args[1].nbytes,
    "reduce_scatter_tensor": lambda args, n: (n - 1) / n * args[1].nbytes,
}


# Bytes sent by one of n ranks, from the arguments of a process group's method.
_METHODS: dict[str, Callable[[tuple[Any, ...], int], float]] = {
    "allreduce": lambda args, n: 2 * (n - 1) / n * _bytes(args[0]),
    "reduce": lambda args, n: (n - 1) / n * _bytes(args[0]),
    "_allgather_base": lambda args, n: (n - 1) * _bytes(args[1]),
    "allgather": lambda args, n: (n - 1) * _bytes(args[1]),
    "_reduce_scatter_base": lambda args, n: (n - 1) / n * _bytes(args[1]),
    "all_gather_single": lambda args, n: (n - 1) * _bytes(args[1]),
    "allgather_into_tensor_coalesced": lambda args, n: (n - 1) * _bytes(args[1]),
    "reduce_scatter_single": lambda args, n: (n - 1) / n * _bytes(args[1]),
}


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in ([tensors] if isinstance(tensors, torch.Tensor) else tensors))


@contextmanager
def groups_counted() -> Iterator[Counter[str]]:
    """The same by methods of process groups: libraries keep torch.distributed's functions, but all call these."""
    sent: Counter[str] = Counter()
    # What the class itself has binds to a group; what it gives when asked does not.
    kept = {name: vars(dist.ProcessGroup)[name] for name in _METHODS if name in vars(dist.ProcessGroup)}

    def method(name: str) -> Callable[..., Any]:
        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            sent[name] += _METHODS[name](args, group.size())
            return kept[name].__get__(group)(*args, **kwargs)

        return call

    for name in kept:
        setattr(dist.ProcessGroup, name, method(name))
    try:
        yield sent
    finally:
        for name, function in kept.items():
            setattr(dist.ProcessGroup, name, function)
