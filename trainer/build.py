"""From configs to a model: its specification, its scaling, its initial parameters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from activation_store.statistics import ScalingStatistics
from trainer.config import (
    ActivationConfig,
    ActivationKind,
    Master,
    ModelConfig,
    OptimConfig,
    ParamDtype,
    RunConfig,
    StateDtype,
)
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.collectives import Collectives
from trainer.model.scaling import shift_and_scale
from trainer.model.spec import ModelSpec
from trainer.state_formats import block_count


def model_spec(model: ModelConfig, activation: ActivationConfig, n_layers: int, d_model: int) -> ModelSpec:
    """The shape and behaviour that the two configs describe for `n_layers` layers of width `d_model`."""
    # k has no meaning for relu and jumprelu, and must not be refused for them.
    has_k = activation.kind in (ActivationKind.topk, ActivationKind.batchtopk)
    return ModelSpec(
        n_layers=n_layers,
        d_model=d_model,
        n_features=model.n_features,
        span=model.span.value,
        skip=model.skip,
        kind=activation.kind.value,
        k=activation.k if has_k else 1,
        scope=activation.scope.value,
        score=activation.score.value,
        threshold_init=activation.threshold_init,
        bandwidth=activation.bandwidth,
        encoder_init_scale=model.encoder_init_scale,
        decoder_init=model.decoder_init.value,
    )


def build_model(
    config: RunConfig,
    statistics: ScalingStatistics,
    *,
    device: torch.device,
    initial_rows_BLD: Tensor | None = None,
    collectives: Collectives | None = None,
) -> CrossLayerTranscoder:
    """A model ready to train, on `device`: on a mesh (`collectives`), this rank's part of it.

    Parameters as `trainer.model.initialise` draws them from `model.seed`; scaling of inputs and targets and b_dec (the
    targets' mean) from the store's statistics; b_enc from `initial_rows_BLD` (raw mlp_in) if `model.initial_density` is
    set.
    """
    n_layers, d_model = statistics.in_mean_LD.shape
    spec = model_spec(config.model, config.activation, n_layers, d_model)
    model = CrossLayerTranscoder(
        spec, seed=config.model.seed, backend=config.kernels.backend.value, collectives=collectives
    )
    inputs = shift_and_scale(config.model.input_scaling.value, statistics.in_mean_LD, statistics.in_mean_square_LD)
    targets = shift_and_scale(config.model.target_scaling.value, statistics.out_mean_LD, statistics.out_mean_square_LD)
    model.set_scaling(*inputs, *targets)
    model.to(device)
    model.initialise_from_data(statistics.out_mean_LD.to(device), initial_rows_BLD, config.model.initial_density)
    return model


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of a model of this specification."""
    per_layer = spec.n_features + spec.d_model
    if spec.kind == "jumprelu":
        per_layer += spec.n_features
    if spec.skip:
        per_layer += spec.d_model * spec.d_model
    return spec.n_layers * per_layer + table_rows(spec) * spec.d_model


def table_rows(spec: ModelSpec) -> int:
    """Vectors of d_model numbers in W_enc and W_dec of all layers."""
    return spec.n_features * sum(1 + len(spec.targets(layer)) for layer in range(spec.n_layers))


@dataclass(frozen=True, slots=True)
class TableBytes:
    """Bytes that W_enc and W_dec take: themselves, their float32 masters (0: none), and Adam's two moments."""

    weights: int
    master: int
    moments: int


def table_bytes(spec: ModelSpec, optim: OptimConfig) -> TableBytes:
    """What `optim` stores for W_enc and W_dec of all layers."""
    rows, values = table_rows(spec), table_rows(spec) * spec.d_model
    low = optim.param_dtype is ParamDtype.bf16
    moment = {
        StateDtype.fp32: 4 * values,
        StateDtype.bf16: 2 * values,
        StateDtype.int8: values + 4 * rows * block_count(spec.d_model),
    }
    return TableBytes(
        weights=(2 if low else 4) * values,
        master=4 * values if low and optim.master is Master.fp32 else 0,
        moments=2 * moment[optim.state_dtype],
    )


def checkpoint_bytes(spec: ModelSpec, optim: OptimConfig) -> int:
    """Bytes of a checkpoint: parameters (masters in place of what is rounded from them), moments, and the buffers by
    feature (float32 and int64).
    """
    tables = table_bytes(spec, optim)
    others = parameter_count(spec) - table_rows(spec) * spec.d_model
    return (tables.master or tables.weights) + tables.moments + 12 * others + 12 * spec.n_layers * spec.n_features
