"""Runs kernels on the threads that torch already has.

torch's own parallel loops run on libgomp. A second pool of threads would fight with it for the cores (its idle threads
spin for a while), so kernels are handed to the very library that torch has loaded. Where there is none (macOS, other
OpenMP runtimes) they run on a plain pool: machine code that holds no interpreter lock.
"""

import ctypes
import functools
import struct
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from trainer.kernels.cpu.compiling import BLOCK, Kernel


def launch(kernel: Kernel, parts: int, *arguments: int | Tensor) -> None:
    """Run `kernel` until its `parts` are done, on at most torch.get_num_threads() threads.

    Tensors go as addresses; the caller keeps them alive and knows their strides.
    """
    if parts <= 0:
        return
    words = [value if isinstance(value, int) else value.data_ptr() for value in arguments]
    block = (ctypes.c_int64 * BLOCK)(0, parts, *words)
    run = _open_mp()
    n_threads = min(torch.get_num_threads(), parts)
    address = ctypes.addressof(block)
    if n_threads == 1:
        kernel.function(address)
    elif run is not None:
        run(kernel.address, address, n_threads, 0)
    else:
        run_on_pool(kernel, address, n_threads)


def run_on_pool(kernel: Kernel, address: int, n_threads: int) -> None:
    """The same without OpenMP."""
    function = kernel.function
    list(_pool(n_threads).map(function, [address] * n_threads))


def float_bits(value: float) -> int:
    """A float64 as the int64 with its bits."""
    bits: int = struct.unpack("q", struct.pack("d", value))[0]
    return bits


@functools.cache
def _open_mp() -> "ctypes._FuncPointer | None":
    """GOMP_parallel of the libgomp that torch runs on, or None."""
    library = find_libgomp()
    if library is None:
        return None
    try:
        run = ctypes.CDLL(library).GOMP_parallel
    except (OSError, AttributeError):
        return None
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    run.restype = None
    return run


def find_libgomp() -> str | None:
    """Path of the libgomp in this process; torch's own where several are loaded (other packages bring one, too)."""
    if sys.platform != "linux":
        return None
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return torchs_own({line.split(maxsplit=5)[5] for line in mapped if "libgomp" in line}, Path(torch.__file__).parent)


def torchs_own(libraries: Iterable[str], torch_folder: Path) -> str | None:
    """The library that lies in torch's folder or, as wheels keep them, beside it in `torch.libs`; else any, or None.

    Another package's in the same site-packages is a pool of its own, whose idle threads would fight with torch's.
    """
    homes = (torch_folder, torch_folder.with_name(f"{torch_folder.name}.libs"))
    found = sorted(libraries)
    ours = [path for home in homes for path in found if home in Path(path).parents]
    return next(iter([*ours, *found]), None)


@functools.cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="layerloom-kernel")
