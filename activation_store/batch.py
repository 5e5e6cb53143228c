"""A training batch: plain data, apart from the reader, so that an engine runs where no store can be read."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ActivationBatch:
    """Rows of a batch: activations (B, L, D) float32, their logical rows (B,) int64, and the epoch of the first one."""

    mlp_in: Tensor
    mlp_out: Tensor
    rows: Tensor
    epoch: int
