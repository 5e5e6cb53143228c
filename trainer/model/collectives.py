"""What the model asks of a device mesh, and the identity that a single device answers with.

The model knows no rank: it calls these where a sum over the mesh's `feature` axis (which holds parts of the features,
or of the decoder's columns) or `data` axis (which holds parts of the tokens) belongs. `trainer.parallel` implements
them.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trainer.model.features import LayerCodes


@dataclass(frozen=True, slots=True)
class Partition:
    """How a parameter may be split: the dim that counts features, and the dim that counts columns of d_model.

    None: the parameter has no such dim (it is replicated over that way of splitting).
    """

    feature_dim: int | None = None
    column_dim: int | None = None


@dataclass(frozen=True, slots=True)
class Partitioning:
    """Which part of every parameter a rank of the feature axis holds: its equal part of the split dim.

    by_columns: decoders are split by the columns of d_model, else by features (rows).
    """

    size: int = 1
    rank: int = 0
    by_columns: bool = True

    def split_dim(self, partition: Partition) -> int | None:
        """The dim that is split; None: every rank holds the whole."""
        if self.by_columns and partition.column_dim is not None:
            return partition.column_dim
        return partition.feature_dim

    def part(self, length: int) -> slice:
        """This rank's part of a dim of that length, which the size divides."""
        each = length // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def local(self, tensor: Tensor, partition: Partition) -> Tensor:
        """This rank's part of a whole parameter, a view."""
        dim = self.split_dim(partition)
        if dim is None or self.size == 1:
            return tensor
        part = self.part(tensor.shape[dim])
        return tensor.narrow(dim, part.start, part.stop - part.start)


class Collectives(Protocol):
    """Sums and exchanges over the device mesh. Each is differentiable where its argument is."""

    def sum_features(self, x: Tensor) -> Tensor:
        """Sum over the feature axis (counts of active features, squared norms of decoder columns)."""

    def sum_data(self, x: Tensor) -> Tensor:
        """Sum over the data axis (statistics of the global microbatch)."""

    def gather_codes(self, codes: LayerCodes) -> LayerCodes:
        """Codes of this device's features -> codes of every feature that this device decodes."""

    def combine_output(self, y_BTD: Tensor) -> Tensor:
        """Reconstruction from this device's decoder rows -> from all of them."""


class IdentityCollectives:
    """The mesh of one device."""

    def sum_features(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def sum_data(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def gather_codes(self, codes: LayerCodes) -> LayerCodes:
        """The codes themselves."""
        return codes

    def combine_output(self, y_BTD: Tensor) -> Tensor:
        """y itself."""
        return y_BTD
