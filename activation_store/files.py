"""Reading parts of a file, wherever it is, into memory that is there already."""

import ctypes
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# (address, bytes) of pieces of memory, (n, 2): C's struct iovec.
Pieces = np.ndarray[Any, np.dtype[np.uint64]]
# preadv takes at most so many pieces on Linux.
_IOV_MAX = 1024
# Linux reads no more for one hint than the disk's read-ahead, and leaves out the rest: this is its default.
_HINT_BYTES = 1 << 17
# preadv fails at once instead of waiting for the disk.
_NO_WAIT = getattr(os, "RWF_NOWAIT", 0)

# Not os.preadv: a Python object for every row of every layer would take longer than copying it.
_preadv = ctypes.CDLL(None, use_errno=True).preadv
_preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong]
_preadv.restype = ctypes.c_ssize_t
# Keeps the interpreter, which threads that read would not give back at once: with _NO_WAIT it never waits.
_peek = getattr(ctypes.PyDLL(None), "preadv2", None)
if _peek is not None:
    _peek.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_int]
    _peek.restype = ctypes.c_ssize_t
_PEEKED = ctypes.create_string_buffer(1)
_PEEK_INTO = np.array([ctypes.addressof(_PEEKED), 1], dtype=np.uint64)
_PEEK_ADDRESS = _PEEK_INTO.ctypes.data


class OpenFile(Protocol):
    """A file of which any number of threads may read parts. Every method may raise OSError."""

    @property
    def size(self) -> int:
        """Bytes of the file."""

    @property
    def descriptor(self) -> int | None:
        """Of the file itself, where there is one."""

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes from `offset` on; fewer if the file ends before."""

    def read_pieces(self, pieces: Pieces, offset: int) -> bool:
        """Fills the pieces, one after another, from `offset` on; False if the file ends before. May change `pieces`."""

    def at_hand(self, offset: int) -> bool:
        """Whether no hint is needed for what is at `offset`."""

    def hint(self, offset: int, length: int) -> None:
        """Says what will be read soon."""


class LocalFile:
    """A file on disk; it is closed when nobody refers to it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.descriptor).st_size

    def __del__(self) -> None:
        # At the end of the process, modules may be gone before.
        if self.descriptor >= 0 and os is not None:
            os.close(self.descriptor)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.descriptor, length, offset)

    def read_pieces(self, pieces: Pieces, offset: int) -> bool:
        return read_descriptor(self.descriptor, pieces, offset)

    def at_hand(self, offset: int) -> bool:
        # Where a hint would look up page by page what is there already.
        if _peek is None or not _NO_WAIT:
            return False
        return bool(_peek(self.descriptor, _PEEK_ADDRESS, 1, offset, _NO_WAIT) == 1)

    def hint(self, offset: int, length: int) -> None:
        if not hasattr(os, "posix_fadvise"):
            # macOS.
            return
        for start in range(offset, offset + length, _HINT_BYTES):
            size = min(_HINT_BYTES, offset + length - start)
            os.posix_fadvise(self.descriptor, start, size, os.POSIX_FADV_WILLNEED)


def read_descriptor(descriptor: int, pieces: Pieces, offset: int) -> bool:
    """Fills the pieces from `offset` on; False if the file ends before."""
    start = 0
    while start < len(pieces):
        group = pieces[start : start + _IOV_MAX]
        got = _preadv(descriptor, group.ctypes.data, len(group), offset)
        if got < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        if got == 0 and group[:, 1].any():
            return False
        offset += got
        ends = np.cumsum(group[:, 1])
        whole = int(np.searchsorted(ends, got, side="right"))
        start += whole
        if whole < len(group):
            # A short read: the rest of the piece in which it ended.
            done = got - (int(ends[whole - 1]) if whole else 0)
            pieces[start] += np.array([done, 0], dtype=np.uint64)
            pieces[start, 1] -= np.uint64(done)
    return True


def copy_to_pieces(data: np.ndarray[Any, Any], byte_start: int, pieces: Pieces) -> None:
    """Copies bytes in memory, from `byte_start` of `data` on, which has as many as the pieces."""
    address = data.ctypes.data + byte_start
    for target, size in pieces.tolist():
        ctypes.memmove(target, address, size)
        address += size
