"""The size of a folder while something else works in it."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Bytes of all files in a folder, again and again; the largest is the first item in the end."""
    largest, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            size = 0
            for where, _, names in os.walk(folder):
                for name in names:
                    with suppress(FileNotFoundError):
                        size += os.stat(os.path.join(where, name)).st_size
            largest[0] = max(largest[0], size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield largest
    finally:
        stop.set()
        thread.join()
