"""A trained model's layers, folded one at a time (trainer.publish.fold has the equations)."""

import torch
from torch import Tensor

from activation_store.errors import UserError
from trainer.model.clt import CrossLayerTranscoder
from trainer.publish.fold import (
    PublishedLayer,
    Scaling,
    fold_decoder,
    fold_encoder,
    fold_output_bias,
    fold_skip,
)


def fold_layer(model: CrossLayerTranscoder, s: int, dtype: torch.dtype) -> PublishedLayer:
    """Source layer `s` of a trained model, scaling folded in and following the inference rule; on the CPU.

    Raises UserError for topk and batchtopk whose threshold is not calibrated (training did not end), and when
    a weight does not fit `dtype` (float16 ends at 65,504) or is not finite in the first place.
    """
    if model.spec.is_topk and bool(model.threshold_LF[s].isnan().any()):
        raise UserError(
            f"the thresholds of the inference rule of {model.spec.kind} are not calibrated in this checkpoint: "
            "training has not ended; let `layerloom train` finish the run"
        )
    source, targets = model.source_layers[s], model.spec.targets(s)
    inputs = Scaling(model.input_shift_LD[s], model.input_scale_LD[s])
    outputs = Scaling(model.target_shift_LD[s], model.target_scale_LD[s])
    W_enc_FD, b_enc_F = fold_encoder(source.W_enc.detach(), source.b_enc.detach(), inputs, dtype)
    scale_SD = model.target_scale_LD[targets.start : targets.stop]
    W_skip = None if source.W_skip is None else fold_skip(source.W_skip.detach(), inputs, outputs, dtype)
    layer = PublishedLayer(
        W_enc_FD,
        b_enc_F,
        fold_decoder(source.W_dec.detach(), scale_SD, dtype),
        fold_output_bias(source.b_dec.detach(), outputs, W_skip, inputs),
        None if model.spec.kind == "relu" else model.inference_threshold(s).float(),
        W_skip,
    ).to(torch.device("cpu"))
    _check_finite(layer, s, dtype)
    return layer


def _check_finite(layer: PublishedLayer, s: int, dtype: torch.dtype) -> None:
    for name in ("W_enc_FD", "b_enc_F", "W_dec_FSD", "b_dec_D", "W_skip_DD"):
        tensor: Tensor | None = getattr(layer, name)
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise UserError(
                f"{name.rpartition('_')[0]} of layer {s} is not finite in {str(dtype).removeprefix('torch.')}; "
                "use publish.dtype=float32 or bfloat16, or an earlier checkpoint if the run diverged"
            )
    if layer.threshold_F is not None and not bool((layer.threshold_F >= 0).all()):
        raise UserError(f"layer {s} has a threshold below 0, which circuit-tracer would apply without a ReLU; train on")
