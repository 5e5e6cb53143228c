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
