"""Encode, select and decode for training, one source layer at a time, sparse or dense as the data ask for.

Legend: B tokens, L layers, T target layers, D d_model, F features of a layer.
"""

from dataclasses import dataclass

from torch import Tensor

from trainer.model.clt import CrossLayerTranscoder
from trainer.model.features import LayerCodes
from trainer.model.functions import tanh_penalty
from trainer.model.runtime import Runtime


@dataclass(slots=True)
class TrainingPass:
    """What a training forward leaves behind.

    y_hat_BTD scaled; codes: per layer, detached, None where the dense path of relu and jumprelu ran; active_counts: per
    layer 0-dim, with theta's gradient for jumprelu; tanh_sums: per layer 0-dim sum over tokens and features (zero
    without a penalty); fired: per layer (F) bool.
    """

    y_hat_BTD: Tensor
    codes: list[LayerCodes | None]
    active_counts: list[Tensor]
    tanh_sums: list[Tensor]
    fired: list[Tensor]


def training_pass(
    model: CrossLayerTranscoder,
    x_BLD: Tensor,
    runtime: Runtime,
    *,
    k: int,
    per_token: bool,
    max_density: float,
    norms: list[Tensor | None],
    c: float,
) -> TrainingPass:
    """Scaled inputs -> reconstruction, differentiable.

    Args:
        runtime: from `model.running()`.
        k, per_token: as in `model.select`.
        max_density: layers with a larger share of selected entries (active, or in the band) take a dense path.
        norms: per layer decoder norms (F) for the tanh penalty, or None without it; c: its steepness.
    """
    selections = model.select(x_BLD, runtime, k=k, max_density=max_density, per_token=per_token)
    y_BTD = model.empty_output(x_BLD.shape[0])
    result = TrainingPass(y_BTD, [], [], [], [])
    for s, (layer, selection) in enumerate(zip(model.source_layers, selections, strict=True)):
        x_BD, norm_F = x_BLD[:, s], norms[s]
        codes = None
        if selection is None:
            y_BTD, count, tanh_sum, fired_F = layer.dense_into(y_BTD, x_BD, norm_F, c, runtime)
        elif model.spec.is_topk and selection.values.numel() > max_density * x_BD.shape[0] * model.spec.n_features:
            codes = LayerCodes(*selection, model.spec.n_features)
            y_BTD = layer.dense_codes_into(y_BTD, codes, x_BD, runtime)
            count, tanh_sum = y_BTD.new_tensor(float(selection.values.numel())), y_BTD.new_zeros(())
            fired_F = codes.fired()
        else:
            codes, count = layer.attach(selection, x_BD, runtime)
            tanh_sum = y_BTD.new_zeros(())
            if norm_F is not None:
                tanh_sum = tanh_penalty(codes.values, norm_F, c, codes, runtime.kernels)
            y_BTD = layer.decode_into(y_BTD, model.collectives.gather_codes(codes), x_BD, runtime)
            fired_F = codes.fired()
        result.codes.append(codes.detach() if codes is not None else None)
        result.active_counts.append(count)
        result.tanh_sums.append(tanh_sum)
        result.fired.append(fired_F)
    result.y_hat_BTD = model.collectives.combine_output(y_BTD)
    return result
