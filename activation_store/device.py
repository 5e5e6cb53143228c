"""The device that a config's `device` means, and what must hold before a process computes on it."""

import os

import torch

from activation_store.errors import UserError


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA when there is a usable GPU, else the CPU; others are torch's own names (`cpu`, `cuda:1`, `mps`).

    All that computes asks here first, so products on CUDA are reproducible from the first one of the process on.
    Raises UserError for a name that torch does not know or a device that is not there.
    """
    device = _device(name)
    if device.type == "cuda":
        make_products_reproducible()
    return device


def make_products_reproducible() -> None:
    """Lets cuBLAS sum in one order in every run, for whoever makes a device without `resolve_device`.

    torch and cuBLAS read the variable once, at the first product of the process: later it changes nothing, and torch
    warns at every product of a deterministic run. What the user has set stays.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _device(name: str) -> torch.device:
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
