"""What each action of `layerloom store` does; `keys` are those that the command line gave."""

from activation_store.places import Place, store_place
from launch.config import LayerloomConfig


def info(config: LayerloomConfig, folders: list[Place], keys: set[str]) -> int:
    """`store info FOLDER`."""
    from activation_store.info import store_info

    print(store_info(folders[0]))
    return 0


def verify(config: LayerloomConfig, folders: list[Place], keys: set[str]) -> int:
    """`store verify FOLDER`: 1 if anything is damaged."""
    from activation_store.progress import counted, human_bytes
    from activation_store.verify import verify_store

    found = verify_store(folders[0])
    for line in found.damaged:
        print(f"damaged: {line}")
    end = f"{len(found.damaged)} damaged; repair: layerloom store repair {folders[0]}"
    print(
        f"{folders[0]}: {counted(found.files, 'file')}, {human_bytes(found.bytes)}, {'no damage' if found.ok else end}"
    )
    return 0 if found.ok else 1


def repair(config: LayerloomConfig, folders: list[Place], keys: set[str]) -> int:
    """`store repair FOLDER`: 1 if shards are not the bytes that they were (other hardware or versions)."""
    from activation_store.progress import counted
    from activation_store.repair import Places, repair_store
    from launch.stages import quiet_libraries

    quiet_libraries()
    places = Places(
        subject=config.subject.path if "subject.path" in keys else "",
        text=config.text.path if "text.path" in keys else "",
        cache_dir=config.subject.cache_dir,
        reach=config.store,
    )
    summary = repair_store(folders[0], places, device=config.device)
    for shard in summary.changed:
        print(f"changed: {shard}")
    changed = counted(len(summary.changed), "shard") + (" is" if len(summary.changed) == 1 else " are")
    end = f"{changed} other bytes than before" if summary.changed else "all as they were"
    print(f"{folders[0]}: {counted(summary.windows, 'window')} harvested again, {end}")
    return 1 if summary.changed else 0


def merge(config: LayerloomConfig, folders: list[Place], keys: set[str]) -> int:
    """`store merge FOLDER FOLDER ... output=FOLDER`."""
    from activation_store.merge import merge_line, merge_stores

    output = store_place(config.store, config.output)
    print(merge_line(merge_stores(folders, output), output))
    return 0


def remove(config: LayerloomConfig, folders: list[Place], keys: set[str]) -> int:
    """`store remove FOLDER confirm=true`: 1 if nothing was deleted for want of `confirm`."""
    from activation_store.remove import remove_store

    print(remove_store(folders[0], confirm=config.confirm))
    return 0 if config.confirm else 1
