"""The grid, the names of points and the table; the sweep itself is in test_end_to_end."""

from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from activation_store.errors import UserError
from launch.compose import compose_config
from launch.sweep import find_grid
from launch.sweep_point import flatten, point_slug
from launch.sweep_table import build_table


def test_the_grid_of_a_file_and_of_words() -> None:
    words = ["sweep=dictionary_size", "optim.lr=1e-3,2e-3", "activation.k=16"]
    grid = find_grid(compose_config(words, verb="sweep"), words)
    assert grid == {"model.n_features": ["512", "1024", "2048"], "optim.lr": ["0.001", "0.002"]}


def test_groups_and_ranges_vary_too() -> None:
    words = ["activation=topk,batchtopk", "model.seed=range(0,3)"]
    grid = find_grid(compose_config(words, verb="sweep"), words)
    assert grid == {"activation": ["topk", "batchtopk"], "model.seed": ["0", "1", "2"]}


@pytest.mark.parametrize("word", ["store.path=a,b", "subject=gpt2,smollm2", "run=a,b", "text.seed=1,2"])
def test_what_every_point_shares_cannot_vary(word: str) -> None:
    with pytest.raises(UserError, match="cannot vary"):
        find_grid(compose_config([word], verb="sweep"), [word])


def test_slugs_are_readable() -> None:
    assert point_slug({"model.n_features": "512", "activation.k": "8"}) == "n_features-512_k-8"
    assert point_slug({"model.seed": "1", "source.seed": "2"}) == "model.seed-1_source.seed-2"


@given(st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True))
def test_different_values_never_share_a_folder(values: list[str]) -> None:
    first, second = (point_slug({"activation.k": value}) for value in values)
    assert first != second
    assert "/" not in first
    assert len(first) < 100


def _result(slug: str, config: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"point": slug, "config": config, "status": "done", "error": "", "seconds": 1.5, "metrics": {}, **more}


def test_the_table_has_what_varied_and_what_came_of_it() -> None:
    metrics = {"fvu": 0.25, "l0": 12.0, "training_rule": {"fvu": 0.24}, "replacement": {"kl": 0.5}}
    results = [
        _result("b", flatten({"model": {"n": 20}, "run": "x", "optim": {"lr": 0.1}}), metrics=metrics),
        _result("a", flatten({"model": {"n": 3}, "run": "y", "optim": {"lr": 0.1}}), status="failed", error="why"),
    ]
    table = build_table(results)
    assert list(table.columns[:3]) == ["point", "model.n", "status"]
    assert list(table["point"]) == ["a", "b"]  # by value, as numbers
    assert "optim.lr" not in table
    done = table.iloc[1]
    assert (done["fvu"], done["training_fvu"], done["kl"], done["seconds"]) == (0.25, 0.24, 0.5, 1.5)
    assert table["error"].tolist() == ["why", ""]
    assert pd.isna(table.iloc[0]["fvu"])
    assert table["fvu"].dtype == float
