"""A number of the device that the host wants later: it travels while more work is queued behind it."""

import torch
from torch import Tensor


class Later:
    """Begins the copy of an integer tensor with one element; `int()` waits for that copy alone, not for later work."""

    def __init__(self, number: Tensor) -> None:
        self._host = torch.empty(number.shape, dtype=number.dtype, device="cpu", pin_memory=number.is_cuda)
        self._host.copy_(number, non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if number.is_cuda:
            with torch.cuda.device_of(number):
                self._event = torch.cuda.Event()
                self._event.record()

    def __int__(self) -> int:
        if self._event is not None:
            self._event.synchronize()
        return int(self._host)
