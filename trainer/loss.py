"""The training loss (contracts.md, "Losses").

    mse     = sum over layers and d of (y_hat - y)^2, scaled units, mean over tokens
    tanh    = lambda * sum_i tanh(c * ||W_dec,i|| * a_i), mean over tokens                        (relu, jumprelu)
    l0      = lambda * (2 / L0*) * (L0 - L0*)^2, L0 per token summed over layers                  (jumprelu)
    auxk    = coefficient * L D * sum (e - e_hat)^2 / sum (e - mean e)^2, e = (y - y_hat) detached, e_hat the decoding
              of the dead features' largest positive pre-activations (auxk_k per token and layer); sums over tokens,
              layers, d. L D puts the ratio in the unit of mse: that of predicting 0 for targets of mean square 1
    pre_act = lambda * sum_{i dead} relu(threshold_i - pre_i) * ||W_dec,i||, mean over tokens;
              threshold: theta (jumprelu), 0 (relu), the running threshold (batchtopk)

Legend: B tokens, L layers, T target layers, D d_model, F features of a layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trainer.config import ActivationConfig, KernelsConfig
from trainer.model.activation import cut_to_best
from trainer.model.break_even import shipped_break_even
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.collectives import exchanged
from trainer.model.features import LayerCodes
from trainer.model.functions import squared_error
from trainer.model.layer import SourceLayer
from trainer.model.runtime import Runtime
from trainer.model.training_pass import TrainingPass, training_pass

# Dead features in one block of the pre-activation loss.
_DEAD_BLOCK = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class StepContext:
    """What the schedules say at this step.

    k: budget per token and layer (topk, batchtopk). penalty_scale: ramp of the tanh and L0 penalties, 0..1.
    dead_after_tokens: a feature silent for so many tokens is dead (AuxK, pre-activation loss). per_token: batchtopk
    selects per token at this step, as topk does (its threshold is then the smallest score that any token selected).
    lr: learning rate of the step's update.
    """

    k: int
    penalty_scale: float
    dead_after_tokens: int
    per_token: bool = False
    lr: float = 0.0


@dataclass(slots=True)
class LossOutput:
    """One microbatch's loss.

    total: 0-dim, differentiable; the others detached. mse, penalty (tanh and L0), auxk, pre_act: the terms as they
    enter the total. mse_L (L): mse by target layer. l0_L (L): mean active features per token. fired: per layer (F)
    bool. batch_threshold_L: batchtopk, smallest selected score by layer (NaN: none selected), else None. codes: per
    layer detached codes, None where the dense path ran. y_hat_BTD: scaled reconstruction, detached.

    On a mesh the losses and l0_L are sums over the feature axis, of this rank's tokens: their means over the data axis
    are those of the global microbatch, and so is the mean of the gradients. batch_threshold_L is that of the global
    microbatch. fired, codes and y_hat_BTD are of this device's features and columns, and its tokens.
    """

    total: Tensor
    mse: Tensor
    penalty: Tensor
    auxk: Tensor
    pre_act: Tensor
    mse_L: Tensor
    l0_L: Tensor
    fired: list[Tensor]
    batch_threshold_L: Tensor | None
    codes: list[LayerCodes | None]
    y_hat_BTD: Tensor


def compute_loss(
    model: CrossLayerTranscoder,
    mlp_in_BLD: Tensor,
    mlp_out_BTD: Tensor,
    context: StepContext,
    *,
    activation: ActivationConfig,
    kernels: KernelsConfig | None = None,
) -> LossOutput:
    """Loss of one microbatch of raw activations. Losses of microbatches are averaged by the caller.

    Raises:
        ValueError: wrong shapes, or a loss that the activation cannot have.
    """
    kernels = kernels if kernels is not None else KernelsConfig()
    check_losses(model, activation)
    with model.running() as runtime:
        x_BLD = model.scale_inputs(mlp_in_BLD)
        norms: list[Tensor | None] = [None] * model.spec.n_layers
        if activation.tanh_lambda > 0:
            norms = [model.decoder_norm(s, runtime) for s in range(model.spec.n_layers)]
        result = training_pass(
            model,
            x_BLD,
            runtime,
            k=context.k,
            per_token=context.per_token,
            max_density=_max_density(model, kernels, runtime),
            norms=norms,
            c=activation.tanh_c,
        )
        n_tokens = max(x_BLD.shape[0], 1)
        squares_L, error_BTD = squared_error(result.y_hat_BTD, model.scale_targets(mlp_out_BTD))
        mse_L = model.collectives.sum_columns(squares_L / n_tokens)
        mse = mse_L.sum()
        penalty = _penalty(model, result, context, activation, n_tokens)
        dead = _Dead(model, context.dead_after_tokens, activation)
        auxk = _auxk(model, x_BLD, error_BTD, dead, activation, runtime)
        pre_act = _pre_activation_loss(model, x_BLD, dead, activation, runtime)
        if activation.tanh_lambda > 0 or auxk.requires_grad or pre_act.requires_grad:
            # Rows have a second gradient, which an update with the first alone would miss.
            runtime.fused.withdraw()
        return LossOutput(
            total=mse + penalty + auxk + pre_act,
            mse=mse.detach(),
            penalty=penalty.detach(),
            auxk=auxk.detach(),
            pre_act=pre_act.detach(),
            mse_L=mse_L.detach(),
            l0_L=_sum_features(model, [count.detach() for count in result.active_counts]) / n_tokens,
            fired=result.fired,
            batch_threshold_L=_batch_threshold(model, result) if model.spec.kind == "batchtopk" else None,
            codes=result.codes,
            y_hat_BTD=result.y_hat_BTD.detach(),
        )


def _max_density(model: CrossLayerTranscoder, kernels: KernelsConfig, runtime: Runtime) -> float:
    """The share of selected entries above which a layer goes dense."""
    if kernels.dense_above_density is not None:
        return kernels.dense_above_density
    device = model.threshold_LF.device.type
    return shipped_break_even(runtime.kernels.name, device, runtime.compute_dtype, model.spec).density


def check_losses(model: CrossLayerTranscoder, activation: ActivationConfig) -> None:
    """Raises ValueError for a loss that the activation cannot have."""
    kind = model.spec.kind
    if activation.tanh_lambda > 0 and model.spec.is_topk:
        raise ValueError(f"tanh_lambda={activation.tanh_lambda} is for relu and jumprelu, not {kind}; set it to 0")
    if activation.l0_lambda > 0 and kind != "jumprelu":
        raise ValueError(f"l0_lambda={activation.l0_lambda} is for jumprelu, not {kind}; set it to 0")
    if activation.l0_lambda > 0 and activation.l0_target <= 0:
        raise ValueError(f"l0_target={activation.l0_target} must be above 0 with l0_lambda={activation.l0_lambda}")
    if activation.pre_act_lambda > 0 and kind == "topk":
        raise ValueError(
            f"pre_act_lambda={activation.pre_act_lambda} needs a threshold, which topk has not; set it to 0"
        )


def dead_features(model: CrossLayerTranscoder, dead_after_tokens: int) -> list[Tensor]:
    """Per layer (F) bool: silent for at least `dead_after_tokens` training tokens."""
    return list(model.tokens_since_active_LF >= dead_after_tokens)


class _Dead:
    """Dead features: those of this device per layer (F) bool, and whether any device has some in the layer (L)."""

    def __init__(self, model: CrossLayerTranscoder, dead_after_tokens: int, activation: ActivationConfig) -> None:
        self.layers = dead_features(model, dead_after_tokens)
        self.somewhere = [False] * len(self.layers)
        if activation.auxk_coefficient != 0 or activation.pre_act_lambda != 0:
            counts_L = _sum_features(model, [dead_F.sum() for dead_F in self.layers])
            self.somewhere = [count > 0 for count in counts_L.tolist()]


def _sum_features(model: CrossLayerTranscoder, by_layer: list[Tensor]) -> Tensor:
    """(L) sums over the feature axis of one number a layer."""
    return model.collectives.sum_features(torch.stack(by_layer))


def _penalty(
    model: CrossLayerTranscoder,
    result: TrainingPass,
    context: StepContext,
    activation: ActivationConfig,
    n_tokens: int,
) -> Tensor:
    """tanh and target-L0 penalties, ramped."""
    penalty = result.y_hat_BTD.new_zeros(())
    if activation.tanh_lambda > 0:
        tanh_sum = model.collectives.sum_features(torch.stack(result.tanh_sums).sum())
        penalty = penalty + activation.tanh_lambda * tanh_sum / n_tokens
    if activation.l0_lambda > 0:
        sums = torch.stack([torch.stack(result.active_counts).sum(), penalty.new_tensor(float(n_tokens))])
        # L0 is that of the global microbatch: summed over both axes before the square.
        active, tokens = model.collectives.sum_data(sums)
        l0 = model.collectives.sum_features(active) / tokens.detach()
        penalty = penalty + activation.l0_lambda * 2 / activation.l0_target * (l0 - activation.l0_target) ** 2
    return penalty * context.penalty_scale


def _auxk(
    model: CrossLayerTranscoder,
    x_BLD: Tensor,
    error_BTD: Tensor,
    dead: _Dead,
    activation: ActivationConfig,
    runtime: Runtime,
) -> Tensor:
    """Normalised error of the dead features' reconstruction of the residual error."""
    if activation.auxk_coefficient == 0 or not any(dead.somewhere):
        return x_BLD.new_zeros(())
    e_hat_BTD = model.empty_output(x_BLD.shape[0])
    for s, (layer, dead_F) in enumerate(zip(model.source_layers, dead.layers, strict=True)):
        if not dead.somewhere[s]:
            continue
        selection = layer.select_auxiliary(x_BLD[:, s], dead_F, activation.auxk_k, runtime)
        selection = cut_to_best(selection, None, activation.auxk_k, model.n_features, model.collectives)
        codes, _ = layer.attach(selection, x_BLD[:, s], runtime, gated=False)
        e_hat_BTD = layer.decode_into(e_hat_BTD, exchanged(model.collectives, codes), None, runtime, bias=False)
    e_hat_BTD = model.collectives.combine_output(e_hat_BTD)
    # The denominator is that of the global microbatch: token sums over the data axis first.
    n_tokens = model.collectives.sum_data(x_BLD.new_tensor(float(x_BLD.shape[0])))
    mean_TD = model.collectives.sum_data(error_BTD.sum(dim=0)) / n_tokens
    centred = model.collectives.sum_data(torch.linalg.vector_norm(error_BTD - mean_TD).square())
    centred = model.collectives.sum_columns(centred)
    if not bool(centred > 0):
        return x_BLD.new_zeros(())
    # The error here is y_hat - y, the e of the equation with the other sign.
    residual = model.collectives.sum_columns(squared_error(e_hat_BTD, -error_BTD)[0].sum())
    # Per-token mean here, so that averaging over the data axis gives the global ratio.
    ratio = (residual / x_BLD.shape[0]) / (centred / n_tokens)
    # mse sums over layers and d, also those that other devices hold, where the ratio is near 1 whatever the shape.
    return activation.auxk_coefficient * model.spec.n_layers * model.spec.d_model * ratio


