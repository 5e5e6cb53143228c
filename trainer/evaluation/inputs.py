"""What an evaluation was made from, in evaluation_inputs.json beside evaluation.json.

evaluation.json has the keys of its schema and no others; whether it still belongs to the run's newest checkpoint and to
an `eval` config is answered from this file. It is removed before a new evaluation is written and comes last.
"""

import json
from pathlib import Path
from typing import Any

from activation_store.atomic import read_json
from trainer.checkpoint import Checkpoint, Checkpointer
from trainer.config import EvalConfig
from trainer.evaluation.report import SCHEMA_VERSION
from trainer.run_folder import RunFolder, load_config
from trainer.tensor_file import hash_file

INPUTS_FILE = "evaluation_inputs.json"


def evaluation_inputs(run: Path, checkpoint: Checkpoint, config: EvalConfig) -> dict[str, Any]:
    """The content of evaluation_inputs.json for the evaluation.json that lies in `run` now.

    `eval.batch_contexts` is left out: it changes memory and speed, not the figures.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": checkpoint.path.name,
        "weights_xxh3_64": checkpoint.weights_xxh3_64,
        "eval": {
            "documents": config.documents,
            "contexts_per_document": config.contexts_per_document,
            "replacement": config.replacement,
        },
        "evaluation_xxh3_64": hash_file(RunFolder(run).evaluation_file).xxh3_64,
    }


def evaluation_is_current(run: Path | str, config: EvalConfig) -> bool:
    """Whether evaluation.json and plots/summary.png are there and those of the newest good checkpoint and `config`."""
    folder = RunFolder(run)
    files = (folder.evaluation_file, folder.path / INPUTS_FILE, folder.plots / "summary.png")
    if not all(file.is_file() for file in files):
        return False
    checkpoint = Checkpointer.of(folder.path, load_config(folder.path)).newest_good(model_only=True)
    if checkpoint is None:
        return False
    try:
        recorded = read_json(folder.path / INPUTS_FILE)
    except json.JSONDecodeError:
        return False
    return bool(recorded == evaluation_inputs(folder.path, checkpoint, config))
