"""Configs of small runs, and their results as tensors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.checkpoint import Checkpointer
from trainer.config import (
    ActivationConfig,
    ActivationKind,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
)
from trainer.metrics import read_metrics

# Every activation with what is special about it: schedules, penalties, scopes, dead-feature terms, accumulation.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "relu": {"activation.kind": "relu", "activation.tanh_lambda": 0.01, "activation.pre_act_lambda": 0.01},
    "jumprelu": {
        "activation.kind": "jumprelu",
        "activation.tanh_lambda": 0.01,
        "activation.l0_lambda": 0.001,
        "activation.l0_target": 9.0,
        "activation.pre_act_lambda": 0.01,
        "model.initial_density": 0.01,
    },
    "topk": {"activation.kind": "topk", "activation.k_start": 9, "activation.k_anneal_fraction": 0.6},
    "topk_all_layers": {
        "activation.kind": "topk",
        "activation.scope": "all_layers",
        "activation.score": "decoder_norm",
        "model.skip": True,
    },
    "batchtopk": {
        "activation.kind": "batchtopk",
        "activation.pre_act_lambda": 0.01,
        "activation.per_token_fraction": 0.25,
        "train.microbatch_tokens": 48,
    },
    "batchtopk_all_layers": {
        "activation.kind": "batchtopk",
        "activation.scope": "all_layers",
        "activation.threshold_scope": "feature",
        "train.precision": "bf16",
        "model.span": "per_layer",
    },
}


def tiny_run(store: RunConfig, run: Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """12 steps of 96 tokens on the tiny store, F = 64, k = 2; `overrides` by dotted name."""
    config = replace(
        store,
        run=str(run),
        source=SourceConfig(seed=3, pool_rows=256),
        schedule=ScheduleConfig(warmup_steps=3, decay_fraction=0.3),
        train=TrainConfig(
            tokens=12 * 96, batch_size_tokens=96, checkpoint_every=5, eval_every=4, log_every=3, keep_checkpoints=2
        ),
        model=ModelConfig(n_features=64, seed=1),
        activation=ActivationConfig(
            kind=ActivationKind.topk, k=2, auxk_k=2, dead_after_tokens=96, calibration_tokens=300
        ),
        optim=OptimConfig(lr=2e-3),
    )
    for name, value in (overrides or {}).items():
        holder: Any = config
        *groups, key = name.split(".")
        for group in groups:
            copy = replace(getattr(holder, group))
            setattr(holder, group, copy)
            holder = copy
        kind = type(getattr(holder, key))
        setattr(holder, key, kind(value) if isinstance(value, str) else value)
    return config


def checkpoint_tensors(run: Path | str, config: RunConfig | None = None) -> dict[str, Tensor]:
    """Model and optimizer of the newest good checkpoint; of one that lies elsewhere, by the run's config."""
    checkpoint = (Checkpointer(run) if config is None else Checkpointer.of(run, config)).newest_good()
    assert checkpoint is not None
    reader = checkpoint.reader()
    return {name: reader.tensor(name) for name in reader.entries()} | {
        f"optimizer.{name}": reader.tensor(name, kind="optimizer") for name in reader.entries("optimizer")
    }


def records(run: Path | str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return list(read_metrics(Path(run) / "metrics.jsonl"))


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Same names, and the same bits in every tensor (NaN equals NaN of the same bits)."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert tensor.dtype == other.dtype, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


def assert_close(found: Any, wanted: Any, where: str, *, rel: float, absolute: float) -> None:
    """The numbers of nested dicts and lists, which have the same keys and lengths, within a tolerance; None and words
    are the same."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_close(found[key], wanted[key], f"{where}.{key}", rel=rel, absolute=absolute)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for number, value in enumerate(wanted):
            assert_close(found[number], value, f"{where}[{number}]", rel=rel, absolute=absolute)
    elif wanted is None or isinstance(wanted, str):
        assert found == wanted, where
    else:
        assert found == pytest.approx(wanted, rel=rel, abs=absolute), where
