"""Folding: scaled weights that act on scaled activations -> plain weights that act on raw ones.

The trainer's model scales inputs and targets (x' = (x - shift) * scale), published weights cannot. With s_x, c_x the
shift and scale of a source layer's input and s_y, c_y those of a target layer's output:

    pre  = W_enc ((x - s_x) * c_x) + b_enc       = (W_enc * c_x) x + (b_enc - (W_enc * c_x) s_x)
    y    = (a W_dec + b_dec + W_skip x') / c_y + s_y
         = a (W_dec / c_y) + (W_skip * c_x / c_y) x + (b_dec / c_y + s_y - (W_skip * c_x / c_y) s_x)

Activations and thresholds keep their units. Matrices are rounded to the published dtype. Biases are computed in float64
from the rounded matrices and kept in float32: the part of the rounding error that is the same for every token (raw
residual streams have large means) then cancels.

Legend: F features, S target layers of the source, D d_model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# The dtypes that matrices can be published in. Biases and thresholds are always float32.
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Scaling:
    """x' = (x - shift) * scale, per dimension; shift and scale of shape (D)."""

    shift_D: Tensor
    scale_D: Tensor


@dataclass(frozen=True)
class PublishedLayer:
    """One source layer as it is published: it acts on raw activations.

    a = pre * (pre > threshold), pre = W_enc x + b_enc (threshold None: ReLU);
    y_t = sum over sources s <= t of a_s W_dec_s[:, t - s] + b_dec_t (+ W_skip_t x_t, for per-layer transcoders alone).
    """

    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FSD: Tensor
    b_dec_D: Tensor
    threshold_F: Tensor | None = None
    W_skip_DD: Tensor | None = None

    def to(self, device: torch.device) -> "PublishedLayer":
        """The same layer on another device."""
        return PublishedLayer(
            self.W_enc_FD.to(device),
            self.b_enc_F.to(device),
            self.W_dec_FSD.to(device),
            self.b_dec_D.to(device),
            None if self.threshold_F is None else self.threshold_F.to(device),
            None if self.W_skip_DD is None else self.W_skip_DD.to(device),
        )


def fold_encoder(W_enc_FD: Tensor, b_enc_F: Tensor, inputs: Scaling, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The encoder that reads raw activations: W_enc * c_x in `dtype`, and b_enc - (W_enc * c_x) s_x in float32."""
    W_FD = (W_enc_FD * inputs.scale_D).to(dtype)
    b_F = b_enc_F.double() - W_FD.double() @ inputs.shift_D.double()
    return W_FD, b_F.float()


def fold_decoder(W_dec_FSD: Tensor, target_scale_SD: Tensor, dtype: torch.dtype) -> Tensor:
    """The decoder that writes raw MLP outputs: W_dec[:, j] / c_y of the j-th target layer."""
    return (W_dec_FSD / target_scale_SD).to(dtype)


def fold_skip(W_skip_DD: Tensor, inputs: Scaling, targets: Scaling, dtype: torch.dtype) -> Tensor:
    """The skip matrix (rows: output dims) that maps raw inputs to raw outputs: diag(1 / c_y) W_skip diag(c_x)."""
    return (W_skip_DD.double() * inputs.scale_D.double() / targets.scale_D.double()[:, None]).to(dtype)


def fold_output_bias(b_dec_D: Tensor, targets: Scaling, W_skip_DD: Tensor | None, inputs: Scaling) -> Tensor:
    """b_dec / c_y + s_y, less what the folded skip matrix makes of the input's shift (float32)."""
    b_D = b_dec_D.double() / targets.scale_D.double() + targets.shift_D.double()
    if W_skip_DD is not None:
        b_D = b_D - W_skip_DD.double() @ inputs.shift_D.double()
    return b_D.float()
