"""A published folder as a CrossLayerTranscoder: circuit-tracer's layout, whoever wrote it."""

from pathlib import Path

import torch
from torch import Tensor

from activation_store.device import resolve_device
from activation_store.errors import UserError
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.layer import SourceLayer
from trainer.model.spec import ModelSpec
from trainer.publish.fold import PublishedLayer
from trainer.publish.layout import CROSS_LAYER, LayoutConfig, count_layers, read_layer


def is_published(folder: Path) -> bool:
    """Whether `folder` has the weight files of a published transcoder."""
    return (folder / "W_enc_0.safetensors").is_file() or (folder / "layer_0.safetensors").is_file()


class PublishedTranscoder(CrossLayerTranscoder):
    """Infers by the thresholds of the files, bit for bit; exp of their logarithm is 1e-6 off."""

    def inference_threshold(self, layer: int) -> Tensor:
        """(F) threshold of the inference rule."""
        return self.threshold_LF[layer]


@torch.no_grad()
def load_published(folder: Path | str, *, device: str = "cpu") -> CrossLayerTranscoder:
    """The transcoder of a published folder, in eval mode and float32, acting on raw activations (its scaling is none).

    It is a jumprelu (or relu) transcoder, used by the inference rule. Raises UserError for a folder that
    is not one, is not whole, or whose tensors do not fit together.
    """
    folder = Path(folder)
    kind = LayoutConfig.read(folder).model_kind
    n_layers = count_layers(folder, kind)
    first = read_layer(folder, kind, 0)
    n_features, d_model = first.W_enc_FD.shape
    spec = ModelSpec(
        n_layers=n_layers,
        d_model=d_model,
        n_features=n_features,
        span="cross_layer" if kind == CROSS_LAYER else "per_layer",
        skip=first.W_skip_DD is not None,
        kind="relu" if first.threshold_F is None else "jumprelu",
        decoder_init="zeros",
    )
    model = PublishedTranscoder(spec)
    for s, source in enumerate(model.source_layers):
        layer = read_layer(folder, kind, s)
        _fill(source, layer, f"{folder}: layer {s}")
        model.threshold_LF[s] = 0.0 if layer.threshold_F is None else layer.threshold_F
    model.requires_grad_(False)
    return model.eval().to(resolve_device(device))


def _fill(source: SourceLayer, layer: PublishedLayer, where: str) -> None:
    threshold_F = layer.threshold_F
    if threshold_F is not None and not bool((threshold_F >= 0).all()):
        raise UserError(
            f"{where} has a threshold below 0 (or NaN); thresholds are linear and at least 0 in this layout"
        )
    tensors: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "W_enc": (source.W_enc, layer.W_enc_FD),
        "b_enc": (source.b_enc, layer.b_enc_F),
        "W_dec": (source.W_dec, layer.W_dec_FSD),
        "b_dec": (source.b_dec, layer.b_dec_D),
        "threshold": (source.log_threshold, None if threshold_F is None else threshold_F.float().log()),
        "W_skip": (source.W_skip, layer.W_skip_DD),
    }
    for name, (target, value) in tensors.items():
        if (target is None) != (value is None):
            raise UserError(f"{where} {'lacks' if value is None else 'has'} {name}, unlike layer 0; all layers or none")
        if target is None or value is None:
            continue
        if target.shape != value.shape:
            raise UserError(f"{where}: {name} is {tuple(value.shape)}, wanted {tuple(target.shape)} as layer 0 implies")
        target.copy_(value)
