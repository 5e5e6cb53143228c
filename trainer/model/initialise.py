"""Initial parameters.

    W_enc ~ U(+-encoder_init_scale / sqrt(F));  W_dec ~ U(+-1 / sqrt(L D)), or zeros;  theta = threshold_init
    b_dec = mean of the scaled targets;  b_enc: 0, or such that a chosen share of (token, feature) pairs is active

Legend: B sampled tokens, D d_model, F features.
"""

import math

import torch
from torch import Tensor, nn

from trainer.model.collectives import Partitioning
from trainer.model.layer import SourceLayer
from trainer.model.spec import ModelSpec


@torch.no_grad()
def initialise_layer(
    layer: SourceLayer, spec: ModelSpec, generator: torch.Generator, partitioning: Partitioning | None = None
) -> None:
    """Draw the parameters of one source layer; layers drawn in order from one CPU generator are reproducible, and those
    of a device are a part of what a single device draws.
    """
    partitioning = partitioning if partitioning is not None else Partitioning()
    n_features, d_model = spec.n_features, spec.d_model
    encoder_bound = spec.encoder_init_scale / math.sqrt(spec.n_features)
    _draw(layer.W_enc, (n_features, d_model), encoder_bound, generator, partitioning)
    layer.b_enc.zero_()
    if spec.decoder_init == "uniform":
        decoder_bound = 1 / math.sqrt(spec.n_layers * spec.d_model)
        shape = (n_features, len(layer.targets), d_model)
        _draw(layer.W_dec, shape, decoder_bound, generator, partitioning)
    else:
        layer.W_dec.zero_()
    layer.b_dec.zero_()
    if layer.log_threshold is not None:
        layer.log_threshold.fill_(math.log(spec.threshold_init))
    if layer.W_skip is not None:
        layer.W_skip.zero_()


def _draw(
    parameter: nn.Parameter,
    whole: tuple[int, ...],
    bound: float,
    generator: torch.Generator,
    partitioning: Partitioning,
) -> None:
    """Uniform within the bound; where a part is held, the whole is drawn first. Nothing on the meta device."""
    if parameter.is_meta:
        return
    if partitioning.size == 1:
        parameter.uniform_(-bound, bound, generator=generator)
        return
    drawn = torch.empty(whole, dtype=parameter.dtype).uniform_(-bound, bound, generator=generator)
    parameter.copy_(partitioning.local(drawn, parameter.partition))  # type: ignore[attr-defined]


@torch.no_grad()
def set_density(layer: SourceLayer, x_BD: Tensor, density: float) -> None:
    """b_enc such that on the rows `x_BD` (scaled) each feature is active (pre > theta; theta = 0 but for jumprelu) on
    a share `density` of them.

    Raises:
        ValueError: density outside (0, 1).
    """
    if not 0 < density < 1:
        raise ValueError(f"initial_density={density} must lie between 0 and 1 (exclusive); null leaves b_enc at 0")
    n_active = max(1, round(density * x_BD.shape[0]))
    for block in torch.split(torch.arange(layer.b_enc.numel(), device=x_BD.device), 1024):
        sorted_fB = (layer.W_enc[block] @ x_BD.t()).sort(dim=1, descending=True).values
        upper_f = sorted_fB[:, n_active - 1]
        lower_f = sorted_fB[:, n_active] if n_active < x_BD.shape[0] else upper_f - 1
        layer.b_enc[block] = -(upper_f + lower_f) / 2
    if layer.log_threshold is not None:
        layer.b_enc.add_(layer.log_threshold.exp())
