"""Whether a checkpoint's files are as they were written."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from activation_store.places import Place
from trainer.saving.index import INDEX_FILE, OPTIMIZER
from trainer.saving.ranks import Ranks
from trainer.saving.slot import COMPLETE_FILE, STATE_FILE
from trainer.tensor_file import hash_file

FORMAT_VERSION = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a checkpoint is passed over. Not `damaged`: another version or another try may still read it."""

    text: str
    damaged: bool = True


def read_state(path: Place) -> tuple[Problem | None, dict[str, Any]]:
    """What is wrong with state.json of a checkpoint (None: nothing), and what it says."""
    try:
        return _read_state(path)
    except FileNotFoundError:
        # An object store's error does not say which.
        missing = next((name for name in (COMPLETE_FILE, STATE_FILE) if not (path / name).is_file()), STATE_FILE)
        return Problem(f"{missing} is missing"), {}
    except OSError as error:
        return Problem(str(error), damaged=False), {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return Problem(str(error)), {}


def examine(path: Place, ranks: Ranks, *, model_only: bool = False) -> tuple[Problem | None, dict[str, Any]]:
    """What is wrong with a checkpoint, and its state. Collective: every rank reads its share of the files."""
    problem, state = ranks.from_first(read_state(path) if ranks.is_first else (None, {}))
    if problem is not None:
        return problem, state
    files = tensor_files(state, model_only=model_only)
    share = [INDEX_FILE, *files][ranks.rank :: ranks.size]
    found = [each for each in ranks.gather(first_problem(path, state, share)) if each is not None]
    return (found[0] if found else None), state


def tensor_files(state: Mapping[str, Any], *, model_only: bool = False) -> list[str]:
    """Names of the files that hold the tensors."""
    names = [name for name in state["files"] if name != INDEX_FILE]
    return [name for name in names if not (model_only and name.startswith(f"{OPTIMIZER}_"))]


def first_problem(path: Place, state: Mapping[str, Any], files: Sequence[str]) -> Problem | None:
    """The first of these files that is not as it was written."""
    for name in files:
        if (problem := file_problem(path, state, name)) is not None:
            return problem
    return None


def file_problem(
    path: Place, state: Mapping[str, Any], name: str, advance: Callable[[int], None] | None = None
) -> Problem | None:
    """What is wrong with one file. advance: told of the bytes read."""
    try:
        found = hash_file(path / name, advance)
    except FileNotFoundError:
        return Problem(f"{name} is missing")
    except OSError as error:
        return Problem(str(error), damaged=False)
    expected = state["files"][name]
    if (found.n_bytes, found.xxh3_64) != (expected["bytes"], expected["xxh3_64"]):
        return Problem(f"{name} has changed")
    return None


def _read_state(path: Place) -> tuple[Problem | None, dict[str, Any]]:
    expected = (path / COMPLETE_FILE).read_bytes().decode().strip()
    if hash_file(path / STATE_FILE).xxh3_64 != expected:
        return Problem(f"{STATE_FILE} has changed"), {}
    state: dict[str, Any] = json.loads((path / STATE_FILE).read_bytes())
    if (version := state["format_version"]) != FORMAT_VERSION:
        return Problem(f"format version {version}, this version reads {FORMAT_VERSION}", damaged=False), {}
    return None, state
