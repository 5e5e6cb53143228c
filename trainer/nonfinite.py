"""Stops at the first loss or gradient that is not finite, before it reaches a parameter, and says where it began."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from activation_store.batch import ActivationBatch
from activation_store.errors import AgreedError
from trainer.model.clt import CrossLayerTranscoder
from trainer.parallel.agreement import Agreement
from trainer.parallel.engine import BatchLoss, Engine


def check_finite(
    loss: BatchLoss,
    engine: Engine,
    model: CrossLayerTranscoder,
    microbatches: Sequence[ActivationBatch],
    agreement: Agreement,
    *,
    step: int,
    resume: Callable[[], str],
) -> float:
    """The gradients' norm, if it and the loss are finite.

    Both are the same on all ranks. Raises AgreedError naming the step, the first layer at fault on any rank, and what
    `resume` says (from where and how). One transfer from the device decides.
    """
    norm = engine.gradient_norm()
    loss_value, norm_value = torch.stack([loss.total.double(), norm.to(loss.total.device)]).tolist()
    if math.isfinite(loss_value) and math.isfinite(norm_value):
        return float(norm_value)
    what = f"the loss is {loss_value}" if not math.isfinite(loss_value) else f"the gradients' norm is {norm_value}"
    # Engines that shard parameters have them whole in there.
    with engine.master_weights():
        found = _first_layer(loss, model, microbatches)
    _, where = min(agreement.gather(found))
    raise AgreedError(
        f"{what} at step {step}, first in {where}; nothing of this step was saved: "
        f"{resume()}, or start over with a lower optim.lr (train.fresh=true)"
    )


@torch.no_grad()
def _first_layer(
    loss: BatchLoss, model: CrossLayerTranscoder, microbatches: Sequence[ActivationBatch]
) -> tuple[tuple[float, int], str]:
    """Where the first number that is not finite is found on this rank, and its place in the order of looking: rows,
    pre-activations, reconstruction of a layer, then of the next; gradients of all.
    """
    device = model.threshold_LF.device
    for layer in range(model.spec.n_layers):
        inputs = [batch.mlp_in[:, layer].to(device) for batch in microbatches]
        if not all(_finite(rows) for rows in (*inputs, *(batch.mlp_out[:, layer] for batch in microbatches))):
            return (layer, 0), f"layer {layer} (the store's activations)"
        if not all(_finite(model.pre_activations(layer, mlp_in_BD)) for mlp_in_BD in inputs):
            return (layer, 1), f"layer {layer} (its pre-activations)"
        if not _finite(loss.mse_L[layer]):
            return (layer, 2), f"layer {layer} (its reconstruction)"
    n_layers = model.spec.n_layers
    for layer, source in enumerate(model.source_layers):
        for name, parameter in source.named_parameters():
            if parameter.grad is not None and not _finite(parameter.grad):
                return (n_layers + layer, 0), f"layer {layer} (the gradient of {name})"
    return (math.inf, 0), "no single layer (a penalty, or a norm too large for float32)"


def _finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())
