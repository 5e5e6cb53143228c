"""What the model asks of a device mesh, and the identity that a single device answers with.

The model knows no rank: it calls these where a sum over the mesh's `feature` axis (which holds parts of the features,
or of the decoder's columns) or `data` axis (which holds parts of the tokens) belongs. `trainer.parallel` implements
them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trainer.kernels.batch_threshold import Candidates
from trainer.kernels.encode_topk import Selection
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

    @property
    def columns_split(self) -> bool:
        """Whether this device holds a part of the columns only, of features that others encode."""
        return self.size > 1 and self.by_columns

    @property
    def rows_split(self) -> bool:
        """Whether y has to be summed over devices: each decodes its own features, into all columns."""
        return self.size > 1 and not self.by_columns

    def part(self, length: int) -> slice:
        """This rank's part of a dim of that length, which the size divides."""
        each = length // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def shape(self, whole: tuple[int, ...], partition: Partition) -> tuple[int, ...]:
        """The shape of this rank's part of a parameter of shape `whole`."""
        dim = self.split_dim(partition)
        return tuple(length // self.size if at == dim else length for at, length in enumerate(whole))

    def local(self, tensor: Tensor, partition: Partition) -> Tensor:
        """This rank's part of a whole parameter, a view."""
        dim = self.split_dim(partition)
        if dim is None or self.size == 1:
            return tensor
        part = self.part(tensor.shape[dim])
        return tensor.narrow(dim, part.start, part.stop - part.start)


class Exchange(Protocol):
    """The codes of one source layer on their way from the devices that encode them to those that decode them.

    Used in this order: `total` (once the next layer is being encoded, so that the counts have arrived), then either
    nothing more (the layer goes dense) or `send`, and later `receive`.
    """

    def total(self) -> int | None:
        """Entries selected over the feature axis, the same number on all its ranks; None where one gave up counting."""

    def send(self, codes: LayerCodes) -> None:
        """Hand out this device's codes: starts the transfer, which goes on while other layers are encoded."""

    def receive(self) -> LayerCodes:
        """The codes of every feature that this device decodes, in order of (token, feature), with n_features of them.

        Differentiable: a gradient of the values goes back to the device that encoded them, summed over those that
        decoded them, in the order of ranks.
        """


class Collectives(Protocol):
    """Sums and exchanges over the device mesh.

    The ranks of a feature group (same place on the data axis) hold the same tokens and end up with the same loss: sums
    over the feature axis have the identity as their backward. Ranks along the data axis hold other tokens, and the
    engine takes the mean of their gradients.

    partitioning: what this device holds of every parameter (its place on the feature axis, and how decoders are split).
    data_size: number of ranks of the data axis; each has equally many of a global microbatch's tokens, in rank order.
    ahead: how many layers the training pass encodes before it decodes the first of them, so that their exchanges
        overlap; 0 where there is nothing to wait for.
    """

    partitioning: Partitioning
    data_size: int
    ahead: int

    def sum_features(self, x: Tensor) -> Tensor:
        """Sum over the feature axis of what each device has of its own features (counts, penalties)."""

    def sum_columns(self, x: Tensor) -> Tensor:
        """Sum over the feature axis of what each device has of its columns of y; x where all have all columns."""

    def sum_to_owners(self, x_F: Tensor) -> Tensor:
        """From sums over this device's columns, by feature of the whole layer (F), to those over all columns, by
        feature that this device encodes (its part of F). x itself where a decoder row lies on one device.

        The backward pass gathers the gradients of all features, so every rank must come by here, needed or not.
        """

    def sum_data(self, x: Tensor) -> Tensor:
        """Sum over the data axis: statistics of the global microbatch. The gradient is multiplied by data_size, which
        the mean over the data axis takes back."""

    def any_data(self, x: Tensor) -> Tensor:
        """Logical or, over the data axis, of a bool tensor."""

    def smallest(self, x: Tensor) -> Tensor:
        """Minimum over both axes; no gradient. Ranks without a value give infinity."""

    def gather_all(self, x_N: Tensor) -> Tensor:
        """The lists of all ranks of both axes, of any lengths, one after the other; no gradient."""

    def gather_data(self, x_N: Tensor) -> Tensor:
        """As gather_all, over the data axis."""

    def cut_rows(self, scores_BK: Tensor, counts_BL: Tensor, k: int) -> Tensor | None:
        """Which of this device's candidates are among the k best of their token over the feature axis, (B, K) bool.

        scores_BK: -inf where there is none; columns in order of (layer, feature), of layer l as many as counts_BL says.
        None: all of them (they are few enough). Ties: the smallest (layer, feature).
        """

    def cut_batch(
        self, layers: Sequence[Candidates], n: int, total: int, n_tokens: int, n_features: int
    ) -> list[Tensor] | None:
        """Masks over this device's candidates of each layer: those among the n best over both axes; None: all of them.

        total: candidates over both axes. n_tokens, n_features: this device's, as in the candidates' positions. Ties:
        the smallest (global token, layer, feature).
        """

    def count_all(self, n: int) -> int:
        """Sum over both axes of a number."""

    def announce(self, selection: Selection | LayerCodes | None) -> Exchange:
        """Begin the exchange of a layer's codes with their numbers; None where they are too many to be kept."""

    def gather_block(self, a_Bf: Tensor) -> list[Tensor]:
        """Dense path: the same block of every device's features, for the decoder columns of this one; no autograd."""

    def sum_block(self, parts: list[Tensor]) -> Tensor:
        """Its way back: from this device's columns, by device that owns the features, to those of this device's."""

    def combine_output(self, y_BTD: Tensor) -> Tensor:
        """Reconstruction from this device's features -> from all of them (rows); y itself with columns split."""

    def gather_columns(self, y_BD: Tensor) -> Tensor:
        """This device's columns of a reconstruction -> all of them; y itself where all have all; no gradient."""

    def gather_features(self, x_LF: Tensor) -> Tensor:
        """What every device has of its own features -> of all of them, in their order; no gradient."""


class _Here:
    """The exchange of a single device."""

    def __init__(self, selection: Selection | LayerCodes | None) -> None:
        self._count = None if selection is None else selection.values.numel()
        self._codes: LayerCodes | None = None

    def total(self) -> int | None:
        """See Exchange."""
        return self._count

    def send(self, codes: LayerCodes) -> None:
        """See Exchange."""
        self._codes = codes

    def receive(self) -> LayerCodes:
        """See Exchange."""
        assert self._codes is not None
        return self._codes


class IdentityCollectives:
    """The mesh of one device: every sum is its argument, and nothing travels."""

    def __init__(self) -> None:
        self.partitioning = Partitioning()
        self.data_size, self.ahead = 1, 0

    def sum_features(self, x: Tensor) -> Tensor:
        """See Collectives."""
        return x

    def sum_columns(self, x: Tensor) -> Tensor:
        """See Collectives."""
        return x

    def sum_to_owners(self, x_F: Tensor) -> Tensor:
        """See Collectives."""
        return x_F

    def sum_data(self, x: Tensor) -> Tensor:
        """See Collectives."""
        return x

    def any_data(self, x: Tensor) -> Tensor:
        """See Collectives."""
        return x

    def smallest(self, x: Tensor) -> Tensor:
        """See Collectives."""
        return x

    def gather_all(self, x_N: Tensor) -> Tensor:
        """See Collectives."""
        return x_N

    def gather_data(self, x_N: Tensor) -> Tensor:
        """See Collectives."""
        return x_N

    def cut_rows(self, scores_BK: Tensor, counts_BL: Tensor, k: int) -> Tensor | None:
        """See Collectives."""
        return None

    def cut_batch(
        self, layers: Sequence[Candidates], n: int, total: int, n_tokens: int, n_features: int
    ) -> list[Tensor] | None:
        """See Collectives."""
        return None

    def count_all(self, n: int) -> int:
        """See Collectives."""
        return n

    def announce(self, selection: Selection | LayerCodes | None) -> Exchange:
        """See Collectives."""
        return _Here(selection)

    def gather_block(self, a_Bf: Tensor) -> list[Tensor]:
        """See Collectives."""
        return [a_Bf]

    def sum_block(self, parts: list[Tensor]) -> Tensor:
        """See Collectives."""
        return parts[0]

    def combine_output(self, y_BTD: Tensor) -> Tensor:
        """See Collectives."""
        return y_BTD

    def gather_columns(self, y_BD: Tensor) -> Tensor:
        """See Collectives."""
        return y_BD

    def gather_features(self, x_LF: Tensor) -> Tensor:
        """See Collectives."""
        return x_LF


def exchanged(collectives: Collectives, codes: LayerCodes) -> LayerCodes:
    """Codes of this device's features -> codes of every feature that it decodes, at once; differentiable."""
    exchange = collectives.announce(codes)
    exchange.total()
    exchange.send(codes)
    return exchange.receive()