def _pre_activation_loss(
    model: CrossLayerTranscoder,
    x_BLD: Tensor,
    dead: _Dead,
    activation: ActivationConfig,
    runtime: Runtime,
) -> Tensor:
    """Pull of the dead features' pre-activations towards the threshold."""
    loss = x_BLD.new_zeros(())
    if activation.pre_act_lambda == 0:
        return loss
    for s, (layer, dead_F) in enumerate(zip(model.source_layers, dead.layers, strict=True)):
        batchtopk = model.spec.kind == "batchtopk"
        if not dead.somewhere[s] or (batchtopk and bool(model.running_threshold_L[s].isnan())):
            continue
        running = model.running_threshold(s) if batchtopk else None
        norm_F = model.decoder_norm(s, runtime)
        # Without a decoder a feature has no score to pull up, and its term is 0 times whatever the threshold is.
        dead_F = dead_F & (norm_F != 0)  # noqa: PLW2901
        if model.collectives.partitioning.size > 1:
            # Other devices may have dead features where this one has none, and wait in the backward pass of the norms.
            loss = loss + norm_F[:0].sum()
        for block in torch.split(dead_F.nonzero()[:, 0], _DEAD_BLOCK):
            # Recomputed in the backward pass: no buffer of the block's pre-activations outlives it.
            loss = loss + checkpoint(
                _shortfall, layer, x_BLD[:, s], norm_F, block, running, runtime, use_reentrant=False
            )
    loss = model.collectives.sum_features(loss)
    return activation.pre_act_lambda * loss / max(x_BLD.shape[0], 1)


