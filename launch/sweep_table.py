"""The results of a sweep as one table: every config value that varied, and what came of it."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from activation_store.atomic import read_json, write_bytes
from launch.sweep_point import RESULT_FILE

# Columns of the table <- keys of evaluation.json (dotted).
METRICS = {
    "fvu": "fvu",
    "fvu_se": "fvu_se",
    "l0": "l0",
    "training_fvu": "training_rule.fvu",
    "training_l0": "training_rule.l0",
    "dead_fraction": "dead_fraction",
    "silent_fraction": "silent_fraction",
    "ce_replaced": "replacement.ce_replaced",
    "ce_recovered": "replacement.ce_recovered",
    "kl": "replacement.kl",
    "top1_agreement": "replacement.top1_agreement",
    "n_features_total": "n_features_total",
    "parameters": "parameters",
}
# What differs between points without being a choice.
_NOT_VARIED = ("run", "output", "device")


def write_results(output: Path) -> pd.DataFrame | None:
    """Writes results.parquet and results.csv of every point that left a result; None if none did."""
    files = sorted((output / "points").glob(f"*/{RESULT_FILE}"))
    results = [read_json(file) for file in files]
    if not results:
        return None
    table = build_table(results)
    parquet = io.BytesIO()
    table.to_parquet(parquet, index=False)
    write_bytes(output / "results.parquet", parquet.getvalue())
    write_bytes(output / "results.csv", table.to_csv(index=False).encode())
    return table


def build_table(results: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a point: `point`, the varied config values, `status`, metrics, `seconds`, `error`."""
    keys = [key for key in _varied(results) if key not in _NOT_VARIED]
    rows = [
        {
            "point": result["point"],
            **{key: result["config"].get(key) for key in keys},
            "status": result["status"],
            **{name: _select(result["metrics"], path) for name, path in METRICS.items()},
            "seconds": result["seconds"],
            "error": result["error"],
        }
        for result in results
    ]
    table = pd.DataFrame(rows)
    numbers = [*METRICS, "seconds"]
    table[numbers] = table[numbers].apply(pd.to_numeric)
    return table.sort_values([*keys, "point"], kind="stable", ignore_index=True) if keys else table


def format_results(table: pd.DataFrame) -> str:
    """The table for a terminal: what varied, and the figures that are compared most."""
    shown = ["fvu", "l0", "dead_fraction", "ce_recovered", "top1_agreement", "parameters", "seconds", "status"]
    start = list(table.columns).index("status")
    return table[[*table.columns[1:start], *shown]].to_string(
        index=False, na_rep="-", float_format=lambda x: f"{x:.4g}"
    )


def _varied(results: list[dict[str, Any]]) -> list[str]:
    """Config keys whose value is not the same in all results, in the config's order."""
    keys = list(dict.fromkeys(key for result in results for key in result["config"]))
    return [key for key in keys if len({repr(result["config"].get(key)) for result in results}) > 1]


def _select(metrics: Mapping[str, Any], path: str) -> Any:
    value: Any = metrics
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
