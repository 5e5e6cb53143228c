"""Which checkpoints a path or URL names: a checkpoint itself, a run folder, or a folder of checkpoints."""

from pathlib import Path

from activation_store.errors import UserError
from activation_store.places import Place
from trainer.checkpoint import checkpoint_paths
from trainer.run_folder import RunFolder, checkpoint_folder, load_config
from trainer.saving.index import INDEX_FILE
from trainer.saving.slot import COMPLETE_FILE, STATE_FILE


def checkpoints_at(path: Place) -> list[Place]:
    """Folders of the checkpoints there, oldest first. Raises UserError if there are none."""
    if any((path / name).is_file() for name in (STATE_FILE, INDEX_FILE, COMPLETE_FILE)):
        return [path]
    folder = path
    if isinstance(path, Path) and RunFolder(path).exists():
        folder = checkpoint_folder(path, load_config(path))
    found = checkpoint_paths(folder)
    if not found:
        raise UserError(
            f"{path} is not a checkpoint and has none; give a run folder, one of its checkpoints/step_NNNNNNNN, or the "
            "URL of one"
        )
    return found
