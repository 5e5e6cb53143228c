"""What each action of `layerloom checkpoint` does; `keys` are those that the command line gave."""

from launch.config import LayerloomConfig


def info(config: LayerloomConfig, name: str, keys: set[str]) -> int:
    """`checkpoint info FOLDER`: of a run, the newest."""
    from activation_store.places import place
    from trainer.saving.describe import checkpoint_info
    from trainer.saving.find import checkpoints_at

    print(checkpoint_info(checkpoints_at(place(name))[-1]))
    return 0


def verify(config: LayerloomConfig, name: str, keys: set[str]) -> int:
    """`checkpoint verify FOLDER`: 1 if anything is damaged; of a run, all."""
    from activation_store.places import place
    from activation_store.progress import human_bytes
    from trainer.saving.find import checkpoints_at
    from trainer.saving.verify import verify_checkpoints

    paths = checkpoints_at(place(name))
    found = verify_checkpoints(paths)
    for line in found.damaged:
        print(f"damaged: {line}")
    end = (
        f"{len(found.damaged)} damaged; training goes on from the newest that is not" if found.damaged else "no damage"
    )
    print(f"{name}: {len(paths)} checkpoints, {found.files} files, {human_bytes(found.bytes)}, {end}")
    return 1 if found.damaged else 0


def convert(config: LayerloomConfig, name: str, keys: set[str]) -> int:
    """`checkpoint convert FOLDER output=FOLDER`: of a run, the newest."""
    from activation_store.places import place
    from trainer.saving.convert import convert_checkpoint
    from trainer.saving.find import checkpoints_at

    convert_checkpoint(checkpoints_at(place(name))[-1], place(config.output))
    return 0
