"""What a bit-exact resume depends on besides the checkpoint's tensors: generators, versions, threads, hardware."""

import base64
import platform
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from activation_store.device import make_products_reproducible

_PACKAGES = ("torch", "numpy", "zarr", "safetensors", "layerloom", "numba", "triton")


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every global generator, as JSON values."""
    kind, words, position, has_gauss, cached = np.random.get_state(legacy=True)
    py_version, py_words, py_gauss = random.getstate()
    return {
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "numpy": [kind, np.asarray(words).tolist(), int(position), int(has_gauss), float(cached)],
        "python": [py_version, list(py_words), py_gauss],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Puts back what `rng_state` gave. CUDA generators are restored where as many devices are there."""
    torch.set_rng_state(_decode(state["torch"]))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decode(each) for each in state["cuda"]])
    kind, words, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), position, has_gauss, cached))
    py_version, py_words, py_gauss = state["python"]
    random.setstate((py_version, tuple(py_words), py_gauss))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, thread count and hardware: bit-exactness is promised only where these are the same."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    return {
        "versions": versions,
        "threads": torch.get_num_threads(),
        "device": device.type,
        "hardware": hardware_name(device),
    }


def hardware_name(device: torch.device) -> str:
    """The model of the processor or GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def environment_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One phrase a difference, such as `threads: 2 then, 4 now`."""
    then, now = ({**each, **each["versions"]} for each in (old, new))
    names = [name for name in {**then, **now} if name != "versions" and then.get(name) != now.get(name)]
    return [f"{name}: {then.get(name)} then, {now.get(name)} now" for name in names]


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """The mode in which training runs. On CUDA, asks for deterministic kernels (a warning where there is none) and for
    bf16 products whose sums stay in float32 to the end; the CPU's are so."""
    if device.type != "cuda":
        yield
        return
    make_products_reproducible()
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # A module whose attribute is a property: no type that mypy knows.
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.use_deterministic_algorithms(True, warn_only=True)
    # By default the mode fills every torch.empty with NaN. Kernels write all that is read later, so it shows nothing,
    # and of the buffers of a step it would write gigabytes.
    memory.fill_uninitialized_memory = False
    # Else cuBLAS may cut a long sum into parts and round each to bf16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        memory.fill_uninitialized_memory = filled
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
