"""Sums over held-out rows from which FVU, L0, silent features and the density histogram follow.

Shapes: K documents, R rows (tokens), L layers, D d_model, F features per layer.

    FVU_t = sum_r ||y_rt - y_hat_rt||^2 / sum_r ||y_rt - mean_r y_rt||^2        fvu = mean_t FVU_t
    L0_s  = sum_r #{i : a_rsi > 0} / R                                          l0  = sum_s L0_s

Everything is summed in float64 and kept per document, so that the jackknife needs no second pass. Targets are taken
relative to a reference (the training rows' mean), which leaves FVU as it is and avoids cancellation in

    sum_r ||y_r - mean||^2 = sum_r ||y_r||^2 - ||sum_r y_r||^2 / R.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from trainer.model.clt import CrossLayerTranscoder
from trainer.model.collectives import Collectives
from trainer.model.features import LayerCodes

_ROWS_AT_ONCE = 128


class TargetSums:
    """Count, sum and sum of squares of the targets y, per document."""

    def __init__(self, documents: int, reference_LD: Tensor) -> None:
        n_layers, d_model = reference_LD.shape
        self.reference_LD = reference_LD.double()
        self.count_K = self.reference_LD.new_zeros(documents)
        self.target_KLD = self.reference_LD.new_zeros(documents, n_layers, d_model)
        self.target_square_KL = self.reference_LD.new_zeros(documents, n_layers)

    def add(self, document_R: Tensor, y_RLD: Tensor) -> None:
        """Adds rows; `document_R` holds each row's document as a number below `documents`."""
        self.count_K.index_add_(0, document_R, torch.ones_like(document_R, dtype=torch.float64))
        for rows in slices(len(document_R), _ROWS_AT_ONCE):
            centred_RLD = y_RLD[rows].double() - self.reference_LD
            self.target_KLD.index_add_(0, document_R[rows], centred_RLD)
            self.target_square_KL.index_add_(0, document_R[rows], centred_RLD.square().sum(2))


class RuleSums:
    """Residual, active features and firings under one activation rule, per document."""

    def __init__(self, documents: int, n_layers: int, n_features: int, device: torch.device) -> None:
        self.residual_KL = torch.zeros(documents, n_layers, dtype=torch.float64, device=device)
        self.active_KL = torch.zeros(documents, n_layers, dtype=torch.float64, device=device)
        self.firings_LF = torch.zeros(n_layers, n_features, dtype=torch.int64, device=device)

    def add_residual(self, document_R: Tensor, y_RLD: Tensor, y_hat_RLD: Tensor) -> None:
        """Adds squared errors of the reconstruction, in raw units."""
        for rows in slices(len(document_R), _ROWS_AT_ONCE):
            squares_RL = (y_RLD[rows].double() - y_hat_RLD[rows].double()).square().sum(2)
            self.residual_KL.index_add_(0, document_R[rows], squares_RL)

    def add_active(self, document_R: Tensor, layer: int, codes: LayerCodes) -> None:
        """Adds one layer's codes of R rows; entries above 0 are active."""
        active_N = codes.values > 0
        per_row_R = torch.bincount(codes.tokens[active_N], minlength=len(document_R))
        self.active_KL[:, layer].index_add_(0, document_R, per_row_R.double())
        self.firings_LF[layer] += codes.counts()

    def add_inference(self, model: CrossLayerTranscoder, document_R: Tensor, x_RLD: Tensor, y_RLD: Tensor) -> None:
        """Adds rows (x, y) under the inference rule, one layer's codes at a time: they may be many. y: the columns that
        this device decodes.
        """
        y_hat_RLD = model.empty_output(len(x_RLD))
        for layer, x_RD in enumerate(x_RLD.unbind(1)):
            codes = model.encode_layer(layer, x_RD)
            self.add_active(document_R, layer, codes)
            y_hat_RLD = model.decode_into(y_hat_RLD, layer, codes, x_RD)
        y_hat_RLD = model.complete_raw(y_hat_RLD, x_RLD)
        self.add_residual(document_R, y_RLD, model.unscale_targets(y_hat_RLD))

    def add_training(self, model: CrossLayerTranscoder, document_R: Tensor, x_RLD: Tensor, y_RLD: Tensor) -> None:
        """As `add_inference`, under the training rule of topk and batchtopk, which selects over these rows."""
        features = model.encode(x_RLD, rule="training")
        for layer, codes in enumerate(features.layers):
            self.add_active(document_R, layer, codes)
        self.add_residual(document_R, y_RLD, model.unscale_targets(model.decode(features, x_RLD)))

    def sum_over(self, collectives: Collectives) -> None:
        """From sums over the features and columns of this device to those over all of the feature axis."""
        self.residual_KL = collectives.sum_columns(self.residual_KL)
        self.active_KL = collectives.sum_features(self.active_KL)
        self.firings_LF = collectives.gather_features(self.firings_LF)


def slices(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `length`."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def fvu_per_layer(totals: Mapping[str, Tensor]) -> Tensor:
    """FVU of each layer (L) from sums `count` (), `target` (L, D), `target_square` (L) and `residual` (L)."""
    centred_L = totals["target_square"] - totals["target"].square().sum(-1) / totals["count"]
    return totals["residual"] / centred_L


def fvu(totals: Mapping[str, Tensor]) -> Tensor:
    """The mean over layers of their FVU."""
    return fvu_per_layer(totals).mean()


def l0_per_layer(totals: Mapping[str, Tensor]) -> Tensor:
    """Mean active features per token of each layer (L) from sums `active` (L) and `count` ()."""
    return totals["active"] / totals["count"]


def l0(totals: Mapping[str, Tensor]) -> Tensor:
    """Mean active features per token, summed over layers."""
    return l0_per_layer(totals).sum()


def sums_of(targets: TargetSums, rule: RuleSums) -> dict[str, Tensor]:
    """What the formulas above read, with documents on the first axis."""
    return {
        "count": targets.count_K,
        "target": targets.target_KLD,
        "target_square": targets.target_square_KL,
        "residual": rule.residual_KL,
        "active": rule.active_KL,
    }


def density_histogram(firings: Tensor, tokens: int) -> dict[str, Sequence[float]]:
    """Histogram of log10(firings / tokens) over the features that fired at all, in quarters of a decade.

    Edges run from the decade that holds 1 / tokens up to 0; bins are [low, high), the last one closed. Silent features
    are in no bin (`silent_fraction` counts them).
    """
    decades = len(str(max(tokens - 1, 1)))
    edges = torch.arange(-4 * decades, 1, dtype=torch.float64) / 4
    log10_density = torch.log10(firings[firings > 0].double().cpu() / tokens).clamp(min=float(edges[0]), max=0.0)
    counts, _ = torch.histogram(log10_density, bins=edges)
    return {"log10_edges": edges.tolist(), "counts": [int(count) for count in counts.tolist()]}
