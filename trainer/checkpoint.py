"""Checkpoints of a run: written whole or not at all, verified before they are used, the newest few kept.

    checkpoints/step_00001000/model_00000.safetensors      what rank 0 wrote of the parameters (float32 masters where
                              ...                          there are such) and buffers; a file for each rank
                              optimizer_00000.safetensors  likewise of Adam's moments and steps
                              ...
                              index.json                   where the numbers of every tensor lie
                              state.json                   everything else, and size and xxh3-64 of all of the above
                              COMPLETE                     xxh3-64 of state.json; written last

torch.distributed.checkpoint plans who writes and reads what; tensors are global ones under the serial model's names,
so that any mesh continues from a checkpoint of any other. On a disk a checkpoint is written in a hidden folder, synced,
and renamed; at a URL its objects count once COMPLETE is there. One that is incomplete or whose bytes have changed is
passed over with one line said.
"""

import errno
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import xxhash
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from activation_store.atomic import free_bytes
from activation_store.errors import AgreedError, UserError, os_error_line
from activation_store.places import Place, RemotePath
from activation_store.progress import human_bytes, report
from trainer.config import RunConfig
from trainer.run_folder import RunFolder, checkpoint_folder, resume_command
from trainer.saving.examine import FORMAT_VERSION, Problem, examine, read_state, tensor_files
from trainer.saving.index import KINDS, MODEL, OPTIMIZER, Index, TensorEntry
from trainer.saving.pieces import Pieces, State, as_pieces
from trainer.saving.planners import PIECES, PieceLoadPlanner, PieceSavePlanner
from trainer.saving.ranks import Ranks
from trainer.saving.reader import CheckpointReader, open_reader
from trainer.saving.slot import Slot, remove_checkpoint
from trainer.saving.staging import Staging
from trainer.saving.storage import PartsReader, PartsWriter
from trainer.tensor_file import WrittenFile


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files were found to be as they were written; `state` is its state.json.

    ranks: the processes that found it, all of which call the methods that load.
    """

    path: Place
    step: int
    state: Mapping[str, Any]
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def weights_xxh3_64(self) -> str:
        """One checksum of the model's files, in hex."""
        files = {name: self.state["files"][name] for name in tensor_files(self.state, model_only=True)}
        text = " ".join(f"{name} {file['xxh3_64']}" for name, file in sorted(files.items()))
        return xxhash.xxh3_64_hexdigest(text.encode())

    def reader(self) -> CheckpointReader:
        """Tensors by name, one at a time. Raises FileNotFoundError if the checkpoint was removed in the meantime."""
        return open_reader(self.path)

    def load_model(self, tensors: State, *, widen: bool = False) -> None:
        """Copies the model's tensors into those given (a state_dict, or pieces of one).

        widen: bfloat16 ones into float32 ones, too. Raises UserError for a checkpoint of another model.
        """
        self._load(MODEL, as_pieces(tensors), widen=widen)

    def load_optimizer(self, tensors: State) -> None:
        """Copies the optimizer's tensors into those given."""
        self._load(OPTIMIZER, as_pieces(tensors), widen=False)

    def _load(self, kind: str, pieces: Pieces, *, widen: bool) -> None:
        reader = self._opened()
        _check_same(self.path, reader.entries(kind), pieces, widen=widen)
        _expect_single_processes()
        with _first_failure_raised():
            load(
                {PIECES: {f"{kind}/{name}": boxes for name, boxes in pieces.items()}},
                storage_reader=PartsReader(reader),
                planner=PieceLoadPlanner(),
                process_group=self.ranks.group,
                no_dist=self.ranks.group is None,
            )

    def _opened(self) -> CheckpointReader:
        """`reader` on every rank, or its error on every one: none must wait for one that has failed. Told once;
        FileNotFoundError stays what it is.
        """
        reader, problem = None, None
        try:
            reader = self.reader()
        except OSError as error:
            problem = error
        for each in self.ranks.gather(problem):
            if each is not None and (self.ranks.group is None or isinstance(each, FileNotFoundError)):
                raise each
            if each is not None:
                raise AgreedError(os_error_line(each)) from each
        assert reader is not None
        return reader


