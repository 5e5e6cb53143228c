"""Evaluation during training: the store's held-out rows, by the inference rule and by the training rule.

The definitions are those of `layerloom evaluate` (`trainer.evaluation.reconstruction`); the rows are the store's.

Legend: B rows of a batch, L layers, D d_model; x is mlp_in, y is mlp_out, both raw.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trainer.dealing import Dealing
from trainer.evaluation.reconstruction import RuleSums, TargetSums, sums_of
from trainer.model.clt import CrossLayerTranscoder


@torch.no_grad()
def evaluate_rows(
    model: CrossLayerTranscoder,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    mean_out_LD: Tensor,
    dealing: Dealing | None = None,
) -> dict[str, Any]:
    """FVU (raw units, centred per layer and dimension on these rows) and L0 of batches (x, y).

    Keys `rows, fvu, fvu_per_layer, l0, l0_per_layer` by the inference rule and `training_rule: {fvu, l0}`, which is the
    same for relu and jumprelu. Top-k selects its final k, over each batch for batchtopk. `mean_out_LD` is a reference
    near the targets' mean, for precision only. `dealing`: of the batches over a mesh; the figures are those of all.
    """
    dealing = dealing if dealing is not None else Dealing()
    sums, spare = _Sums(model, mean_out_LD), _Sums(model, mean_out_LD)
    with dealing.alone(model):
        for (x_BLD, y_BLD), counts in dealing.deal(batches):
            (sums if counts else spare).add(model, x_BLD, model.local_columns(y_BLD))
    by_inference = _figures(model, sums.targets, sums.inference)
    by_training = _figures(model, sums.targets, sums.training) if model.spec.is_topk else by_inference
    return {
        "rows": by_inference["rows"],
        "fvu": by_inference["fvu"],
        "fvu_per_layer": by_inference["fvu_per_layer"],
        "l0": by_inference["l0"],
        "l0_per_layer": by_inference["l0_per_layer"],
        "training_rule": {"fvu": by_training["fvu"], "l0": by_training["l0"]},
    }


class _Sums:
    """Sums over this rank's batches, of its features and columns."""

    def __init__(self, model: CrossLayerTranscoder, mean_out_LD: Tensor) -> None:
        device, n_layers = mean_out_LD.device, model.spec.n_layers
        self.targets = TargetSums(1, model.local_columns(mean_out_LD))
        self.inference, self.training = (RuleSums(1, n_layers, model.n_features, device) for _ in range(2))

    def add(self, model: CrossLayerTranscoder, x_BLD: Tensor, y_BLD: Tensor) -> None:
        """One batch, under both rules."""
        document_B = torch.zeros(len(x_BLD), dtype=torch.int64, device=x_BLD.device)
        self.targets.add(document_B, y_BLD)
        self.inference.add_inference(model, document_B, x_BLD, y_BLD)
        if model.spec.is_topk:
            self.training.add_training(model, document_B, x_BLD, y_BLD)


def _figures(model: CrossLayerTranscoder, targets: TargetSums, rule: RuleSums) -> dict[str, Any]:
    """Rows, FVU and L0 from the sums of all ranks (`trainer.evaluation.reconstruction` has the formulas)."""
    over = model.collectives
    totals = {name: over.sum_data(sums.sum(0)) for name, sums in sums_of(targets, rule).items()}
    centred_L = totals["target_square"] - totals["target"].square().sum(-1) / totals["count"]
    fvu_L = over.sum_columns(totals["residual"]) / over.sum_columns(centred_L)
    l0_L = over.sum_features(totals["active"]) / totals["count"]
    return {
        "rows": int(totals["count"]),
        "fvu": fvu_L.mean().item(),
        "fvu_per_layer": fvu_L.tolist(),
        "l0": l0_L.sum().item(),
        "l0_per_layer": l0_L.tolist(),
    }
