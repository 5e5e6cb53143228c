"""A training batch: plain data, apart from the reader, so that an engine runs where no store can be read."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ActivationBatch:
    """Rows of a batch: activations (B, L, D), their logical rows (B,) int64, and the epoch of the first one.

    float32; or, where decoding was not wanted, as stored, with the scales (B, L) of the dtypes that have them. In
    memory the rows of a layer follow one another.
    """

    mlp_in: Tensor
    mlp_out: Tensor
    rows: Tensor
    epoch: int
    mlp_in_scale: Tensor | None = None
    mlp_out_scale: Tensor | None = None
