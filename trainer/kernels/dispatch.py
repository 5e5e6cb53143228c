"""Which implementation of the sparse ops runs.

A backend is a set of the ops below with the same signatures; `reference` (plain torch, any device) is the truth in
tests.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.kernels import (
    batch_threshold,
    build_csc,
    encode_jumprelu,
    encode_topk,
    fused_adam_rows,
    sparse_backward,
    sparse_decode,
)


class EncodeTopk(Protocol):
    """Signature of `trainer.kernels.encode_topk.encode_topk`."""

    def __call__(
        self,
        x_BD: Tensor,
        weight_FD: Tensor,
        bias_F: Tensor,
        k: int,
        norm_F: Tensor | None,
        compute_dtype: torch.dtype,
    ) -> encode_topk.Selection: ...


class EncodeJumprelu(Protocol):
    """Signature of `trainer.kernels.encode_jumprelu.encode_jumprelu`."""

    def __call__(
        self,
        x_BD: Tensor,
        weight_FD: Tensor,
        bias_F: Tensor,
        theta_F: Tensor | float,
        bandwidth: float,
        compute_dtype: torch.dtype,
        max_density: float = 1.0,
    ) -> encode_topk.Selection | None: ...


class EncodeCandidates(Protocol):
    """Signature of `trainer.kernels.batch_threshold.encode_candidates`."""

    def __call__(
        self,
        x_BD: Tensor,
        weight_FD: Tensor,
        bias_F: Tensor,
        n: int,
        floor: float,
        norm_F: Tensor | None,
        compute_dtype: torch.dtype,
    ) -> batch_threshold.Candidates: ...


class BatchThreshold(Protocol):
    """Signature of `trainer.kernels.batch_threshold.batch_threshold`."""

    def __call__(self, layers: list[batch_threshold.Candidates], n: int, n_features: int) -> list[Tensor]: ...


class BuildCsc(Protocol):
    """Signature of `trainer.kernels.build_csc.build_csc`."""

    def __call__(self, feature_ids_N: Tensor, tokens_N: Tensor, n_features: int) -> build_csc.FeatureIndex: ...


class SparseDecode(Protocol):
    """Signature of `trainer.kernels.sparse_decode.sparse_decode`."""

    def __call__(
        self,
        y_BC: Tensor,
        offsets: Tensor,
        feature_ids_N: Tensor,
        values_N: Tensor,
        rows_FC: Tensor,
        compute_dtype: torch.dtype,
    ) -> None: ...


class DecoderBackward(Protocol):
    """Signature of `trainer.kernels.sparse_backward.decoder_backward`."""

    def __call__(
        self,
        grad_BC: Tensor,
        rows_FC: Tensor,
        offsets: Tensor,
        feature_ids_N: Tensor,
        tokens_N: Tensor,
        index: build_csc.FeatureIndex,
        values_N: Tensor,
        compute_dtype: torch.dtype,
        *,
        out_FC: Tensor | None,
        accumulate: bool,
        dots: bool,
    ) -> Tensor | None: ...


class RowGradients(Protocol):
    """Signature of `trainer.kernels.sparse_backward.row_gradients`."""

    def __call__(
        self,
        index: build_csc.FeatureIndex,
        weights_N: Tensor,
        tokens_BC: Tensor,
        compute_dtype: torch.dtype,
        *,
        out_FC: Tensor | None = None,
        accumulate: bool = False,
    ) -> Tensor: ...


class FeatureSums(Protocol):
    """Signature of `trainer.kernels.sparse_backward.feature_sums`."""

    def __call__(self, index: build_csc.FeatureIndex, weights_N: Tensor) -> Tensor: ...


class FusedAdamRows(Protocol):
    """Signature of `trainer.kernels.fused_adam_rows.fused_adam_rows`."""

    def __call__(
        self,
        rows_FC: Tensor,
        exp_avg_FC: Tensor,
        exp_avg_sq_FC: Tensor,
        index: build_csc.FeatureIndex,
        weights_N: Tensor,
        tokens_BC: Tensor,
        hyper: fused_adam_rows.AdamHyper,
        *,
        dots: bool,
    ) -> tuple[Tensor, Tensor | None]: ...


class FusedAdamVector(Protocol):
    """Signature of `trainer.kernels.fused_adam_rows.fused_adam_vector`."""

    def __call__(
        self,
        parameter_F: Tensor,
        exp_avg_F: Tensor,
        exp_avg_sq_F: Tensor,
        gradient_F: Tensor,
        hyper: fused_adam_rows.AdamHyper,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """One backend: its name and its ops."""

    name: str
    encode_topk: EncodeTopk
    encode_jumprelu: EncodeJumprelu
    encode_candidates: EncodeCandidates
    batch_threshold: BatchThreshold
    build_csc: BuildCsc
    sparse_decode: SparseDecode
    decoder_backward: DecoderBackward
    row_gradients: RowGradients
    feature_sums: FeatureSums
    fused_adam_rows: FusedAdamRows
    fused_adam_vector: FusedAdamVector


REFERENCE = Kernels(
    name="reference",
    encode_topk=encode_topk.encode_topk,
    encode_jumprelu=encode_jumprelu.encode_jumprelu,
    encode_candidates=batch_threshold.encode_candidates,
    batch_threshold=batch_threshold.batch_threshold,
    build_csc=build_csc.build_csc,
    sparse_decode=sparse_decode.sparse_decode,
    decoder_backward=sparse_backward.decoder_backward,
    row_gradients=sparse_backward.row_gradients,
    feature_sums=sparse_backward.feature_sums,
    fused_adam_rows=fused_adam_rows.fused_adam_rows,
    fused_adam_vector=fused_adam_rows.fused_adam_vector,
)


def kernels(backend: str = "auto") -> Kernels:
    """The backend of that name; `auto` takes the fastest that this machine can run.

    Raises:
        ValueError: unknown backend.
    """
    if str(backend) in {"auto", "reference"}:
        return REFERENCE
    raise ValueError(f"kernels.backend={backend} is unknown; use auto or reference")
