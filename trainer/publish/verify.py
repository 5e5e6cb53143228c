"""Comparison of a published folder with the trainer's own inference, by the published equations written out anew.

Rounding moves pre-activations a little, so entries that lie within rounding of their threshold may be selected by one
side and not by the other. Values and selections are therefore compared apart: reconstructions with the trainer's
selection on both sides, and the selections entry by entry, each difference within a rounding bound of the threshold.

Legend: B rows, L layers, F features, S target layers of a source, D d_model.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from activation_store.errors import UserError
from trainer.model.clt import CrossLayerTranscoder
from trainer.publish.fold import PublishedLayer
from trainer.publish.layout import LayoutConfig, count_layers, read_layer

# Largest error of a row's reconstruction of a layer that passes, relative to the norm of the trainer's (or to the
# layer's root mean square norm, whichever is larger), by the dtype of the published matrices. About ten times what a
# cross-layer transcoder of SmolLM2 shows (5e-7, 3e-4, 2.4e-3).
TOLERANCES: dict[torch.dtype, float] = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}
# A selection may differ where |pre - threshold| <= this many rounding steps of sum_d |W_enc,d x_d| + |b_enc|.
ROUNDING_STEPS = 16


@dataclass(frozen=True)
class Comparison:
    """How the published weights differ from the trainer's inference on `rows` rows of `source`.

    `max_relative_error` is with the trainer's selection on both sides, which has `active` entries. `flipped` entries
    are selected by one side alone, all within rounding of their threshold but `unexplained`. `flip_error` is the
    largest relative error with each side's own selection.
    """

    rows: int
    source: str
    tolerance: float
    max_relative_error: float
    flip_error: float
    active: int
    flipped: int
    unexplained: int

    @property
    def passed(self) -> bool:
        """Whether the published weights are the trainer's, up to rounding."""
        return self.max_relative_error <= self.tolerance and self.unexplained == 0

    def summary(self) -> str:
        """One line for the terminal and the model card."""
        text = f"largest relative error {self.max_relative_error:.1e} (tolerance {self.tolerance:.0e})"
        if self.flipped == 0:
            return f"{text}; the same {self.active:,} active features"
        return (
            f"{text}; {self.flipped:,} of {self.active:,} active features flipped within rounding of their threshold"
            f" (largest relative error with them {self.flip_error:.1e})"
        )


@torch.no_grad()
def compare(
    folder: Path,
    model: CrossLayerTranscoder,
    mlp_in_BLD: Tensor,
    *,
    source: str,
    advance: Callable[[], None] = lambda: None,
    layer: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> Comparison:
    """Reads `folder` back and compares it with `model` on raw activations `mlp_in_BLD` (float32, non-empty).

    One published layer is in memory at a time, and `layer(s)` open, where the model is read by layers; `advance` is
    called after each.
    """
    kind = LayoutConfig.read(folder).model_kind
    n_layers = count_layers(folder, kind)
    device = model.threshold_LF.device
    mlp_in_BLD = mlp_in_BLD.to(device)
    scaled_BLD = torch.zeros_like(mlp_in_BLD)
    same_BLD, flips_BLD = torch.zeros_like(scaled_BLD), torch.zeros_like(scaled_BLD)
    active = flipped = unexplained = 0
    dtype = torch.float32
    for s in range(n_layers):
        x_BD = mlp_in_BLD[:, s]
        with layer(s):
            codes = model.encode_layer(s, x_BD)
            scaled_BLD = model.decode_into(scaled_BLD, s, codes, x_BD)
        own_selected_BF = codes.to_dense() > 0
        active += int((codes.values > 0).sum())
        published = read_layer(folder, kind, s).to(device)
        dtype = published.W_enc_FD.dtype
        pre_BF = x_BD @ published.W_enc_FD.float().T + published.b_enc_F
        selected_BF = pre_BF > (0 if published.threshold_F is None else published.threshold_F)
        flip_BF = selected_BF != own_selected_BF
        flipped += int(flip_BF.sum())
        unexplained += int((flip_BF & ~_within_rounding(published, x_BD, pre_BF)).sum())
        _decode_into(same_BLD, s, published, x_BD, pre_BF * own_selected_BF)
        if flip_BF.any():
            _decode_into(flips_BLD, s, published, None, pre_BF * (selected_BF.float() - own_selected_BF.float()))
        advance()
    own_BLD = model.unscale_targets(scaled_BLD)
    return Comparison(
        rows=len(mlp_in_BLD),
        source=source,
        tolerance=TOLERANCES[dtype],
        max_relative_error=_relative_error(same_BLD, own_BLD),
        flip_error=_relative_error(same_BLD + flips_BLD, own_BLD),
        active=active,
        flipped=flipped,
        unexplained=unexplained,
    )


def require_passed(comparison: Comparison, output: Path) -> None:
    """Raises UserError when the published weights are not those of the trainer."""
    if not comparison.passed:
        raise UserError(
            f"{output}: not published, for what was written does not reconstruct as the run does: "
            f"{comparison.summary()}, {comparison.unexplained:,} selections differ by more than rounding; "
            "publish with publish.dtype=float32, and report this if it persists"
        )


def _within_rounding(layer: PublishedLayer, x_BD: Tensor, pre_BF: Tensor) -> Tensor:
    """Mask (B, F): |pre - threshold| within ROUNDING_STEPS rounding steps of the sum that makes pre."""
    threshold_F = torch.zeros_like(layer.b_enc_F) if layer.threshold_F is None else layer.threshold_F
    magnitude_BF = x_BD.abs() @ layer.W_enc_FD.float().abs().T + layer.b_enc_F.abs() + threshold_F
    step = torch.finfo(layer.W_enc_FD.dtype).eps
    return (pre_BF - threshold_F).abs() <= ROUNDING_STEPS * step * magnitude_BF


def _decode_into(y_BLD: Tensor, source: int, layer: PublishedLayer, x_BD: Tensor | None, a_BF: Tensor) -> None:
    """Adds a W_dec to every target layer of `source`; with x also the biases and the skip of layer `source`."""
    used_U = a_BF.any(0).nonzero().squeeze(1)
    W_USD = layer.W_dec_FSD[used_U].float()
    y_BSD = (a_BF[:, used_U] @ W_USD.flatten(1)).view(-1, *layer.W_dec_FSD.shape[1:])
    y_BLD[:, source : source + y_BSD.shape[1]] += y_BSD
    if x_BD is not None:
        y_BLD[:, source] += layer.b_dec_D
        if layer.W_skip_DD is not None:
            y_BLD[:, source] += x_BD @ layer.W_skip_DD.float().T


def _relative_error(y_BLD: Tensor, own_BLD: Tensor) -> float:
    norm_BL = own_BLD.norm(dim=2)
    scale_BL = torch.maximum(norm_BL, norm_BL.square().mean(0).sqrt())
    error_BL = (y_BLD - own_BLD).norm(dim=2)
    # A layer that reconstructs nothing at all has norm 0: any error there is an error.
    relative_BL = torch.where(error_BL == 0, torch.zeros_like(error_BL), error_BL / scale_BL)
    return float(relative_BL.max())
