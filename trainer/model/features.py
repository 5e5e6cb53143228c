"""Sparse codes: what travels between selection and loss.

Legend: B tokens, L layers, F features of a layer, N entries (token, feature) of one source layer.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trainer.kernels.build_csc import FeatureIndex
from trainer.kernels.dispatch import Kernels


@dataclass(slots=True)
class _Derived:
    """What follows from the places of entries, whatever their values: made once for all codes that share them."""

    tokens: Tensor | None = None
    index: FeatureIndex | None = None


@dataclass(slots=True)
class LayerCodes:
    """Active entries of one source layer, in order of tokens.

    Args:
        offsets: (B+1) int64; the entries of token b are offsets[b]:offsets[b+1].
        feature_ids: (N) int64; a feature occurs at most once per token.
        values: (N) activations. In training, jumprelu adds entries of value 0: those in the band around the threshold
            that carry a gradient to it.
        n_features: F.
    """

    offsets: Tensor
    feature_ids: Tensor
    values: Tensor
    n_features: int
    _derived: _Derived = field(default_factory=_Derived, repr=False)

    @property
    def n_tokens(self) -> int:
        """B."""
        return self.offsets.numel() - 1

    @property
    def tokens(self) -> Tensor:
        """(N) int64: the token of every entry."""
        if self._derived.tokens is None:
            counts_B = self.offsets.diff()
            rows_B = torch.arange(self.n_tokens, device=self.offsets.device)
            self._derived.tokens = rows_B.repeat_interleave(counts_B, output_size=self.feature_ids.numel())
        return self._derived.tokens

    def index(self, kernels: Kernels) -> FeatureIndex:
        """The same entries in order of features (built once, used by encoder and decoder gradients)."""
        if self._derived.index is None:
            self._derived.index = kernels.build_csc(self.feature_ids, self.tokens, self.n_features)
        return self._derived.index

    def forget_index(self) -> None:
        """Lets go of what `tokens` and `index` keep: 24 bytes an entry, more than the codes themselves."""
        self._derived.tokens = self._derived.index = None

    def with_values(self, values_N: Tensor) -> "LayerCodes":
        """The same entries with other values; they share tokens and index."""
        return replace(self, values=values_N)

    def detach(self) -> "LayerCodes":
        """The same codes without autograd."""
        return self.with_values(self.values.detach())

    def l0(self) -> Tensor:
        """Mean number of active features (value > 0) per token; 0-dim, no grad."""
        return (self.values.detach() > 0).sum() / max(self.n_tokens, 1)

    def fired(self) -> Tensor:
        """(F) bool: active on at least one token."""
        # One more place, for what is not active: a list of the others would have an unknown length, and the host wait.
        fired_F = torch.zeros(self.n_features + 1, dtype=torch.bool, device=self.offsets.device)
        ids_N = torch.where(self.values.detach() > 0, self.feature_ids, self.n_features)
        # Not by indexing, which sorts the indices on CUDA where algorithms are to be deterministic.
        return fired_F.index_fill_(0, ids_N, True)[:-1]

    def counts(self) -> Tensor:
        """(F) int64: number of tokens on which each feature is active."""
        return torch.bincount(self.feature_ids[self.values.detach() > 0], minlength=self.n_features)

    def to_dense(self) -> Tensor:
        """(B, F) values; for tests and small inspections."""
        dense_BF = self.values.new_zeros(self.n_tokens, self.n_features)
        return dense_BF.index_put((self.tokens, self.feature_ids), self.values)


@dataclass(slots=True)
class SparseFeatures:
    """Codes of every source layer, from layer 0 on."""

    layers: list[LayerCodes]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerCodes:
        return self.layers[layer]

    def l0_L(self) -> Tensor:  # noqa: N802
        """(L) mean active features per token of each layer."""
        return torch.stack([codes.l0() for codes in self.layers])

    def fired(self) -> list[Tensor]:
        """Per layer (F) bool: active on at least one token."""
        return [codes.fired() for codes in self.layers]

    def detach(self) -> "SparseFeatures":
        """The same codes without autograd."""
        return SparseFeatures([codes.detach() for codes in self.layers])

    def to_dense(self, layer: int) -> Tensor:
        """(B, F) values of one layer; for tests and small inspections."""
        return self.layers[layer].to_dense()