def _shortfall(
    layer: SourceLayer, x_BD: Tensor, norm_F: Tensor, block: Tensor, running_F: Tensor | None, runtime: Runtime
) -> Tensor:
    """sum over tokens and the block's features of relu(threshold - pre) * norm."""
    return layer(_shortfall_of, layer, x_BD, norm_F, block, running_F, runtime)  # type: ignore[no-any-return]


def _shortfall_of(
    layer: SourceLayer, x_BD: Tensor, norm_F: Tensor, block: Tensor, running_F: Tensor | None, runtime: Runtime
) -> Tensor:
    dtype = runtime.compute_dtype
    product_Bf = x_BD.to(dtype) @ layer.W_enc[block].to(dtype).t()
    pre_Bf = product_Bf.to(x_BD.dtype) + layer.b_enc[block]
    if layer.log_threshold is not None:
        return (torch.relu(layer.log_threshold[block].exp() - pre_Bf) * norm_F[block]).sum()
    threshold_f = running_F[block] if running_F is not None else 0.0
    return (torch.relu(threshold_f - pre_Bf) * norm_F[block]).sum()


def _smallest_anywhere(model: CrossLayerTranscoder, smallest_L: Tensor) -> Tensor:
    """The minimum over all devices; NaN: none selected."""
    found_L = model.collectives.smallest(smallest_L.masked_fill(smallest_L.isnan(), torch.inf))
    return found_L.masked_fill(found_L.isinf(), torch.nan)


def _batch_threshold(model: CrossLayerTranscoder, result: TrainingPass) -> Tensor:
    """(L) smallest selected score of each layer; over all layers: the smallest of all; NaN where none is selected."""
    smallest = []
    for s, codes in enumerate(result.codes):
        assert codes is not None
        scores_N = codes.values
        if model.spec.score == "decoder_norm":
            scores_N = scores_N * model.decoder_norm(s).detach()[codes.feature_ids]
        smallest.append(scores_N.min() if scores_N.numel() else scores_N.new_tensor(torch.nan))
    smallest_L = _smallest_anywhere(model, torch.stack(smallest))
    if model.spec.scope == "all_layers":
        found_L = smallest_L[~smallest_L.isnan()]
        return (found_L.min() if found_L.numel() else smallest_L[0]).expand_as(smallest_L)
    return smallest_L
