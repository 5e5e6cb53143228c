"""The transcoder: cross-layer, per-layer and skip transcoders are one class whose layers differ in their span.

    x[s]     = (mlp_in[s] - input_shift[s]) * input_scale[s]
    pre[s]   = W_enc[s] x[s] + b_enc[s]                                             (F)
    a[s]     = activation(pre[s])                                                   (F, sparse)
    y_hat[t] = sum_{s writes t} a[s] W_dec[s][:, t-s] + b_dec[t] (+ W_skip[t] x[t])    in scaled units
    mlp_out[t] ~ y_hat[t] / target_scale[t] + target_shift[t]

Legend: B tokens, L layers, T target layers (= L), D d_model, F features of a layer, N selected entries.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from trainer.kernels.dispatch import Kernels, check_name, kernels
from trainer.kernels.encode_topk import Selection
from trainer.model.activation import begin_layer, one_ahead, select_all_layers
from trainer.model.collectives import Collectives, IdentityCollectives, Partition, exchanged
from trainer.model.features import LayerCodes, SparseFeatures
from trainer.model.initialise import initialise_layer, set_density
from trainer.model.layer import SourceLayer
from trainer.model.runtime import FusedUpdates, GradientBuffers, Runtime
from trainer.model.spec import ModelSpec

_BY_FEATURE = Partition(feature_dim=1)
_SIDES = {"input": Partition(), "target": Partition(column_dim=1)}


class CrossLayerTranscoder(nn.Module):
    """See the module's equations.

    Args:
        spec: shape and behaviour.
        seed: of the initialisation (drawn on the CPU, layer after layer).
        collectives: sums over a device mesh, and which part of everything this device holds; the default is one device,
            which holds all.
        backend: of the kernels: auto, reference, cpu, triton. What runs is resolved where the model lies when it is
            used, so that `model.to(device)` may follow.

    Buffers (all part of checkpoints): input_shift_LD, input_scale_LD, target_shift_LD, target_scale_LD;
    threshold_LF, the inference rule in units of the pre-activation, NaN until calibrated; running_threshold_L, the
    batchtopk training threshold in units of the score, NaN before the first step; tokens_since_active_LF (int64).

    On a mesh every parameter and buffer is this device's part (`partitions` says of which dims): F features of its own,
    and with decoders split by columns D columns of its own in y, targets, b_dec and the rows of W_dec. Rows of mlp_in
    are whole. Codes, thresholds and norms are those of its own features, and what needs all of them (decoding, a
    selection, a loss) asks the collectives; all ranks of a mesh must then call the same methods in the same order.
    """

    input_shift_LD: Tensor
    input_scale_LD: Tensor
    target_shift_LD: Tensor
    target_scale_LD: Tensor
    threshold_LF: Tensor
    running_threshold_L: Tensor
    tokens_since_active_LF: Tensor

    def __init__(
        self, spec: ModelSpec, *, seed: int = 0, collectives: Collectives | None = None, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.spec = spec
        self.collectives: Collectives = collectives if collectives is not None else IdentityCollectives()
        check_name(backend)
        self.backend = backend
        self.gradient_buffers, self.fused_updates = GradientBuffers(), FusedUpdates()
        part = self.collectives.partitioning
        self.layers = nn.ModuleList(SourceLayer(spec, index, part) for index in range(spec.n_layers))
        generator = torch.Generator().manual_seed(seed)
        for layer in self.source_layers:
            initialise_layer(layer, spec, generator, part)
        shape_LD, shape_LF = (spec.n_layers, spec.d_model), part.shape((spec.n_layers, spec.n_features), _BY_FEATURE)
        for side in ("input", "target"):
            shape = part.shape(shape_LD, _SIDES[side])
            self.register_buffer(f"{side}_shift_LD", torch.zeros(shape))
            self.register_buffer(f"{side}_scale_LD", torch.ones(shape))
        self.register_buffer("threshold_LF", torch.full(shape_LF, torch.nan))
        self.register_buffer("running_threshold_L", torch.full((spec.n_layers,), torch.nan))
        self.register_buffer("tokens_since_active_LF", torch.zeros(shape_LF, dtype=torch.int64))

    @staticmethod
    def load(folder: str | Path, *, device: str = "cpu") -> "CrossLayerTranscoder":
        """The transcoder of a run folder (its newest good checkpoint) or of a published folder, in eval mode."""
        from trainer.load import load_transcoder

        return load_transcoder(Path(folder), device=device)

    @property
    def source_layers(self) -> list[SourceLayer]:
        """The source layers, in order."""
        return cast(list[SourceLayer], list(self.layers))

    def partitions(self) -> dict[str, Partition]:
        """How every parameter and buffer may be split, by its name."""
        found = {f"{side}_{kind}_LD": partition for side, partition in _SIDES.items() for kind in ("shift", "scale")}
        found |= {
            "threshold_LF": _BY_FEATURE,
            "tokens_since_active_LF": _BY_FEATURE,
            "running_threshold_L": Partition(),
        }
        for name, parameter in self.named_parameters():
            found[name] = parameter.partition  # type: ignore[attr-defined]
        return found

    @property
    def n_features(self) -> int:
        """F: features of a layer that this device encodes (all `spec.n_features` of them on a single device)."""
        return self.threshold_LF.shape[1]

    @property
    def kernels(self) -> Kernels:
        """The kernels that run where the model lies now.

        Raises:
            ValueError: the backend does not run there.
        """
        return kernels(self.backend, self.threshold_LF.device, self.threshold_LF.dtype)

    # --- scaling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_scaling(
        self, input_shift_LD: Tensor, input_scale_LD: Tensor, target_shift_LD: Tensor, target_scale_LD: Tensor
    ) -> None:
        """Fill the scaling buffers from whole tensors (see `trainer.model.scaling.shift_and_scale`)."""
        self.input_shift_LD.copy_(input_shift_LD)
        self.input_scale_LD.copy_(input_scale_LD)
        self.target_shift_LD.copy_(self.local_columns(target_shift_LD))
        self.target_scale_LD.copy_(self.local_columns(target_scale_LD))

    def local_columns(self, whole: Tensor) -> Tensor:
        """(..., d_model) -> the columns of targets and y that this device holds, a view."""
        return self.collectives.partitioning.local(whole, Partition(column_dim=whole.ndim - 1))

    @torch.no_grad()
    def initialise_from_data(
        self, target_mean_LD: Tensor, mlp_in_BLD: Tensor | None = None, initial_density: float | None = None
    ) -> None:
        """b_dec = mean of the scaled targets (L, d_model); `initial_density`: b_enc from raw rows `mlp_in_BLD` (the
        same on all ranks).
        """
        mean_LD = self.local_columns(target_mean_LD.to(self.target_shift_LD))
        mean_LD = (mean_LD - self.target_shift_LD) * self.target_scale_LD
        for layer, mean_D in zip(self.source_layers, mean_LD, strict=True):
            layer.b_dec.copy_(mean_D)
        if initial_density is None:
            return
        if mlp_in_BLD is None:
            raise ValueError(f"initial_density={initial_density} needs rows of mlp_in; give mlp_in_BLD")
        for s, layer in enumerate(self.source_layers):
            set_density(layer, self.scale_input(s, mlp_in_BLD[:, s]), initial_density)

    def scale_input(self, layer: int, mlp_in_BD: Tensor) -> Tensor:
        """(B, D) raw input of one layer in scaled units."""
        shift_D, scale_D = self.input_shift_LD[layer], self.input_scale_LD[layer]
        return (mlp_in_BD.to(shift_D.dtype) - shift_D).mul_(scale_D)

    def scale_inputs(self, mlp_in_BLD: Tensor) -> Tensor:
        """(B, L, D) raw inputs in scaled units."""
        if mlp_in_BLD.requires_grad:
            raise ValueError("mlp_in requires grad; no gradient flows to a transcoder's inputs, give mlp_in.detach()")
        if mlp_in_BLD.shape[1:] != self.input_shift_LD.shape:
            raise ValueError(
                f"mlp_in has shape {tuple(mlp_in_BLD.shape)}; the transcoder wants (tokens, "
                f"{self.spec.n_layers}, {self.spec.d_model})"
            )
        return (mlp_in_BLD.to(self.input_shift_LD.dtype) - self.input_shift_LD).mul_(self.input_scale_LD)

    def scale_targets(self, mlp_out_BTD: Tensor) -> Tensor:
        """(B, T, D) raw targets in scaled units."""
        return (mlp_out_BTD.to(self.target_shift_LD.dtype) - self.target_shift_LD).mul_(self.target_scale_LD)

    def unscale_targets(self, y_BTD: Tensor) -> Tensor:
        """(B, T, D) scaled reconstruction in raw units."""
        return y_BTD / self.target_scale_LD + self.target_shift_LD

    # --- norms and thresholds ----------------------------------------------------------------------------------------

    def decoder_norm(self, layer: int, runtime: Runtime | None = None) -> Tensor:
        """(F) norm of each feature's decoder over all its targets and columns."""
        squares_F = self.source_layers[layer].squared_norms(runtime if runtime is not None else self._runtime())
        squares_F = self.collectives.sum_to_owners(squares_F)
        # The clamp keeps the gradient of a zero row at 0 instead of 0 * inf. NaN stays: a broken row must show.
        tiny = torch.finfo(squares_F.dtype).tiny
        return torch.where(squares_F == 0, 0.0, squares_F.clamp_min(tiny).sqrt())

    @torch.no_grad()
    def decoder_norms(self) -> list[Tensor]:
        """Per layer (F), no gradient."""
        return [self.decoder_norm(s) for s in range(self.spec.n_layers)]

    @torch.no_grad()
    def inference_threshold(self, layer: int) -> Tensor:
        """(F) threshold of the inference rule a = pre * (pre > threshold), in units of the pre-activation.

        jumprelu: theta. relu: 0. topk, batchtopk: calibrated; before calibration, batchtopk uses its running threshold.

        Raises:
            ValueError: topk or batchtopk without calibration (and without a training step).
        """
        source = self.source_layers[layer]
        if source.log_threshold is not None:
            return source.theta()
        threshold_F = self.threshold_LF[layer]
        if self.spec.kind == "relu":
            return torch.zeros_like(threshold_F)
        if bool(threshold_F.isnan().any()):
            threshold_F = self.running_threshold(layer)
        if bool(threshold_F.isnan().any()):
            raise ValueError(
                f"layer {layer} has no threshold; the inference rule of {self.spec.kind} wants "
                "trainer.calibrate.calibrate_thresholds(model, batches) first"
            )
        return threshold_F

    @torch.no_grad()
    def running_threshold(self, layer: int) -> Tensor:
        """(F) running batchtopk threshold in units of the pre-activation; NaN before the first step."""
        return self.score_threshold(layer, self.running_threshold_L[layer])

    @torch.no_grad()
    def score_threshold(self, layer: int, tau: Tensor) -> Tensor:
        """(F) the threshold `tau` (0-dim or 1, in units of the score) in units of the pre-activation; NaN if tau is.

        A feature whose decoder norm is 0 has score 0, which is above no tau: it gets the largest finite number.
        """
        tau_F = tau.expand(self.n_features)
        if self.spec.score == "activation":
            return tau_F
        norm_F = self.decoder_norm(layer)
        largest = torch.finfo(norm_F.dtype).max
        return (tau_F / norm_F).clamp_max(largest).masked_fill((norm_F == 0) & ~tau_F.isnan(), largest)

    # --- encode and decode -------------------------------------------------------------------------------------------

    def pre_activations(self, layer: int, mlp_in_BD: Tensor) -> Tensor:
        """(B, F) pre-activations of one layer from raw inputs; no gradient."""
        with self.running() as runtime:
            return self.source_layers[layer].pre_activations(self.scale_input(layer, mlp_in_BD), runtime)

    def encode(self, mlp_in_BLD: Tensor, *, rule: str = "training", k: int | None = None) -> SparseFeatures:
        """Codes of every layer from raw inputs.

        rule="training": the activation as trained, differentiable (k: this call's budget); with gradients on, jumprelu
        codes contain entries of value 0, those of the band. rule="inference": pre > threshold, no gradient.

        Raises:
            ValueError: unknown rule, wrong shape, or no threshold (see inference_threshold).
        """
        if rule == "inference":
            return SparseFeatures([self.encode_layer(s, mlp_in_BLD[:, s]) for s in range(self.spec.n_layers)])
        if rule != "training":
            raise ValueError(f"rule={rule} is unknown; use training or inference")
        with self.running() as runtime:
            x_BLD = self.scale_inputs(mlp_in_BLD)
            selections = self.select(x_BLD, runtime, k=k)
            return SparseFeatures(
                [
                    layer.attach(selection, x_BLD[:, s], runtime)[0]
                    for s, (layer, selection) in enumerate(zip(self.source_layers, selections, strict=True))
                    if selection is not None
                ]
            )

    @torch.no_grad()
    def encode_layer(self, layer: int, mlp_in_BD: Tensor) -> LayerCodes:
        """Codes of one layer from its raw inputs alone, by the inference rule; no gradient."""
        with self.running() as runtime:
            x_BD = self.scale_input(layer, mlp_in_BD)
            source = self.source_layers[layer]
            found = source.select_above(x_BD, self.inference_threshold(layer), 0.0, 1.0, runtime)
            assert found is not None
            return LayerCodes(found.offsets, found.feature_ids, found.values, self.n_features)

    def decode_into(self, y_BTD: Tensor, layer: int, codes: LayerCodes, mlp_in_BD: Tensor | None = None) -> Tensor:
        """Add one source layer's contributions to y (B, T, D, scaled, contiguous) in place: its features' to all their
        targets, b_dec and (with skip, from raw mlp_in) W_skip x to target `layer`. y[:, t] is complete after layer t;
        with decoders split by rows, after `complete` too.
        """
        bias = not self.collectives.partitioning.rows_split
        with self.running() as runtime:
            x_BD = self.scale_input(layer, mlp_in_BD) if mlp_in_BD is not None else None
            codes = exchanged(self.collectives, codes)
            return self.source_layers[layer].decode_into(y_BTD, codes, x_BD, runtime, bias=bias)

    def complete(self, y_BTD: Tensor, x_BLD: Tensor | None, runtime: Runtime) -> Tensor:
        """y when all layers are decoded, from this device's decoders -> from all; x scaled, for skip. With decoders
        split by rows it adds what must be added once: b_dec and W_skip x.
        """
        y_BTD = self.collectives.combine_output(y_BTD)
        if self.collectives.partitioning.rows_split:
            for s, layer in enumerate(self.source_layers):
                y_BTD = layer.add_bias(y_BTD, x_BLD[:, s] if x_BLD is not None else None, runtime)
        return y_BTD

    def decode(self, features: SparseFeatures, mlp_in_BLD: Tensor | None = None) -> Tensor:
        """y_hat (B, T, D) in scaled units; differentiable. A skip transcoder needs the raw mlp_in too."""
        y_BTD = self.empty_output(features[0].n_tokens)
        for s, codes in enumerate(features.layers):
            y_BTD = self.decode_into(y_BTD, s, codes, mlp_in_BLD[:, s] if mlp_in_BLD is not None else None)
        return self.complete_raw(y_BTD, mlp_in_BLD)

    def complete_raw(self, y_BTD: Tensor, mlp_in_BLD: Tensor | None) -> Tensor:
        """`complete` from raw inputs."""
        if not self.collectives.partitioning.rows_split:
            return y_BTD
        with self.running() as runtime:
            return self.complete(y_BTD, self.scale_inputs(mlp_in_BLD) if mlp_in_BLD is not None else None, runtime)

    @torch.no_grad()
    def target_output(self, y_BTD: Tensor, layer: int, mlp_in_BD: Tensor) -> Tensor:
        """(B, D) reconstruction of one target in RAW units, all columns, once the layers up to it are decoded into y;
        no gradient. With decoders split by rows that completes it in y: to be asked for once.
        """
        if self.collectives.partitioning.rows_split:
            y_BTD[:, layer] = self.collectives.combine_output(y_BTD[:, layer].contiguous())
            with self.running() as runtime:
                self.source_layers[layer].add_bias(y_BTD, self.scale_input(layer, mlp_in_BD), runtime)
        y_BD = y_BTD[:, layer] / self.target_scale_LD[layer] + self.target_shift_LD[layer]
        return self.collectives.gather_columns(y_BD)

    def empty_output(self, n_tokens: int) -> Tensor:
        """(B, T, D) zeros to decode into."""
        return self.target_scale_LD.new_zeros(n_tokens, *self.target_scale_LD.shape)

    @torch.no_grad()
    def reconstruct(self, mlp_in_BLD: Tensor, *, rule: str = "inference", chunk_tokens: int = 1024) -> Tensor:
        """(B, T, D) reconstruction of mlp_out (this device's columns) in RAW units from raw inputs; no gradient, any
        density.

        Works through `chunk_tokens` tokens at a time, but for batchtopk under the training rule, which selects over
        the batch given.
        """
        if rule == "training" and self.spec.kind == "batchtopk":
            chunk_tokens = max(1, mlp_in_BLD.shape[0])
        chunks = [self._reconstruct(chunk_BLD, rule) for chunk_BLD in torch.split(mlp_in_BLD, chunk_tokens)]
        return self.unscale_targets(torch.cat(chunks))

    def _reconstruct(self, mlp_in_BLD: Tensor, rule: str) -> Tensor:
        if rule == "training" and self.spec.is_topk:
            return self.decode(self.encode(mlp_in_BLD), mlp_in_BLD)
        if rule not in {"training", "inference"}:
            raise ValueError(f"rule={rule} is unknown; use training or inference")
        y_BTD = self.empty_output(mlp_in_BLD.shape[0])
        for s in range(self.spec.n_layers):
            y_BTD = self.decode_into(y_BTD, s, self.encode_layer(s, mlp_in_BLD[:, s]), mlp_in_BLD[:, s])
        return self.complete_raw(y_BTD, mlp_in_BLD)

    # --- training ----------------------------------------------------------------------------------------------------

    def select(
        self, x_BLD: Tensor, runtime: Runtime, *, k: int | None, max_density: float = 1.0, per_token: bool = False
    ) -> Iterator[Selection | None]:
        """Training rule on scaled inputs, no gradient: per layer what is selected of this device's features, encoded as
        it is asked for (topk one layer ahead, on a GPU); None where relu or jumprelu certainly exceeds `max_density`,
        over all features. per_token: batchtopk selects per token, as topk does.
        """
        kind = "topk" if per_token and self.spec.kind == "batchtopk" else self.spec.kind
        k = self.spec.k if k is None else k
        norms: list[Tensor | None] = [None] * self.spec.n_layers
        if self.spec.score == "decoder_norm" and self.spec.is_topk:
            norms = list(self.decoder_norms())
        if self.spec.is_topk and self.spec.scope == "all_layers":
            threshold = float(self.running_threshold_L[0]) if kind == "batchtopk" else math.nan
            yield from select_all_layers(
                kind, self.source_layers, x_BLD, k, norms, runtime, threshold, self.collectives
            )
            return
        yield from one_ahead(
            begin_layer(
                kind,
                layer,
                x_BLD[:, s],
                k,
                norms[s],
                max_density,
                runtime,
                self.running_threshold_L[s],
                self.collectives,
            )
            for s, layer in enumerate(self.source_layers)
        )

    @contextmanager
    def running(self) -> Iterator[Runtime]:
        """The runtime of this call. Under torch.autocast the products take its dtype; all else stays in fp32."""
        device = self.input_shift_LD.device.type
        runtime = self._runtime()
        with torch.autocast(device, enabled=False):
            yield runtime

    def _runtime(self) -> Runtime:
        device = self.input_shift_LD.device.type
        dtype = self.input_shift_LD.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return Runtime(self.kernels, self.gradient_buffers, self.fused_updates, dtype)

    @torch.no_grad()
    def record_step(
        self,
        fired: list[Tensor],
        n_tokens: int,
        batch_threshold_L: Tensor | None = None,
        threshold_decay: float = 0.99,
    ) -> None:
        """Update the dead-feature state and the running threshold after one optimizer step.

        fired: per layer (F) bool, any microbatch of the step on this rank (or-ed over the data axis here); n_tokens:
        global tokens of the step.
        batch_threshold_L: smallest selected score per layer, mean over the step's microbatches (batchtopk; else None).
        """
        fired_LF = self.collectives.any_data(torch.stack(fired))
        self.tokens_since_active_LF += n_tokens
        self.tokens_since_active_LF.masked_fill_(fired_LF, 0)
        if batch_threshold_L is None:
            return
        old_L, new_L = self.running_threshold_L, batch_threshold_L.to(self.running_threshold_L)
        mixed_L = torch.where(old_L.isnan(), new_L, threshold_decay * old_L + (1 - threshold_decay) * new_L)
        self.running_threshold_L.copy_(torch.where(new_L.isnan(), old_L, mixed_L))
