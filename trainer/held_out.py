"""Evaluation during training: the store's held-out rows, by the inference rule and by the training rule.

The definitions are those of `layerloom evaluate` (`trainer.evaluation.reconstruction`); the rows are the store's.

Legend: B rows of a batch, L layers, D d_model; x is mlp_in, y is mlp_out, both raw.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trainer.evaluation.reconstruction import (
    RuleSums,
    TargetSums,
    fvu,
    fvu_per_layer,
    l0,
    l0_per_layer,
    sums_of,
)
from trainer.model.clt import CrossLayerTranscoder


@torch.no_grad()
def evaluate_rows(
    model: CrossLayerTranscoder, batches: Iterable[tuple[Tensor, Tensor]], *, mean_out_LD: Tensor
) -> dict[str, Any]:
    """FVU (raw units, centred per layer and dimension on these rows) and L0 of batches (x, y).

    Keys `rows, fvu, fvu_per_layer, l0, l0_per_layer` by the inference rule and `training_rule: {fvu, l0}`, which is the
    same for relu and jumprelu. Top-k selects its final k, over each batch for batchtopk. `mean_out_LD` is a reference
    near the targets' mean, for precision only.
    """
    spec = model.spec
    targets = TargetSums(1, mean_out_LD)
    device = mean_out_LD.device
    inference, training = (RuleSums(1, spec.n_layers, spec.n_features, device) for _ in range(2))
    for x_BLD, y_BLD in batches:
        targets.add(torch.zeros(len(x_BLD), dtype=torch.int64, device=device), y_BLD)
        _add_inference(inference, model, x_BLD, y_BLD)
        if spec.is_topk:
            _add_training(training, model, x_BLD, y_BLD)
    by_inference = _totals(targets, inference)
    by_training = _totals(targets, training) if spec.is_topk else by_inference
    return {
        "rows": int(targets.count_K.sum()),
        "fvu": fvu(by_inference).item(),
        "fvu_per_layer": fvu_per_layer(by_inference).tolist(),
        "l0": l0(by_inference).item(),
        "l0_per_layer": l0_per_layer(by_inference).tolist(),
        "training_rule": {"fvu": fvu(by_training).item(), "l0": l0(by_training).item()},
    }


def _add_inference(sums: RuleSums, model: CrossLayerTranscoder, x_BLD: Tensor, y_BLD: Tensor) -> None:
    """The inference rule, one layer's codes at a time: they may be many."""
    document_B = torch.zeros(len(x_BLD), dtype=torch.int64, device=x_BLD.device)
    y_hat_BLD = model.empty_output(len(x_BLD))
    for layer, x_BD in enumerate(x_BLD.unbind(1)):
        codes = model.encode_layer(layer, x_BD)
        sums.add_active(document_B, layer, codes)
        y_hat_BLD = model.decode_into(y_hat_BLD, layer, codes, x_BD)
    sums.add_residual(document_B, y_BLD, model.unscale_targets(y_hat_BLD))


def _add_training(sums: RuleSums, model: CrossLayerTranscoder, x_BLD: Tensor, y_BLD: Tensor) -> None:
    """The training rule of topk and batchtopk, over the batch."""
    document_B = torch.zeros(len(x_BLD), dtype=torch.int64, device=x_BLD.device)
    features = model.encode(x_BLD, rule="training")
    for layer, codes in enumerate(features.layers):
        sums.add_active(document_B, layer, codes)
    sums.add_residual(document_B, y_BLD, model.unscale_targets(model.decode(features, x_BLD)))


def _totals(targets: TargetSums, rule: RuleSums) -> dict[str, Tensor]:
    return {name: sums.sum(0) for name, sums in sums_of(targets, rule).items()}
