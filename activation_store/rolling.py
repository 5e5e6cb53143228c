"""A store with a byte budget: which windows may be on disk, and the freeing of those that training is done with.

`rolling.json` says `first`, the window before which nothing is harvested any more, `freed`, the window before which
nothing is on disk any more, and `windows`, how many fit in the budget. A worker harvests window w only where first <=
w < freed + windows: so the budget holds without workers knowing of one another. Training alone changes the file.

Letters: L layers, D d_model.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from activation_store.atomic import json_bytes
from activation_store.errors import UserError
from activation_store.layout import StoreLayout
from activation_store.manifest import COMMITS, MANIFEST, Commit, StoreManifest, commit_name, committed_windows
from activation_store.places import Place
from activation_store.progress import human_bytes
from activation_store.storage import LocalStorage
from activation_store.windows import WINDOWS

ROLLING, LOCK = "rolling.json", "rolling.lock"
# Manifest, claims and this file.
_FIXED_BYTES = 65_536
# Of a window's commit, besides its sums: what a context's document takes, and a shard's file.
_DOCUMENT_BYTES, _FILE_BYTES = 160, 128


@dataclass(frozen=True, slots=True)
class RollingState:
    """Content of rolling.json. `finished`: training is done, harvests end."""

    windows: int
    first: int = 0
    freed: int = 0
    finished: bool = False

    def allows(self, window: int) -> bool:
        """Whether a window may be harvested now."""
        return not self.finished and self.first <= window < self.freed + self.windows


def window_bytes(layout: StoreLayout, rows: int, contexts: int) -> int:
    """Most bytes that a window of so many rows in so many contexts takes on disk, commit and record included."""
    shards, chunks = layout.shards_of(rows), -(-rows // layout.chunk_rows)
    index = sum(shards * (16 * array.slots + 4) for array in layout.arrays())
    # What cannot be compressed gets 16 bytes more.
    values = chunks * sum(array.chunks_abreast * (array.chunk_bytes + 16) for array in layout.arrays())
    # Four float64 sums (L, D) and the sums of norms, in base64.
    sums = 4 * layout.n_layers * layout.d_model * 11 + layout.n_layers * 22
    return values + index + sums + contexts * _DOCUMENT_BYTES + (shards * len(layout.arrays()) + 8) * _FILE_BYTES


def windows_within(budget_bytes: int, bytes_of_window: int) -> int:
    """How many windows a budget holds."""
    return max(0, (budget_bytes - _FIXED_BYTES) // bytes_of_window)


def budget_for(windows: int, bytes_of_window: int) -> int:
    """The least budget that holds so many windows."""
    return windows * bytes_of_window + _FIXED_BYTES


class RollingFolder:
    """The folder of a rolling store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.storage = folder, LocalStorage(folder)

    def exists(self) -> bool:
        return (self.folder / ROLLING).is_file()

    def check(self) -> None:
        """Raises UserError for a folder that is something else."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"store.path={self.folder} is a file; give a folder")
        if (self.folder / MANIFEST).exists() and not self.exists():
            raise UserError(
                f"store {self.folder} is a store that stays; use source=disk, or another store.path for source=rolling"
            )

    def read(self) -> RollingState:
        """Raises FileNotFoundError before anybody began."""
        return RollingState(**json.loads(self.storage.get(ROLLING)))

    def join(self, windows: int) -> RollingState:
        """What the state is, or is from now on: for a worker."""
        self.storage.put_if_absent(ROLLING, [json_bytes(asdict(RollingState(windows)))])
        return self.read()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second training from emptying the same store (UserError)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"store {self.folder} is being read and emptied by another run; give another store.path"
                ) from None
            yield
        finally:
            os.close(descriptor)

    def begin(self, first: int, windows: int) -> RollingState:
        """Training begins at window `first`, with so many windows on disk at most.

        What is before is freed. Where that is gone already (an older checkpoint is continued), harvests begin there
        again, and what would not fit beside is freed, too.
        """
        state = replace(self.join(windows), windows=windows, finished=False)
        if state.first > first:
            state = replace(state, first=first, freed=first)
        self._write(state)
        self._remove(window for window in committed_windows(self.folder) if window >= state.freed + windows)
        return self.free(first)

    def free(self, first: int) -> RollingState:
        """Windows before `first` are not needed any more."""
        state = self.read()
        if first > state.first or state.freed < state.first:
            state = replace(state, first=max(first, state.first))
            # Before they go: nobody harvests them again.
            self._write(state)
            self._remove(window for window in committed_windows(self.folder) if window < state.first)
            # The last one says where the next begins.
            for key in list(self.storage.list(WINDOWS)):
                if int(Path(key).stem) < state.first - 1:
                    self.storage.delete(key)
            state = replace(state, freed=state.first)
            self._write(state)
        return state

    def finish(self) -> None:
        """Training is done: harvests end."""
        self._write(replace(self.read(), finished=True))

    def epoch_of(self, window: int) -> int:
        """How often the text had ended before a window that is on disk."""
        return int(json.loads(self.storage.get(f"{WINDOWS}/{window:08d}.json"))["epoch"])

    def remove(self, window: int) -> None:
        """Removes a window that is committed."""
        path = self.folder / COMMITS / commit_name(window)
        files = Commit.load(path).files
        # Its rows may be missing from now on.
        path.unlink()
        for key in files:
            self.storage.delete(key)
            _remove_partials(self.folder / key)
            self._remove_empty(Path(key).parent)

    def remove_partials(self, first_shard: int, rows: int) -> None:
        """Removes what killed workers left of the shards of a window."""
        layout = StoreManifest.load(self.folder).layout
        for shard in range(first_shard, first_shard + layout.shards_of(rows)):
            for array in layout.arrays():
                _remove_partials(self.folder / array.shard_key(shard))

    def _remove_empty(self, key: Path) -> None:
        """Removes the folders of a shard, as far as nothing else is in them."""
        with suppress(OSError):
            while len(key.parts) > 2:
                (self.folder / key).rmdir()
                key = key.parent

    def _remove(self, windows: Iterator[int]) -> None:
        for window in list(windows):
            self.remove(window)

    def _write(self, state: RollingState) -> None:
        self.storage.put(ROLLING, json_bytes(asdict(state)))


def _remove_partials(file: Path) -> None:
    for partial in file.parent.glob(f".{file.name}.*.partial"):
        partial.unlink(missing_ok=True)


def check_not_rolling(folder: Place, verb: str) -> None:
    """Raises UserError if a store is a rolling one, which `verb` cannot work on."""
    if (folder / ROLLING).is_file():
        raise UserError(
            f"store {folder} is filled and emptied by a run (source=rolling), {verb} is for stores that stay; use "
            "source=rolling, or another store.path"
        )


def too_small(budget_bytes: int, windows: int, wanted: int, bytes_of_window: int) -> UserError:
    """The error for a budget of `windows` windows where `wanted` are needed."""
    least = budget_for(wanted, bytes_of_window)
    return UserError(
        f"source.budget_bytes={budget_bytes} holds {windows} windows of at most {human_bytes(bytes_of_window)}, and "
        f"{wanted} must be on disk at once (those since the last checkpoint and those that are read next); use at "
        f"least {least}, a lower train.checkpoint_every, source.mixed_windows or store.window_bytes"
    )
