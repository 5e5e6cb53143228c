"""The device that a config's `device` means."""

import torch

from activation_store.errors import UserError


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA when there is a usable GPU, else the CPU; others are torch's own names (`cpu`, `cuda:1`, `mps`).

    Raises UserError for a name that torch does not know or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"device={name} is not there (CUDA devices found: {count}); use device=auto or device=cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps is not there; use device=auto or device=cpu")
    return device
