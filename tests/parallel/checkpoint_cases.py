"""What the processes of test_checkpoint_mesh.py run: states whose every number says where it belongs."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from activation_store.errors import AgreedError
from trainer.checkpoint import Checkpointer
from trainer.saving.pieces import Piece, State
from trainer.saving.ranks import Ranks, all_ranks
from trainer.saving.storage import PartsWriter

# Shape of each tensor, and which dim of it the feature axis splits.
TENSORS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "layers.0.W_enc": ((8, 12), 0),
    "layers.0.W_dec": ((8, 3, 12), 2),
    "layers.0.b_dec": ((12,), 0),
    "running_threshold_L": ((3,), None),
    "scalar": ((), None),
}


def serial(seed: int, kind: str) -> dict[str, Tensor]:
    """The global tensors: of the model, or of its optimizer."""
    generator = torch.Generator().manual_seed(seed)
    model = {name: torch.rand(shape, generator=generator) for name, (shape, _) in TENSORS.items()}
    if kind == "model":
        return model | {"tokens": torch.randint(100, (2, 8), generator=generator)}
    moments = {f"{name}.exp_avg": 2 * tensor for name, tensor in model.items()}
    return moments | {f"{name}.step": torch.tensor(float(seed)) for name in model}


def pieces(whole: dict[str, Tensor], feature: int, rank: int) -> dict[str, Piece]:
    """This rank's copies of its parts, on a mesh of so many columns of ranks."""
    found = {}
    for name, tensor in whole.items():
        dim = 1 if name == "tokens" else TENSORS.get(name.removesuffix(".exp_avg"), ((), None))[1]
        offsets, part = [0] * tensor.ndim, tensor
        if dim is not None:
            part = tensor.chunk(feature, dim)[rank % feature]
            offsets[dim] = rank % feature * part.shape[dim]
        found[name] = Piece(part.clone().contiguous(), tuple(tensor.shape), tuple(offsets))
    return found


def save(run: Path, feature: int, *, background: bool, steps: tuple[int, ...] = (4,)) -> list[str]:
    """Saves steps while other collectives of the default group run; the files of the newest that it sees."""
    ranks = all_ranks()
    with Checkpointer(run, ranks=ranks, background=background) as checkpointer:
        for step in steps:
            model, optimizer = (pieces(serial(step, kind), feature, ranks.rank) for kind in ("model", "optimizer"))
            checkpointer.save(step, model=model, optimizer=optimizer, state={"rank": ranks.rank})
            for piece in (*model.values(), *optimizer.values()):
                piece.tensor.zero_()
            for _ in range(20):  # training goes on
                dist.all_reduce(torch.ones(3))
    return sorted(path.name for path in (run / f"checkpoints/step_{steps[-1]:08d}").iterdir())


def load(run: Path, feature: int, ranks: Ranks | None = None) -> tuple[int, list[str]]:
    """The step of the newest good one, and names of what did not come back as it was saved on whatever mesh."""
    ranks = ranks if ranks is not None else all_ranks()
    checkpoint = Checkpointer(run, ranks=ranks).to_resume()
    assert checkpoint is not None
    assert checkpoint.state["rank"] == 0
    wrong = []
    for kind, loads in (("model", checkpoint.load_model), ("optimizer", checkpoint.load_optimizer)):
        expected = pieces(serial(checkpoint.step, kind), feature, ranks.rank)
        found: dict[str, Any] = {
            name: Piece(torch.zeros_like(piece.tensor), piece.shape, piece.offsets) for name, piece in expected.items()
        }
        targets: State = found
        loads(targets)
        wrong += [name for name, piece in expected.items() if not torch.equal(piece.tensor, found[name].tensor)]
    return checkpoint.step, wrong


def load_damaged(run: Path) -> str:
    """What is said of checkpoints of which none is good."""
    try:
        Checkpointer(run, ranks=all_ranks()).to_resume()
    except AgreedError as error:
        return str(error)
    return "nothing"


def fail_on_rank_1(run: Path) -> tuple[str, list[str]]:
    """What a save says whose second rank cannot write, and what is left."""
    ranks = all_ranks()
    if ranks.rank == 1:
        run = run / "nowhere"  # no folder of that name is made: only rank 0 makes one
    checkpointer = Checkpointer(run, ranks=ranks, background=True)
    checkpointer.save(6, model=pieces(serial(6, "model"), 2, ranks.rank), optimizer={}, state={})
    try:
        checkpointer.wait()
    except AgreedError as error:
        return str(error), sorted(path.name for path in (run / "checkpoints").iterdir()) if ranks.is_first else []
    return "nothing", []


def killed_while_writing(run: Path) -> None:
    """Rank 1 is killed in the middle of a write in the background; the others wait for it in vain."""
    ranks, writing, real = all_ranks(), threading.Event(), PartsWriter._write_file

    def write_file(self: PartsWriter, *args: Any) -> Any:
        if ranks.rank == 1:
            writing.set()
            time.sleep(60)
        return real(self, *args)

    PartsWriter._write_file = write_file  # type: ignore[method-assign]
    checkpointer = Checkpointer(run, ranks=ranks, background=True)
    checkpointer.save(8, model=pieces(serial(8, "model"), 2, ranks.rank), optimizer={}, state={})
    if ranks.rank == 1:
        assert writing.wait(30)
        signal.raise_signal(signal.SIGKILL)
    checkpointer.wait()
