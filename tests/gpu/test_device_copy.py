"""Batches copied to a CUDA device beside its work: what lay in the memory then, though it is used again at once.

Needs torch, numpy and pytest only.
"""

import numpy as np
import pytest
import torch

from activation_store.buffers import Buffers
from activation_store.codec import Encoded, decode, encode, from_bits, stored_bits
from activation_store.config import StoreDtype
from activation_store.device_copy import DeviceCopier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS, WIDTH = 512, 96
# Clock cycles that a stream is kept busy for: some tens of milliseconds.
BUSY = 100_000_000


def in_pinned_memory(rows: Encoded, dtype: StoreDtype, buffers: Buffers) -> Encoded:
    """A copy in memory that `buffers` lends."""
    bits = stored_bits(rows.values)
    values = buffers.take(bits.shape, bits.dtype, keep=4)
    values[:] = bits
    if rows.scale is None:
        return Encoded(from_bits(values, dtype))
    scale = buffers.take(tuple(rows.scale.shape), np.dtype(np.float32), keep=4)
    scale[:] = rows.scale.numpy()
    return Encoded(from_bits(values, dtype), torch.from_numpy(scale))


def some_rows(dtype: StoreDtype, seed: int) -> Encoded:
    return encode(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)), dtype)


def same_bits(found: Encoded, wanted: Encoded) -> bool:
    found = found.cpu()
    if not np.array_equal(stored_bits(found.values), stored_bits(wanted.values)):
        return False
    return (found.scale is None) if wanted.scale is None else torch.equal(found.scale, wanted.scale)


@pytest.mark.parametrize("decoded", [False, True], ids=["as stored", "decoded"])
@pytest.mark.parametrize("dtype", list(StoreDtype))
def test_copies_equal_their_source_though_its_memory_is_lent_again(dtype: StoreDtype, decoded: bool) -> None:
    """The device is busy, so that no copy has begun when the next batch takes memory."""
    device = torch.device("cuda")
    copier, buffers = DeviceCopier(device), Buffers(pinned=True)
    sources = [some_rows(dtype, seed) for seed in range(6)]
    with torch.cuda.stream(copier._stream):
        torch.cuda._sleep(BUSY)
    copies = [copier.copy([in_pinned_memory(rows, dtype, buffers)], decoded=decoded)[0] for rows in sources]
    for there, rows in zip(copies, sources, strict=True):
        copier.wait(*(tensor for tensor in (there.values, there.scale) if tensor is not None))
        if decoded:
            # The same numbers on every device.
            assert torch.equal(there.values.cpu(), decode(rows))
        else:
            assert same_bits(there, rows)


def test_memory_is_held_while_a_copy_is_on_its_way_and_no_longer() -> None:
    device = torch.device("cuda")
    copier, buffers = DeviceCopier(device), Buffers(pinned=True)
    rows = some_rows(StoreDtype.float16, 0)

    def copied() -> int:
        part = in_pinned_memory(rows, StoreDtype.float16, buffers)
        address = part.values.data_ptr()
        copier.copy([part], decoded=False)
        return address

    with torch.cuda.stream(copier._stream):
        torch.cuda._sleep(BUSY)
    flying = {copied() for _ in range(3)}
    assert len(flying) == 3
    torch.cuda.synchronize(device)
    # It learns at its next copy that those before are done.
    last = copied()
    torch.cuda.synchronize(device)
    assert copied() in flying | {last}


def test_the_consumer_waits_for_what_was_copied() -> None:
    copier, buffers = DeviceCopier(torch.device("cuda")), Buffers(pinned=True)
    rows = some_rows(StoreDtype.float32, 0)
    with torch.cuda.stream(copier._stream):
        torch.cuda._sleep(BUSY)
    (there,) = copier.copy([in_pinned_memory(rows, StoreDtype.float32, buffers)], decoded=False)
    copier.wait(there.values)
    # On the consumer's stream, without waiting on the processor before.
    doubled = there.values * 2
    assert torch.equal(doubled.cpu(), rows.values * 2)
