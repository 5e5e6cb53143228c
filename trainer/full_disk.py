"""A disk that fills, wherever it is met, in one line that names the command that continues."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from activation_store.atomic import free_bytes
from activation_store.errors import UserError
from activation_store.progress import human_bytes


@contextmanager
def full_disk_told(folder: Path, command: str) -> Iterator[None]:
    """Turns an OSError of a full disk or quota into a UserError that names `command`; other errors stay as they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk of {folder} is full (free: {human_bytes(free_bytes(folder))}); free some space and continue "
            f"with `{command}`"
        ) from error
