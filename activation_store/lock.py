"""One harvest per store: a lock that the system drops when its process ends, however it ends."""

import fcntl
import os
from pathlib import Path

from activation_store.errors import UserError

LOCK = ".harvest.lock"


class HarvestLock:
    """An exclusive flock on a file in the store's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Takes the lock (the folder is created). Raises UserError at once if another process holds it."""
        if self._descriptor is not None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"another process is harvesting into {self._folder}; wait for it, or give another store.path"
            ) from None
        self._descriptor = descriptor

    def release(self) -> None:
        """Drops the lock. The file stays: removing it would let two processes lock two files."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