class Checkpointer:
    """Writes and finds the checkpoints of one run. With several ranks, every method is called by all of them."""

    def __init__(
        self,
        run: Path | str,
        *,
        keep: int = 2,
        folder: Place | None = None,
        ranks: Ranks | None = None,
        background: bool = False,
    ) -> None:
        """`keep`: how many of the newest complete checkpoints stay. `folder`: if not the run's own `checkpoints`.

        background: `save` returns when the tensors are copied, and a thread writes them; call `wait`, or use `with`.
        """
        self.folder: Place = RunFolder(run).checkpoints if folder is None else folder
        self.run = Path(run)
        self.keep = keep
        self.ranks = ranks if ranks is not None else Ranks()
        self.newest: Place | None = None
        self._staging = Staging() if background else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._cancelled = threading.Event()

    @classmethod
    def of(
        cls, run: Path | str, config: RunConfig, *, ranks: Ranks | None = None, background: bool = False
    ) -> "Checkpointer":
        """That of a run of this config."""
        keep, folder = config.train.keep_checkpoints, checkpoint_folder(run, config)
        return cls(run, keep=keep, folder=folder, ranks=ranks, background=background)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for what is being written, and raises what went wrong with it.

        After another error that is said in a line; after Ctrl-C writing stops.
        """
        if error is None:
            self.wait()
        elif isinstance(error, Exception):
            self.settle()
        else:
            self._cancel()

    def save(
        self,
        step: int,
        *,
        model: State,
        optimizer: State,
        state: Mapping[str, Any],
        durable: Callable[[], None] | None = None,
    ) -> None:
        """Writes the checkpoint of `step`, then removes those beyond `keep`. Waits for the one before.

        durable: called when it is, by the thread that wrote it.

        Raises UserError in one line for what could not be written (in the background: the one before), with the partial
        checkpoint removed and the older ones as they were.
        """
        self.wait()
        pieces = {MODEL: as_pieces(model), OPTIMIZER: as_pieces(optimizer)}
        named = {f"{kind}/{name}": boxes for kind in KINDS for name, boxes in pieces[kind].items()}
        self._cancelled = threading.Event()
        if self._staging is None:
            self._write(step, named, state, durable)
        else:
            self._writing = self._thread.submit(self._write, step, self._staging.copy(named), state, durable)

    def wait(self) -> None:
        """Until nothing is being written. Raises what the thread has raised, once."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except KeyboardInterrupt:
            self._writing = writing
            self._cancel()
            raise

    def settle(self) -> None:
        """`wait`, but what went wrong is said in a line."""
        try:
            self.wait()
        except (UserError, RuntimeError) as error:  # torch's errors of lost processes are RuntimeErrors
            report(f"{error}".splitlines()[0])

    def newest_good(self, *, model_only: bool = False) -> Checkpoint | None:
        """The newest checkpoint that is as written; None if there is none. model_only: whatever the optimizer's is."""
        for path in reversed(self._paths()):
            problem, state = examine(path, self.ranks, model_only=model_only)
            if problem is None:
                self.newest = path
                return Checkpoint(path, int(state["step"]), state, self.ranks)
            if self.ranks.is_first:
                what = "is damaged" if problem.damaged else "cannot be used"
                report(f"checkpoint {path} {what} ({problem.text}); looking for an older one")
        return None

    def to_resume(self) -> Checkpoint | None:
        """The newest good checkpoint; None if there are none at all. Raises UserError if none is good."""
        checkpoint = self.newest_good()
        if checkpoint is None and self._paths():
            raise AgreedError(
                f"run={self.run} has checkpoints but none that can be used (see above); put back a good copy of one in "
                f"{self.folder}, or start over with train.fresh=true"
            )
        return checkpoint

    def discard(self) -> None:
        """Removes this run's checkpoints where they are outside of its folder (train.fresh).

        Raises UserError if another run's are there.
        """
        if self.folder == RunFolder(self.run).checkpoints:
            return  # they go with the folder, wherever that has come from
        for path in checkpoint_paths(self.folder) if self.ranks.is_first else []:
            run = read_state(path)[1].get("config", {}).get("run", str(self.run))
            if Path(run) != self.run:
                raise UserError(
                    f"train.checkpoint_path={self.folder} holds checkpoints of run={run}; give a place for this "
                    "run alone"
                )
            remove_checkpoint(path)

    def _write(self, step: int, named: Pieces, state: Mapping[str, Any], durable: Callable[[], None] | None) -> None:
        slot = Slot(self.folder, checkpoint_name(step))
        contents = {"format_version": FORMAT_VERSION, "step": step, **state}

        def commit(index: Index, files: Mapping[str, WrittenFile]) -> None:
            slot.commit(index, files, contents)
            self._prune(step)

        writer = PartsWriter(slot.path, begin=lambda: slot.begin(alone=True), commit=commit, cancelled=self._cancelled)
        _expect_single_processes()
        try:
            with _first_failure_raised():
                save(
                    {PIECES: named},
                    storage_writer=writer,
                    planner=PieceSavePlanner(),
                    process_group=self.ranks.group,
                    no_dist=self.ranks.group is None,
                )
        except BaseException as error:
            if self.ranks.is_first:
                slot.abandon()
            if isinstance(error, OSError):
                raise self._not_written(step, error) from error
            raise
        self.newest = slot.target
        if durable is not None:
            durable()

    def _cancel(self) -> None:
        """Stops writing. What goes wrong with that is nobody's concern any more."""
        self._cancelled.set()
        if self._writing is not None:
            self._writing.exception()
            self._writing = None

    def _not_written(self, step: int, error: OSError) -> UserError:
        what, remedy = os_error_line(error), ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"the disk of {self.folder} is full (free: {human_bytes(free_bytes(str(self.folder)))})"
            remedy = "free some space and "
        return AgreedError(
            f"{what}: the checkpoint of step {step} was not written, older ones are kept; {remedy}continue with "
            f"`{resume_command(self.run)}`"
        )

    def _paths(self) -> list[Place]:
        """Folders that claim to be checkpoints, oldest first."""
        # Names travel: a place at a URL holds a connection, which each rank has its own of.
        names = [path.name for path in checkpoint_paths(self.folder)] if self.ranks.is_first else []
        return [self.folder / name for name in self.ranks.from_first(names)]

    def _prune(self, newest_step: int) -> None:
        """Removes what is older than the newest `keep` good ones up to the one just written, and what is damaged.

        Another version's, or one that could not be read this time, is not ours to remove. Damage lies in later
        ones, which a resume passed over; of the others state.json alone is looked at.
        """
        paths, newest = checkpoint_paths(self.folder), checkpoint_name(newest_step)
        problems = {path: self._problem(path, whole=path.name > newest) for path in paths}
        good = [path for path in paths if path.name <= newest and problems[path] is None]
        for path in paths:
            problem = problems[path]
            superseded = len(good) >= self.keep and path.name < good[-self.keep].name
            if superseded or (problem is not None and problem.damaged):
                remove_checkpoint(path)

    def _problem(self, path: Place, *, whole: bool) -> Problem | None:
        return (examine(path, Ranks()) if whole else read_state(path))[0]


