"""A small job done once by the command itself, and the words that made it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.main import main

# (path from the folder, size, time of the last change) of every file.
Snapshot = set[tuple[str, int, int]]


@dataclass(frozen=True)
class Job:
    """A finished job in `folder`: `store`, `run` and `published`, made by `words`. Read only."""

    folder: Path
    words: tuple[str, ...]

    def words_with(self, **changes: str) -> list[str]:
        """The words with some replaced or added; `store__path` stands for `store.path`."""
        values = dict(word.split("=", 1) for word in self.words)
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return [f"{key}={value}" for key, value in values.items()]


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Runs its block with `folder` as the working folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def snapshot(folder: Path) -> Snapshot:
    """What lies in `folder`, to compare with later."""
    found = set()
    for path in folder.rglob("*"):
        stat = path.stat()
        found.add((path.relative_to(folder).as_posix(), stat.st_size if path.is_file() else 0, stat.st_mtime_ns))
    return found


def tiny_words(subject: Path, text: Path) -> tuple[str, ...]:
    """A job of seconds, with paths relative to the working folder."""
    return (
        f"subject.path={subject}",
        "text=files",
        f"text.path={text}",
        "text.context_length=32",
        "text.held_out_documents=6",
        "text.documents_per_block=8",
        "store.path=store",
        "store.tokens=1500",
        "store.held_out_tokens=128",
        "store.chunk_rows=64",
        "store.shard_rows=256",
        "model.n_features=48",
        "activation.k=4",
        "activation.auxk_k=8",
        "activation.calibration_tokens=512",
        "train.tokens=1536",
        "train.batch_size_tokens=128",
        "eval.documents=6",
        "launch.threads=1",
        "run=run",
        "output=published",
    )


def run_job(folder: Path, subject: Path, text: Path) -> Job:
    """harvest, train, evaluate and publish, each by its own verb, in a folder apart from the code."""
    job = Job(folder, tiny_words(subject, text))
    with working_in(folder):
        assert main(["harvest", *job.words]) == 0
        assert main(["train", *job.words]) == 0
        assert main(["evaluate", "run=run", "eval.documents=6", "launch.threads=1"]) == 0
        assert main(["publish", "run=run", "output=published", "launch.threads=1"]) == 0
    return job
