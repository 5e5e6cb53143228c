"""A folder that is replaced whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from activation_store.atomic import free_bytes, fsync_folder
from activation_store.errors import UserError
from activation_store.progress import human_bytes


def check_space(output: Path, needed: int) -> None:
    """Raises UserError when the disk of `output` cannot hold `needed` bytes more (and a little for the other files)."""
    needed += 16_000_000
    free = free_bytes(output)
    if free < needed:
        raise UserError(
            f"output={output} needs {human_bytes(needed)} and {human_bytes(free)} are free; free some space, choose "
            "another disk, or publish.dtype=bfloat16"
        )


@contextmanager
def replaced_folder(output: Path) -> Iterator[Path]:
    """Yields an empty folder beside `output` that takes its place when the block ends; on an exception it is removed.

    A disk that fills (OSError ENOSPC) raises UserError.
    """
    output = output.resolve()
    partial, old = output.parent / f".{output.name}.partial", output.parent / f".{output.name}.old"
    if old.exists() and not output.exists():  # a process was killed between the two renames below
        old.rename(output)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        _sync(partial)
        if output.exists():
            output.rename(old)
        partial.rename(output)
        fsync_folder(output.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk of {output} is full (free: {human_bytes(free_bytes(output.parent))}); what was written is "
            "removed; free some space or choose another output, and publish again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        else:
            fsync_folder(file)
    fsync_folder(folder)
