"""`layerloom store remove`: deletes a store, and never anything else."""

from pathlib import Path

from activation_store.claims import CLAIMS
from activation_store.errors import UserError
from activation_store.manifest import COMMITS, HELD_OUT, MANIFEST, StoreManifest
from activation_store.places import Place, file_sizes, place, remove_all
from activation_store.progress import human_bytes
from activation_store.rolling import LOCK, ROLLING
from activation_store.used import BITS, ENDS
from activation_store.windows import WINDOWS


def remove_store(path: Place | str, *, confirm: bool) -> str:
    """Deletes the store if `confirm`; says what was deleted, or would be.

    The commits go first: what a kill leaves is no store with rows, and a new call deletes the rest. Raises UserError
    for a folder that is no store or holds anything that is not the store's (naming it), and then deletes nothing.
    """
    folder = place(path)
    names = _own_names(folder)
    there = [entry.name for entry in folder.iterdir()]
    if strange := sorted(name for name in there if name not in names and not _partial(name)):
        raise UserError(
            f"{folder} is a store, but {strange[0]} in it is not the store's; move it elsewhere, then remove the store"
        )
    sizes = [size for _, size in file_sizes(folder)]
    what = f"{folder}: a store of {len(sizes):,} files, {human_bytes(sum(sizes))}"
    if not confirm:
        return f"{what}; to delete it: layerloom store remove {folder} confirm=true"
    if isinstance(folder, Path) and folder.is_symlink():
        raise UserError(f"{folder} is a link to {folder.resolve()}; remove that")
    for name in (HELD_OUT, COMMITS, *sorted(names - {HELD_OUT, COMMITS, MANIFEST}), *filter(_partial, there)):
        remove_all(folder / name)
    # Last, for it is what says that this is a store.
    remove_all(folder / MANIFEST)
    if isinstance(folder, Path):
        folder.rmdir()
    return f"{what}; deleted"


def _own_names(folder: Place) -> set[str]:
    """Names in the folder of a store that are its own. Raises UserError if it is none."""
    arrays = {array.name for array in StoreManifest.load(folder).layout.arrays()}
    return {MANIFEST, COMMITS, HELD_OUT, WINDOWS, CLAIMS, BITS, ENDS, ROLLING, LOCK, "zarr.json", *arrays}


def _partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(".partial")
