"""Batches to a GPU, beside its work: copied as stored from pinned memory on their own stream, and decoded there."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from activation_store.codec import Encoded, decode


class DeviceCopier:
    """Copies and decodes on a side stream. `copy` is for the reader's thread, `wait` for the consumer's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Copies in flight: what they read from must not be used again before.
        self._flying: deque[tuple[torch.cuda.Event, Sequence[Encoded]]] = deque()

    def copy(self, parts: Sequence[Encoded], *, decoded: bool) -> list[Encoded]:
        """Begins to copy parts from pinned memory, and to decode them there if wanted; returns at once."""
        while self._flying and self._flying[0][0].query():  # type: ignore[no-untyped-call]
            self._flying.popleft()
        with torch.cuda.stream(self._stream):
            there = [self._moved(part) for part in parts]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            if decoded:
                there = [Encoded(decode(part)) for part in there]
            event.record(self._stream)
        self._flying.append((event, parts))
        return there

    def wait(self, *tensors: Tensor) -> None:
        """Makes the consumer's stream wait for what was copied so far, and keeps memory until that stream is done."""
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)

    def _moved(self, part: Encoded) -> Encoded:
        scale = None if part.scale is None else part.scale.to(self._device, non_blocking=True)
        return Encoded(part.values.to(self._device, non_blocking=True), scale)
