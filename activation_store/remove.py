"""`layerloom store remove`: deletes a store, and never anything else."""

import os
import shutil
from pathlib import Path

from activation_store.claims import CLAIMS
from activation_store.errors import UserError
from activation_store.manifest import COMMITS, HELD_OUT, MANIFEST, StoreManifest
from activation_store.progress import human_bytes
from activation_store.rolling import LOCK, ROLLING
from activation_store.used import BITS, ENDS
from activation_store.windows import WINDOWS


def remove_store(path: Path | str, *, confirm: bool) -> str:
    """Deletes the store if `confirm`; says what was deleted, or would be.

    The commits go first: what a kill leaves is no store with rows, and a new call deletes the rest. Raises UserError
    for a folder that is no store or holds anything that is not the store's (naming it), and then deletes nothing.
    """
    folder = Path(path)
    names = _own_names(folder)
    if strange := sorted(name for name in os.listdir(folder) if name not in names and not _partial(name)):
        raise UserError(
            f"{folder} is a store, but {strange[0]} in it is not the store's; move it elsewhere, then remove the store"
        )
    files, size = _count(folder)
    what = f"{folder}: a store of {files:,} files, {human_bytes(size)}"
    if not confirm:
        return f"{what}; to delete it: layerloom store remove {folder} confirm=true"
    if folder.is_symlink():
        raise UserError(f"{folder} is a link to {folder.resolve()}; remove that")
    for name in (HELD_OUT, COMMITS, *sorted(names - {HELD_OUT, COMMITS, MANIFEST})):
        _delete(folder / name)
    for name in [name for name in os.listdir(folder) if _partial(name)]:
        _delete(folder / name)
    # Last, for it is what says that this is a store.
    _delete(folder / MANIFEST)
    folder.rmdir()
    return f"{what}; deleted"


def _own_names(folder: Path) -> set[str]:
    """Names in the folder of a store that are its own. Raises UserError if it is none."""
    arrays = {array.name for array in StoreManifest.load(folder).layout.arrays()}
    return {MANIFEST, COMMITS, HELD_OUT, WINDOWS, CLAIMS, BITS, ENDS, ROLLING, LOCK, "zarr.json", *arrays}


def _partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(".partial")


def _count(folder: Path) -> tuple[int, int]:
    files = [Path(where) / name for where, _, names in os.walk(folder) for name in names]
    return len(files), sum(file.lstat().st_size for file in files)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
