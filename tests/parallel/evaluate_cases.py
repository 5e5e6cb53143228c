"""What the processes of test_evaluate_mesh.py run."""

import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from trainer.checkpoint import Checkpoint
from trainer.config import DecoderSplit, EvalConfig, ParallelConfig
from trainer.evaluation import evaluate as verb
from trainer.evaluation import measure
from trainer.model.clt import CrossLayerTranscoder

CONFIG = EvalConfig(documents=4, batch_contexts=3, contexts_per_document=2)


@dataclass(frozen=True)
class Answer:
    """What a rank has to say: the figures, the numbers of parameters that it held, and the lines that it printed."""

    evaluation: dict[str, Any]
    held: int
    lines: list[str]


def evaluated(run: Path, parallel: ParallelConfig, fault: str = "") -> Answer:
    """Evaluates in float64, where a mesh and one process differ by rounding alone; without plots, and with outliers."""
    held: list[int] = []
    real, settings = verb.load_checkpoint, verb._settings

    def load(*args: Any, **kwargs: Any) -> CrossLayerTranscoder:
        model = real(*args, **kwargs)
        held.append(sum(parameter.numel() for parameter in model.parameters()))
        return model.double()

    said = io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(redirect_stderr(said))
        stack.enter_context(mock.patch.object(verb, "load_checkpoint", load))
        stack.enter_context(mock.patch.object(verb, "save_plots", return_value=[]))
        narrow = mock.patch.object(verb, "_settings", lambda *args: replace(settings(*args), outlier_factor=1.5))
        stack.enter_context(narrow)
        if fault and os.environ["RANK"] == _RANK[fault]:
            stack.enter_context(_FAULTS[fault]())
        evaluation = verb.evaluate(run, CONFIG, parallel=parallel, device="cpu", show_table=False)
    return Answer(evaluation, held[0], said.getvalue().splitlines())


def error_of(run: Path, parallel: ParallelConfig, fault: str) -> tuple[str, str]:
    """Class and line of what an evaluation with a fault on one rank ends with."""
    try:
        evaluated(run, parallel, fault)
    except (ValueError, KeyboardInterrupt) as error:
        return type(error).__name__, str(error)
    raise AssertionError("nothing went wrong")


def parallel(feature: int, split: str = "auto") -> ParallelConfig:
    """A feature axis."""
    return ParallelConfig(feature=feature, decoder_split=DecoderSplit(split))


def _full() -> Any:
    return mock.patch.object(verb, "write_json", side_effect=OSError(errno.ENOSPC, "No space left on device"))


def _removed() -> Any:
    return mock.patch.object(Checkpoint, "reader", side_effect=FileNotFoundError(errno.ENOENT, "gone", "index.json"))


def _signal() -> Any:
    real = measure.context_batches

    def batches(*args: Any) -> Iterator[Any]:
        for number, batch in enumerate(real(*args)):
            if number == 1:
                signal.raise_signal(signal.SIGINT)
            yield batch

    return mock.patch.object(measure, "context_batches", batches)


def _rounded() -> Any:
    """One row less than the others' is used, as rounding may have it."""
    real = measure.Exclusion.excluded

    def excluded(*args: Any) -> torch.Tensor:
        excluded_NC = real(*args)
        excluded_NC.view(-1)[(~excluded_NC).view(-1).nonzero()[0]] = True
        return excluded_NC

    return mock.patch.object(measure.Exclusion, "excluded", excluded)


_FAULTS: dict[str, Callable[[], Any]] = {"full": _full, "removed": _removed, "signal": _signal, "rounded": _rounded}
_RANK = {"full": "0", "removed": "1", "signal": "1", "rounded": "1"}
