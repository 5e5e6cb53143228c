"""The place of one checkpoint while it is written: on a disk a hidden folder that is renamed, on an object store the
folder itself, which counts once COMPLETE is there.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from activation_store.atomic import fsync_folder, json_bytes
from activation_store.errors import UserError
from activation_store.places import Place, RemotePath, remove_all, write_whole
from trainer.saving.index import INDEX_FILE, Index, index_to_json
from trainer.tensor_file import WrittenFile, hash_file

STATE_FILE, COMPLETE_FILE = "state.json", "COMPLETE"
_PARTIAL = ".partial"


class Slot:
    """Where the checkpoint `name` of `folder` is written."""

    def __init__(self, folder: Place, name: str) -> None:
        self._folder, self.target = folder, folder / name
        self._whole = False
        self.path: Place = self.target if isinstance(folder, RemotePath) else folder / f".{name}{_PARTIAL}"

    def begin(self, *, alone: bool = False) -> None:
        """Makes the folder, without what a killed writer left. alone: nobody else writes checkpoints beside it."""
        if isinstance(self.path, Path) and isinstance(self._folder, Path):
            shutil.rmtree(self.path, ignore_errors=True)
            for path in self._folder.glob(f".step_*{_PARTIAL}") if alone else ():
                shutil.rmtree(path)
            self.path.mkdir(parents=True)
        else:
            remove_checkpoint(self.path)

    def commit(self, index: Index, files: Mapping[str, WrittenFile], state: Mapping[str, Any]) -> None:
        """Writes index.json, state.json with every file's size and checksum, and COMPLETE; then it appears."""
        self._check_visible(files)
        write_whole(self.path / INDEX_FILE, json.dumps(index_to_json(index), separators=(",", ":")).encode())
        files = {**files, INDEX_FILE: hash_file(self.path / INDEX_FILE)}
        sums = {name: {"bytes": file.n_bytes, "xxh3_64": file.xxh3_64} for name, file in sorted(files.items())}
        write_whole(self.path / STATE_FILE, json_bytes({**state, "files": sums}))
        write_whole(self.path / COMPLETE_FILE, hash_file(self.path / STATE_FILE).xxh3_64.encode() + b"\n")
        if isinstance(self.path, Path) and isinstance(self.target, Path):
            if self.target.exists():  # a damaged one, which the run resumed before
                shutil.rmtree(self.target)
            self.path.rename(self.target)
            fsync_folder(self.target.parent)
        self._whole = True

    def abandon(self) -> None:
        """Removes what was written, as far as that is possible, unless it was committed."""
        if isinstance(self.path, Path):
            shutil.rmtree(self.path, ignore_errors=True)
        elif not self._whole:
            # A server that does not take it may not remove it either. Without COMPLETE it does not count.
            with suppress(OSError):
                remove_checkpoint(self.path)

    def _check_visible(self, files: Mapping[str, WrittenFile]) -> None:
        """Nodes that do not share the folder have each written into one of its own."""
        for name in files:
            if not (self.path / name).is_file():
                raise UserError(
                    f"{self.path} lacks {name}, which another process has written: the processes do not share this "
                    "folder; give one on a shared file system, or train.checkpoint_path=s3://BUCKET/PREFIX"
                )


def remove_checkpoint(path: Place) -> None:
    """Removes a checkpoint's folder. Without COMPLETE first, a kill in between leaves nothing that looks whole."""
    remove_all(path / COMPLETE_FILE)
    if isinstance(path, Path):
        shutil.rmtree(path)
    else:
        remove_all(path)
