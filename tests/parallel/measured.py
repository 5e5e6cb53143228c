"""What one process makes of a run that was trained in float64: evaluation.json and the published folder, compared."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from tests.training.runs import assert_close
from trainer.checkpoint import Checkpointer
from trainer.config import EvalConfig, PublishConfig
from trainer.evaluation.evaluate import evaluate
from trainer.publish.export import publish

EVALUATION = EvalConfig(documents=4, batch_contexts=4)
# Of float32 weights that agree to the last bit or two: figures, their standard errors (which are differences), and
# published tensors, as a part of the tensor's largest entry.
_FIGURES, _WEIGHTS = 1e-4, 1e-6


def measured_and_published(run: Path | str, *, publishable: bool = True) -> Path:
    """Evaluates and publishes a copy of the run whose newest checkpoint is in float32, as checkpoints are.

    Returns the copy, with evaluation.json in it and the published folder in `published`.
    """
    copy = Path(f"{run}-float32")
    _copy_in_float32(Path(run), copy)
    with mock.patch("trainer.evaluation.evaluate.save_plots", return_value=[]):
        evaluate(copy, EVALUATION, device="cpu", show_table=False)
    if publishable:
        publish(copy, copy / "published", PublishConfig(), device="cpu")
    return copy


def _copy_in_float32(run: Path, copy: Path) -> None:
    checkpoint = Checkpointer(run).newest_good(model_only=True)
    assert checkpoint is not None
    copy.mkdir()
    shutil.copy(run / "config.yaml", copy)
    reader = checkpoint.reader()
    tensors = {name: reader.tensor(name) for name in reader.entries()}
    assert tensors["layers.0.W_enc"].dtype == torch.float64
    model = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    Checkpointer(copy).save(checkpoint.step, model=model, optimizer={}, state=checkpoint.state)


def assert_same_evaluation(found: Path, wanted: Path) -> None:
    """evaluation.json of two folders: whole numbers and words are the same, figures within a tolerance."""
    ours, theirs = _evaluation(found), _evaluation(wanted)
    assert theirs["replacement"]["ce_recovered"] is not None
    assert_close(ours, theirs, str(found), rel=_FIGURES, absolute=1e-7)
    for name in ("dead_fraction_per_layer", "silent_fraction", "density_histogram"):
        assert ours[name] == theirs[name], f"{found} {name}"


def assert_same_publication(found: Path, wanted: Path) -> None:
    """The same files: config.yaml byte by byte, every weight within rounding, the figures as the evaluations'."""
    names = sorted(path.name for path in wanted.iterdir())
    assert sum(name.endswith(".safetensors") for name in names) >= 3
    assert sorted(path.name for path in found.iterdir()) == names
    assert (found / "config.yaml").read_bytes() == (wanted / "config.yaml").read_bytes()
    assert_same_evaluation(found, wanted)
    for path in wanted.glob("*.safetensors"):
        ours, theirs = load_file(found / path.name), load_file(path)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            where = f"{found / path.name} {name}"
            assert ours[name].dtype == tensor.dtype, where
            assert ours[name].shape == tensor.shape, where
            assert float((ours[name] - tensor).abs().max()) <= _WEIGHTS * float(tensor.abs().max()), where


def _evaluation(folder: Path) -> dict[str, Any]:
    evaluation: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return evaluation
