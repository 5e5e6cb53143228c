"""What checkpoints cost in training: a period of steps without one, after one, and with one in the background.

    python -m benchmarks.checkpoints --shape 6,256,4096,1024,16 --every 20 --rounds 3
    python -m benchmarks.checkpoints --folder s3://BUCKET/PREFIX                    at a URL

A period is a checkpoint and `--every` training steps; in the background its end waits for what is still being written.
Ways take turns, and all times are medians over rounds. `stopped` is how long `save` keeps training from going on; the
share is what a period takes more than one without a checkpoint. The first line is the floor: the same tensors into one
safetensors file, hashed and synced, without an index, a plan or a copy.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from activation_store.places import Place, place
from activation_store.progress import human_bytes
from benchmarks.measure import command, machine, table, write_page
from benchmarks.steps import MODES, Shape, build_step, random_batch
from trainer.checkpoint import Checkpointer
from trainer.memory import freed_memory_kept
from trainer.parallel.plain import PlainEngine
from trainer.saving.pieces import State, as_pieces, local_bytes
from trainer.tensor_file import write_tensors

NONE = "none"


class Training:
    """Steps of the real engine, and what a checkpoint of them holds."""

    def __init__(self, shape: Shape) -> None:
        self._made: list[PlainEngine] = []
        batch = random_batch(shape, torch.device("cpu"))
        self.step = build_step(MODES["reference"], shape, batch, make_engine=self._engine)

    def tensors(self) -> dict[str, State]:
        """By kind, as `Checkpointer.save` takes them."""
        return {"model": self._made[0].model_state(), "optimizer": self._made[0].optimizer_state()}

    def _engine(self, config: Any, model: Any) -> PlainEngine:
        self._made.append(PlainEngine(config, model))
        return self._made[-1]


def main() -> None:
    """Measures, prints, and writes a page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Shape.parse, default=Shape(6, 256, 4096, 1024, 16))
    parser.add_argument("--every", type=int, default=20, help="steps of a period")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default="", help="where checkpoints go; a temporary folder on this disk")
    parser.add_argument("--write", default="", help="the page to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="layerloom-checkpoints-") as scratch:
        text = measured(options.shape, options.every, options.rounds, place(options.folder or scratch), Path(scratch))
    page = f"# Checkpoints in training\n\n    {command('benchmarks.checkpoints')}\n\n{text}"
    print(page)
    if options.write:
        write_page(options.write, page)


def measured(shape: Shape, every: int, rounds: int, folder: Place, scratch: Path) -> str:
    """The table, and a line about the conditions."""
    training = Training(shape)
    with freed_memory_kept(torch.device("cpu")):
        seconds, stopped = _take_turns(training, every, rounds, folder)
        floor = median(_timed(lambda: _floor(training, scratch)) for _ in range(rounds))
    n_bytes = local_bytes(pieces for tensors in training.tensors().values() for pieces in as_pieces(tensors).values())
    rows = [[name, *_row(name, seconds, stopped, every)] for name in seconds]
    return "\n".join(
        [
            f"{shape}: {human_bytes(n_bytes)} a checkpoint, every {every} steps; written as one file in {floor:.2f} s "
            f"({human_bytes(n_bytes / floor)}/s)\n",
            table(["checkpoints", "stopped", "a period", "more than without"], rows),
            f"\nConditions: {machine(torch.device('cpu'))}; {rounds} rounds.",
        ]
    )


def _row(name: str, seconds: dict[str, list[float]], stopped: dict[str, list[float]], every: int) -> list[str]:
    period = median(seconds[name])
    if name == NONE:
        return [f"({period / every * 1e3:.0f} ms a step)", f"{period:.2f} s", ""]
    more = median(mine / none - 1 for mine, none in zip(seconds[name], seconds[NONE], strict=True))
    return [f"{median(stopped[name]) * 1e3:.0f} ms", f"{period:.2f} s", f"{more:.1%}"]


def _take_turns(
    training: Training, every: int, rounds: int, folder: Place
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each way's periods, and of its calls of `save`; the first round does not count."""
    ways = {
        NONE: None,
        "while training waits": Checkpointer("run", keep=1, folder=folder),
        "in the background": Checkpointer("run", keep=1, folder=folder, background=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    stopped: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, checkpointer in ways.items():
            started = time.perf_counter()
            if checkpointer is not None:
                tensors = training.tensors()
                checkpointer.save(number + 1, model=tensors["model"], optimizer=tensors["optimizer"], state={})
            saved = time.perf_counter()
            for _ in range(every):
                training.step()
            if checkpointer is not None:
                checkpointer.wait()
            if number:
                seconds[name].append(time.perf_counter() - started)
                stopped[name].append(saved - started)
    return seconds, stopped


def _floor(training: Training, scratch: Path) -> None:
    tensors = {
        f"{kind}.{name}": pieces[0].tensor
        for kind, state in training.tensors().items()
        for name, pieces in as_pieces(state).items()
    }
    write_tensors(scratch / "floor", tensors)
    (scratch / "floor").unlink()


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