def checkpoint_paths(folder: Place) -> list[Place]:
    """Folders of checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    paths: list[Place] = [path for path in folder.iterdir() if path.name.startswith("step_") and path.is_dir()]
    return sorted(paths, key=lambda path: path.name)


def checkpoint_name(step: int) -> str:
    """Of the folder of a step's checkpoint."""
    return f"step_{step:08d}"


def check_space(run: Path | str, *, n_bytes: int, keep: int, folder: Place | None = None) -> None:
    """Refuses (UserError) a disk that cannot hold `keep` checkpoints and the one being written.

    `folder`: as Checkpointer's; an object store is not asked.
    """
    folder = RunFolder(run).checkpoints if folder is None else folder
    if isinstance(folder, RemotePath):
        return
    existing = sum(file.stat().st_size for file in folder.glob("step_*/*"))
    needed = n_bytes * (keep + 1) - existing
    free = free_bytes(folder)
    if free < needed:
        raise UserError(
            f"run={run}: checkpoints need {human_bytes(needed)} ({keep} kept and one being written, "
            f"{human_bytes(n_bytes)} each) and {human_bytes(free)} are free; free some space, lower "
            "train.keep_checkpoints, or choose another disk"
        )


def _check_same(path: Place, entries: Mapping[str, TensorEntry], pieces: Pieces, *, widen: bool) -> None:
    """Raises UserError unless names, shapes and dtypes are those of the checkpoint."""
    if entries.keys() != pieces.keys():
        odd = sorted(entries.keys() ^ pieces.keys())[0]
        where = "lacks" if odd in pieces else "has an unknown"
        raise AgreedError(f"{path} {where} tensor {odd}; it was written by another version or for another model")
    for name, boxes in pieces.items():
        entry = entries[name]
        for piece in boxes:
            dtype = piece.tensor.dtype
            widened = widen and (entry.dtype, dtype) == (torch.bfloat16, torch.float32)
            if entry.shape != piece.shape and name.endswith(".scales"):
                raise AgreedError(
                    f"{path}: {name} has blocks of the columns of other ranks; with optim.state_dtype=int8 go on "
                    "with the same parallel.feature and parallel.decoder_split, or with parallel.decoder_split=rows "
                    "from the start"
                )
            if entry.shape != piece.shape or (entry.dtype != dtype and not widened):
                raise AgreedError(
                    f"{path}: {name} is {entry.dtype} {entry.shape}, the model's is {dtype} {piece.shape}; it was "
                    "written for another model"
                )


def _expect_single_processes() -> None:
    """One process is nothing to be warned of, as DCP does."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


@contextmanager
def _first_failure_raised() -> Iterator[None]:
    """Raises what the first rank that failed has raised, in place of DCP's collection."""
    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        if isinstance(first, UserError):
            raise AgreedError(str(first)) from None
        raise first from None
