"""Work over feature-major entries cut into parts of about equal cost.

A part is a run of features with all their columns; a hot feature (one with many entries) is cut by columns instead,
and its dots by entries. The cut depends on the entries alone, never on the number of threads.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from trainer.kernels.cpu.compiling import block_of, helper, int64_array, kernel
from trainer.kernels.cpu.threads import launch

# Parts of one pass at most, hot ones aside; and the values that one touches at least.
_PARTS = 64
_MIN_VALUES = 2**16
_ROOM = 4096


@dataclass(frozen=True, slots=True)
class RowTasks:
    """rows: (n, 5) first and last + 1 feature and column, and whether this part also takes the dots of its entries.
    dots: (n, 2) ranges of feature-major entries of hot features."""

    rows: Tensor
    n_rows: int
    dots: Tensor
    n_dots: int


def row_tasks(offsets: Tensor, n_columns: int, idle_cost: int) -> RowTasks:
    """Cut features into parts. idle_cost: what a feature costs beside its entries, in entries."""
    n_features = offsets.numel() - 1
    rows, dots, counts = offsets.new_empty(_ROOM, 5), offsets.new_empty(_ROOM, 2), offsets.new_zeros(2)
    if n_features and n_columns:
        launch(_cut, 1, n_features, n_columns, idle_cost, offsets, rows, dots, counts)
    n_rows, n_dots = counts.tolist()
    return RowTasks(rows, n_rows, dots, n_dots)


@helper
def _add_rows(
    rows: "np.ndarray[tuple[int], np.dtype[np.int64]]", n: int, f0: int, f1: int, c0: int, c1: int, with_dots: int
) -> int:
    row = rows[5 * n : 5 * n + 5]
    row[0], row[1], row[2], row[3], row[4] = f0, f1, c0, c1, with_dots
    return n + 1


@kernel
def _cut(pointer: Any) -> None:
    a = block_of(pointer)
    n_features, n_columns, idle = a[2], a[3], a[4]
    offsets = int64_array(a[5], n_features + 1)
    rows, dots, counts = int64_array(a[6], 5 * _ROOM), int64_array(a[7], 2 * _ROOM), int64_array(a[8], 2)
    total = offsets[n_features] - offsets[0] + idle * n_features
    target = max(total // _PARTS, _MIN_VALUES // n_columns + 1)
    n_rows, n_dots, first, cost = 0, 0, 0, 0
    for f in range(n_features):
        entries = offsets[f + 1] - offsets[f]
        if entries > 2 * target:
            if f > first:
                n_rows = _add_rows(rows, n_rows, first, f, 0, n_columns, 1)
            width = max(64, -(-n_columns // (16 * 8)) * 16)
            for c in range(0, n_columns, width):
                n_rows = _add_rows(rows, n_rows, f, f + 1, c, min(c + width, n_columns), 0)
            for n in range(offsets[f], offsets[f + 1], target):
                dots[2 * n_dots], dots[2 * n_dots + 1] = n, min(n + target, offsets[f + 1])
                n_dots += 1
            first, cost = f + 1, 0
            continue
        cost += entries + idle
        if cost >= target:
            n_rows = _add_rows(rows, n_rows, first, f + 1, 0, n_columns, 1)
            first, cost = f + 1, 0
    if first < n_features:
        n_rows = _add_rows(rows, n_rows, first, n_features, 0, n_columns, 1)
    counts[0], counts[1] = n_rows, n_dots
