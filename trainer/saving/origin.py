"""What a checkpoint says of the run that it is of."""

from collections.abc import Mapping
from typing import Any

from activation_store.errors import AgreedError
from trainer.config import DecoderSplit, RunConfig
from trainer.run_folder import checkpoint_differences, config_to_dict


def origin(config: RunConfig, *, by_columns: bool) -> dict[str, Any]:
    """Its config, and by which mesh, split and engine it is written: a part of state.json."""
    parallel = config.parallel
    written_by = {
        "data": parallel.data,
        "feature": parallel.feature,
        "decoder_split": (DecoderSplit.columns if by_columns else DecoderSplit.rows).value,
        "engine": config.engine.kind.value,
    }
    return {"written_by": written_by, "config": config_to_dict(config)}


def check_origin(config: RunConfig, state: Mapping[str, Any]) -> None:
    """Raises AgreedError for a checkpoint of another config: a run folder's are its own, those elsewhere may not be."""
    if differences := checkpoint_differences(state["config"], config):
        raise AgreedError(
            f"train.checkpoint_path={config.train.checkpoint_path} holds checkpoints of another config: "
            f"{differences[0]}; give a folder or URL for this run alone"
        )
