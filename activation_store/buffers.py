"""Memory that is used again: fresh pages cost more than filling them."""

import mmap
import sys
from math import prod
from typing import Any

import numpy as np
import torch

# From here on huge pages are asked for: rows are scattered, and each small page would miss the address cache.
_HUGE_BYTES = 1 << 21


class Buffers:
    """Arrays that are handed out again once nobody refers to them. Not thread-safe."""

    def __init__(self, *, pinned: bool = False) -> None:
        """`pinned`: memory that a GPU can copy from while the processor does something else."""
        self._pinned = pinned
        self._kept: list[np.ndarray[Any, Any]] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any], *, keep: int) -> np.ndarray[Any, Any]:
        """An array with any content. It is kept for another time unless `keep` of its kind are there already."""
        size, alike = prod(shape) * dtype.itemsize, 0
        for memory in self._kept:
            if memory.nbytes != size:
                continue
            # References: the list's, the loop's, and getrefcount's own. What is handed out is a view: it, its own views
            # and tensors over them refer to this array, the first one over the memory.
            if sys.getrefcount(memory) == 3:
                return memory.view(dtype).reshape(shape)
            alike += 1
        memory = self._allocate(size)
        if alike < keep:
            self._kept.append(memory)
        return memory.view(dtype).reshape(shape)

    def _allocate(self, size: int) -> np.ndarray[Any, Any]:
        if self._pinned:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        if size < _HUGE_BYTES:
            return np.empty(size, dtype=np.uint8)
        # Shared memory, the default, gets no huge pages.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, dtype=np.uint8)
