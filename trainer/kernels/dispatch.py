"""Which implementation of the sparse ops runs.

A backend is a set of the ops below with the same signatures; `reference` (plain torch, any device) is the truth in
tests. The rule of `auto`: triton on CUDA, cpu (numba) on a CPU in float32, each if it imports; else reference.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeVar

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
from trainer.kernels.encode_topk import Selection

Result_co = TypeVar("Result_co", covariant=True)


class EncodeTopk(Protocol[Result_co]):
    """Signature of `trainer.kernels.encode_topk.encode_topk`, and of its first part where it has two."""

    def __call__(
        self,
        x_BD: Tensor,
        weight_FD: Tensor,
        bias_F: Tensor,
        k: int,
        norm_F: Tensor | None,
        compute_dtype: torch.dtype,
    ) -> Result_co: ...


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
    ) -> Selection | None: ...


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


class DenseAdam(Protocol):
    """Signature of `trainer.kernels.gpu.dense_adam.dense_adam`."""

    def __call__(
        self,
        parameter: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        gradient: Tensor,
        hyper: fused_adam_rows.AdamHyper,
        divisor: float,
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """One backend: its name and its ops. begin_topk: encode_topk in two parts, where a device works while the host
    prepares more; None where calling encode_topk is as good.
    """

    name: str
    encode_topk: EncodeTopk[Selection]
    encode_jumprelu: EncodeJumprelu
    encode_candidates: EncodeCandidates
    batch_threshold: BatchThreshold
    build_csc: BuildCsc
    sparse_decode: SparseDecode
    decoder_backward: DecoderBackward
    row_gradients: RowGradients
    feature_sums: FeatureSums
    fused_adam_rows: FusedAdamRows
    begin_topk: EncodeTopk[Callable[[], Selection]] | None = None


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
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that a rule or a user chose, and why, in a few words."""

    kernels: Kernels
    reason: str


def _cpu() -> Kernels:
    from trainer.kernels.cpu.backend import CPU

    return CPU


def _triton() -> Kernels:
    from trainer.kernels.gpu.backend import TRITON

    return TRITON


# Imported only when chosen. The package is what a user installs when the import fails.
_COMPILED: dict[str, Callable[[], Kernels]] = {"cpu": _cpu, "triton": _triton}
_PACKAGES = {"cpu": "numba", "triton": "triton"}
_DEVICES = {"cpu": "cpu", "triton": "cuda"}
BACKENDS = ("auto", "reference", *_COMPILED)


def kernels(backend: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Kernels:
    """The backend of that name for tensors of `dtype` on `device`; `auto` takes the fastest that runs there.

    Raises:
        ValueError: unknown backend, or one that does not run there; says what does.
    """
    return choose(backend, device, dtype).kernels


def choose(backend: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Choice:
    """As `kernels`, with the reason."""
    return _choose(str(backend), torch.device(device).type, dtype)


def dense_adam(backend: Kernels) -> DenseAdam | None:
    """The backend's own update of a whole table from its gradient; None: torch's is as fast there."""
    if backend.name != "triton":
        return None
    from trainer.kernels.gpu.dense_adam import dense_adam as update

    return update


def words_of(choice: Choice, operands: torch.dtype) -> str:
    """For the log: which backend computes with products' operands of that dtype, and why.

    What the compiled kernels of a CPU do not take they hand to the reference, op by op: with bfloat16 every product and
    gather. The feature index, sums of float32 and the cut of a batch stay theirs.
    """
    if choice.kernels.name != "cpu" or operands == torch.float32:
        return f"{choice.kernels.name} ({choice.reason})"
    why = "auto: " if choice.reason.startswith("auto") else ""
    return f"reference ({why}the compiled kernels of a CPU take float32, not {_name(operands)}; index and sums: cpu)"


def check_name(backend: str) -> None:
    """Raises ValueError for an unknown backend."""
    if backend not in BACKENDS:
        raise ValueError(f"kernels.backend={backend} is unknown; use one of {', '.join(BACKENDS)}")


@cache
def _choose(backend: str, device: str, dtype: torch.dtype) -> Choice:
    check_name(backend)
    if backend == "auto":
        return _fastest(device, dtype)
    if backend == "reference":
        return Choice(REFERENCE, "as asked for")
    if _DEVICES[backend] != device and not (backend == "triton" and _interpreted()):
        raise ValueError(
            f"kernels.backend={backend} runs on device={_DEVICES[backend]}, not on {device}; use kernels.backend=auto, "
            f"or device={_DEVICES[backend]}"
        )
    try:
        return Choice(_COMPILED[backend](), "as asked for")
    except ImportError as error:
        raise ValueError(
            f"kernels.backend={backend} needs {_PACKAGES[backend]}, which does not import ({_one_line(error)}); "
            f"pip install {_PACKAGES[backend]}, or use kernels.backend=reference"
        ) from error


def _fastest(device: str, dtype: torch.dtype) -> Choice:
    backend = next((name for name, its_device in _DEVICES.items() if its_device == device), None)
    if backend is None:
        return Choice(REFERENCE, f"auto: no compiled kernels for device {device}")
    if backend == "cpu" and dtype != torch.float32:
        return Choice(REFERENCE, f"auto: the compiled kernels of a CPU take float32, not {_name(dtype)}")
    try:
        return Choice(_COMPILED[backend](), f"auto: {_name(dtype)} on {'CUDA' if device == 'cuda' else 'a CPU'}")
    except ImportError as error:
        return Choice(REFERENCE, f"auto: {_PACKAGES[backend]} does not import ({_one_line(error)})")


def _interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
