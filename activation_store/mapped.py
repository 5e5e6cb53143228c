"""Parts of a file that are in the page cache, read where they lie instead of copied.

A mapped file that is cut short ends the process that touches what is gone (SIGBUS). So the kernel is asked to bring
all pages in first, which fails where one cannot be had; the caller then reads in the usual way, which says why.
"""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from activation_store.files import in_page_cache

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
# Linux 5.14 and newer; Python's mmap does not know it, and keeps the interpreter while it waits.
_MADV_POPULATE_READ = 22
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _madvise, _munmap = _libc.mmap, _libc.madvise, _libc.munmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@contextmanager
def mapped(descriptor: int, start: int, length: int) -> Iterator[Bytes | None]:
    """So many bytes of a file from `start` on, for as long as the context lasts; None where they are better read.

    That is where the first of them is not in the page cache, where the system cannot do it, and where some are missing.
    """
    address = None
    before = start % mmap.PAGESIZE
    if _Supported.populate and in_page_cache(descriptor, start):
        address = _mmap(None, before + length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start - before)
    if address in (None, _FAILED):
        yield None
        return
    try:
        if _madvise(address, before + length, _MADV_POPULATE_READ):
            _Supported.populate = ctypes.get_errno() != errno.EINVAL
            yield None
        elif os.fstat(descriptor).st_size < start + length:
            # What follows the end in its page reads as zeros.
            yield None
        else:
            memory = (ctypes.c_uint8 * (before + length)).from_address(address)
            yield np.ctypeslib.as_array(memory)[before:]
    finally:
        _munmap(address, before + length)


class _Supported:
    populate = sys.platform == "linux"
