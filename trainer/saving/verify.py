"""`layerloom checkpoint verify`: every byte of checkpoints against their checksums."""

from collections.abc import Sequence
from dataclasses import dataclass

from activation_store.places import Place
from activation_store.progress import Progress
from trainer.saving.examine import file_problem, read_state


@dataclass(frozen=True, slots=True)
class Verified:
    """What was looked at, and a line for each damage."""

    files: int
    bytes: int
    damaged: tuple[str, ...]


def verify_checkpoints(paths: Sequence[Place]) -> Verified:
    """Reads every file of the checkpoints, with progress."""
    states, damaged = {}, []
    for path in paths:
        problem, state = read_state(path)
        if problem is not None:
            damaged.append(f"{path}: {problem.text}")
        else:
            states[path] = state
    total = sum(file["bytes"] for state in states.values() for file in state["files"].values())
    files = 0
    with Progress("verify", total=total, unit="B") as progress:
        for path, state in states.items():
            for name in state["files"]:
                files += 1
                if (problem := file_problem(path, state, name, progress.advance)) is not None:
                    damaged.append(f"{path}: {problem.text}")
    return Verified(files, total, tuple(damaged))
