"""Memory is handed out again exactly when nobody can see it any more."""

import numpy as np
import pytest
import torch

from activation_store.buffers import Buffers
from activation_store.codec import from_bits
from activation_store.config import StoreDtype


@pytest.mark.parametrize("size", [100, 3 << 20])
def test_views_and_tensors_keep_memory(size: int) -> None:
    buffers = Buffers()
    dtype = np.dtype(np.uint16)

    def address() -> int:
        return buffers.take((2, size), dtype, keep=1).ctypes.data

    first = address()
    assert address() == first
    for hold in (
        lambda x: x[1],
        lambda x: x.view(np.int16).reshape(size, 2)[::3],
        lambda x: torch.from_numpy(x.view(np.int16))[0, :5],
        lambda x: from_bits(x, StoreDtype.bfloat16).transpose(0, 1)[4:],
    ):
        held = hold(buffers.take((2, size), dtype, keep=1))
        # Another kind of the same size would take the same memory.
        assert buffers.take((size, 2), np.dtype(np.int16), keep=1).ctypes.data != first
        del held
        assert address() == first
