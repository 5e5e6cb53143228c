"""Checkpoints of a run: written whole or not at all, verified before they are used, the newest few kept.

    checkpoints/step_00001000/model.safetensors      parameters (float32 masters where there are such) and buffers
                              optimizer.safetensors  Adam's moments and steps
                              state.json             everything else, and the size and xxh3-64 of the two above
                              COMPLETE               xxh3-64 of state.json; written last

A checkpoint is written in a hidden folder, synced, and renamed. One that is incomplete or whose bytes have changed is
passed over with one line said.
"""

import errno
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from activation_store.atomic import free_bytes, fsync_folder, read_json, write_json, write_text
from activation_store.errors import UserError
from activation_store.progress import human_bytes, report
from trainer.run_folder import RunFolder, resume_command
from trainer.tensor_file import hash_file, read_tensors_into, write_tensors

FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
_FILES = (MODEL_FILE, OPTIMIZER_FILE)
_STATE_FILE = "state.json"
_COMPLETE_FILE = "COMPLETE"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files were found to be as they were written; `state` is its state.json."""

    path: Path
    step: int
    state: Mapping[str, Any]

    def load_model(self, tensors: Mapping[str, Tensor], *, widen: bool = False) -> None:
        """Copies the model's tensors into those given (a state_dict). widen: bfloat16 ones into float32 ones, too."""
        read_tensors_into(self.path / MODEL_FILE, tensors, widen=widen)

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the optimizer's tensors into those given."""
        read_tensors_into(self.path / OPTIMIZER_FILE, tensors)


class Checkpointer:
    """Writes and finds the checkpoints of one run folder."""

    def __init__(self, run: Path | str, *, keep: int = 2) -> None:
        """`keep`: how many of the newest complete checkpoints stay."""
        self.folder = RunFolder(run).checkpoints
        self.run = Path(run)
        self.keep = keep

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> Path:
        """Writes the checkpoint of `step`, then removes those beyond `keep`; returns its folder.

        A disk that fills raises UserError, with the partial checkpoint removed and the older ones as they were.
        """
        target = self.folder / _name(step)
        partial = self.folder / f".{target.name}.partial"
        self._remove_partials()
        partial.mkdir(parents=True)
        try:
            self._write(partial, {MODEL_FILE: model, OPTIMIZER_FILE: optimizer}, {"step": step, **state})
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"the disk of {self.folder} is full (free: {human_bytes(free_bytes(self.folder))}): the checkpoint of "
                f"step {step} was not written, older ones are kept; free some space and continue with "
                f"`{resume_command(self.run)}`"
            ) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if target.exists():  # a damaged one, which the run resumed before
            shutil.rmtree(target)
        partial.rename(target)
        fsync_folder(self.folder)
        self._prune(step)
        return target

    def newest_good(self, *, files: Iterable[str] = _FILES) -> Checkpoint | None:
        """The newest checkpoint of which state.json and `files` are as written; None if there is none."""
        for path in reversed(self._paths()):
            problem, state = _examine(path, files)
            if problem is None:
                return Checkpoint(path, int(state["step"]), state)
            what = "is damaged" if problem.damaged else "cannot be used"
            report(f"checkpoint {path} {what} ({problem.text}); looking for an older one")
        return None

    def to_resume(self) -> Checkpoint | None:
        """The newest good checkpoint; None if there are none at all. Raises UserError if none is good."""
        checkpoint = self.newest_good()
        if checkpoint is None and self._paths():
            raise UserError(
                f"run={self.run} has checkpoints but none that can be used (see above); put back a good copy of one in "
                f"{self.folder}, or start over with train.fresh=true"
            )
        return checkpoint

    def _write(self, folder: Path, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        written = {name: write_tensors(folder / name, tensors) for name, tensors in files.items()}
        checksums = {name: {"bytes": file.n_bytes, "xxh3_64": file.xxh3_64} for name, file in written.items()}
        write_json(folder / _STATE_FILE, {"format_version": FORMAT_VERSION, **state, "files": checksums})
        write_text(folder / _COMPLETE_FILE, hash_file(folder / _STATE_FILE).xxh3_64 + "\n")

    def _paths(self) -> list[Path]:
        """Folders that claim to be checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step_*") if path.is_dir())

    def _prune(self, newest_step: int) -> None:
        """Removes what is older than the newest `keep` good ones up to the one just written, and what is damaged.

        Another version's, or one that could not be read this time, is not ours to remove. Damage lies in later
        ones, which a resume passed over; of the others state.json alone is looked at.
        """
        paths, newest = self._paths(), _name(newest_step)
        problems = {path: _examine(path, () if path.name <= newest else _FILES)[0] for path in paths}
        good = [path for path in paths if path.name <= newest and problems[path] is None]
        for path in paths:
            problem = problems[path]
            superseded = len(good) >= self.keep and path < good[-self.keep]
            if not superseded and (problem is None or not problem.damaged):
                continue
            # Without COMPLETE first, a kill during the removal leaves nothing that looks whole.
            (path / _COMPLETE_FILE).unlink(missing_ok=True)
            shutil.rmtree(path)

    def _remove_partials(self) -> None:
        for path in self.folder.glob(".step_*.partial"):
            shutil.rmtree(path)


def check_space(run: Path | str, *, n_bytes: int, keep: int) -> None:
    """Refuses (UserError) a disk that cannot hold `keep` checkpoints and the one being written."""
    existing = sum(file.stat().st_size for file in RunFolder(run).checkpoints.glob("step_*/*"))
    needed = n_bytes * (keep + 1) - existing
    free = free_bytes(run)
    if free < needed:
        raise UserError(
            f"run={run}: checkpoints need {human_bytes(needed)} ({keep} kept and one being written, "
            f"{human_bytes(n_bytes)} each) and {human_bytes(free)} are free; free some space, lower "
            "train.keep_checkpoints, or choose another disk"
        )


def _name(step: int) -> str:
    return f"step_{step:08d}"


@dataclass(frozen=True, slots=True)
class _Problem:
    """Why a checkpoint is passed over. Not `damaged`: another version or another try may still read it."""

    text: str
    damaged: bool = True


def _examine(path: Path, files: Iterable[str]) -> tuple[_Problem | None, Mapping[str, Any]]:
    """What is wrong with a checkpoint (None: nothing), and its state."""
    try:
        return _examine_files(path, files)
    except FileNotFoundError as error:
        return _Problem(f"{Path(error.filename).name} is missing"), {}
    except OSError as error:
        return _Problem(str(error), damaged=False), {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return _Problem(str(error)), {}


def _examine_files(path: Path, files: Iterable[str]) -> tuple[_Problem | None, Mapping[str, Any]]:
    expected = (path / _COMPLETE_FILE).read_text(encoding="utf-8").strip()
    if hash_file(path / _STATE_FILE).xxh3_64 != expected:
        return _Problem(f"{_STATE_FILE} has changed"), {}
    state = read_json(path / _STATE_FILE)
    if (version := state["format_version"]) != FORMAT_VERSION:
        return _Problem(f"format version {version}, this version reads {FORMAT_VERSION}", damaged=False), {}
    for name in files:
        found = hash_file(path / name)
        if (found.n_bytes, found.xxh3_64) != (state["files"][name]["bytes"], state["files"][name]["xxh3_64"]):
            return _Problem(f"{name} has changed"), {}
    return None, state
