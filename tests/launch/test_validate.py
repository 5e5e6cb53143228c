"""Each rule refuses what it is there for, in one line with a remedy, and lets the defaults pass."""

import copy
from typing import Any

import pytest

from activation_store.errors import UserError
from launch.config import LayerloomConfig
from launch.validate import validate
from launch.verbs import VERBS


def _set(config: LayerloomConfig, values: dict[str, Any]) -> LayerloomConfig:
    config = copy.deepcopy(config)
    for key, value in values.items():
        *groups, name = key.split(".")
        holder: Any = config
        for group in groups:
            holder = getattr(holder, group)
        setattr(holder, name, value)
    return config


@pytest.mark.parametrize("verb", VERBS)
def test_the_defaults_obey_every_rule(verb: str) -> None:
    validate(LayerloomConfig(), verb)


@pytest.mark.parametrize(
    ("verb", "values", "parts"),
    [
        ("harvest", {"text.context_length": 1}, ["text.context_length=1", "at least 2"]),
        ("harvest", {"text.held_out_documents": 0}, ["store.held_out_tokens", "text.held_out_documents=0"]),
        ("harvest", {"text.held_out_documents": -1}, ["text.held_out_documents=-1", "at least 0"]),
        ("harvest", {"text.documents_per_block": 0}, ["text.documents_per_block=0", "at least 1"]),
        ("harvest", {"store.tokens": 0}, ["store.tokens=0", "at least 1"]),
        ("harvest", {"store.layer_start": 4, "store.layer_stop": 4}, ["store.layer_stop=4", "null"]),
        ("harvest", {"store.shard_rows": 1000}, ["store.shard_rows=1000", "store.chunk_rows=256", "use 1024"]),
        ("harvest", {"store.chunk_rows": 0}, ["store.chunk_rows=0", "at least 1"]),
        ("harvest", {"store.outlier_factor": 0.5}, ["store.outlier_factor=0.5"]),
        ("harvest", {"launch.threads": -1}, ["launch.threads=-1"]),
        ("harvest", {"store.path": " "}, ["store.path is empty"]),
        ("train", {"activation.k": 2048}, ["activation.k=2048", "model.n_features=768"]),
        ("train", {"run": "a/../b", "store.path": "b"}, ["run", "store.path"]),
        ("publish", {"run": "x", "output": "./x"}, ["output and run"]),
        ("demo", {"eval.documents": 25}, ["eval.documents=25", "text.held_out_documents=24"]),
        ("demo", {"eval.batch_contexts": 0}, ["eval.batch_contexts=0", "at least 1"]),
    ],
)
def test_a_broken_rule_is_one_line(verb: str, values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        validate(_set(LayerloomConfig(), values), verb)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == []


def test_rules_of_groups_that_a_verb_does_not_read_do_not_matter() -> None:
    validate(_set(LayerloomConfig(), {"text.context_length": 1, "activation.k": 10**9}), "evaluate")
    validate(_set(LayerloomConfig(), {"activation.k": 10**9}), "harvest")
