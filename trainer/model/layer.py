"""One source layer: its parameters, and every use of them.

Legend: B tokens, D d_model, F features, T target layers, s (span) targets of this source.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.kernels.batch_threshold import Candidates
from trainer.kernels.encode_topk import Selection, pre_activations
from trainer.model.collectives import Collectives, Partition, Partitioning
from trainer.model.dense import DenseLayer, DenseOutput
from trainer.model.dense_codes import DenseCodes, DenseDecode
from trainer.model.features import LayerCodes
from trainer.model.functions import AddBias, DecodeInto, EncodeValues, SquaredNorms
from trainer.model.runtime import Runtime
from trainer.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class _Named:
    """A parameter of the layer as an argument: looked up inside `forward`, after what gathers it has run."""

    name: str


_W_ENC, _B_ENC, _W_DEC, _B_DEC = _Named("W_enc"), _Named("b_enc"), _Named("W_dec"), _Named("b_dec")
_LOG_THRESHOLD, _W_SKIP = _Named("log_threshold"), _Named("W_skip")


class SourceLayer(nn.Module):
    """Features that read layer `index` and write to the layers `targets`.

    Parameters: W_enc (F, D), b_enc (F), W_dec (F, span, D), b_dec (D) of target layer `index`; jumprelu: log_threshold
    (F); skip: W_skip (D, D). Each has an attribute `partition`, and is this device's part of the whole where
    `partitioning` splits it. Every use goes through `forward` and finds them there, so that hooks which gather
    parameters (FSDP, ZeRO-3) come first; between uses they may be anything.
    """

    log_threshold: nn.Parameter | None
    W_skip: nn.Parameter | None

    def __init__(self, spec: ModelSpec, index: int, partitioning: Partitioning | None = None) -> None:
        super().__init__()
        part = partitioning if partitioning is not None else Partitioning()
        n_features, d_model = spec.n_features, spec.d_model
        self.spec, self.index, self.targets = spec, index, spec.targets(index)
        self.W_enc = _parameter(part, Partition(feature_dim=0), n_features, d_model)
        self.b_enc = _parameter(part, Partition(feature_dim=0), n_features)
        self.W_dec = _parameter(part, Partition(feature_dim=0, column_dim=2), n_features, len(self.targets), d_model)
        self.b_dec = _parameter(part, Partition(column_dim=0), d_model)
        jumprelu = spec.kind == "jumprelu"
        self.log_threshold = _parameter(part, Partition(feature_dim=0), n_features) if jumprelu else None
        self.W_skip = _parameter(part, Partition(column_dim=0), d_model, d_model) if spec.skip else None
        # Features encoded here. Known also while the parameters lie elsewhere.
        self.n_features = n_features // part.size

    def forward(self, operation: Callable[..., Any], *args: Any) -> Any:
        """Run one of the operations below, on arguments of which some name parameters."""
        return operation(*(getattr(self, arg.name) if isinstance(arg, _Named) else arg for arg in args))

    @torch.no_grad()
    def theta(self) -> Tensor:
        """(F) thresholds of jumprelu; no gradient."""
        theta_F: Tensor = self(torch.exp, _LOG_THRESHOLD)
        return theta_F

    def pre_activations(self, x_BD: Tensor, runtime: Runtime) -> Tensor:
        """(B, F) pre-activations of scaled inputs; no gradient."""
        with torch.no_grad():
            pre_BF: Tensor = self(pre_activations, x_BD, _W_ENC, _B_ENC, runtime.compute_dtype)
        return pre_BF

    def squared_norms(self, runtime: Runtime) -> Tensor:
        """(rows of W_dec) squared decoder norms over all targets, of the columns that this device holds."""
        squares_F: Tensor = self(SquaredNorms.apply, _W_DEC, runtime)
        return squares_F

    @torch.no_grad()
    def select_topk(self, x_BD: Tensor, k: int, norm_F: Tensor | None, runtime: Runtime) -> Selection:
        """The k best features of each token."""
        found: Selection = self(runtime.kernels.encode_topk, x_BD, _W_ENC, _B_ENC, k, norm_F, runtime.compute_dtype)
        return found

    @torch.no_grad()
    def begin_topk(self, x_BD: Tensor, k: int, norm_F: Tensor | None, runtime: Runtime) -> Callable[[], Selection]:
        """select_topk in two parts: what a GPU can do meanwhile is queued now; the result waits for it."""
        begin = runtime.kernels.begin_topk
        if begin is None:
            return partial(self.select_topk, x_BD, k, norm_F, runtime)
        found: Callable[[], Selection] = self(begin, x_BD, _W_ENC, _B_ENC, k, norm_F, runtime.compute_dtype)
        return found

    @torch.no_grad()
    def select_candidates(
        self, x_BD: Tensor, n: int, floor: float, norm_F: Tensor | None, runtime: Runtime
    ) -> Candidates:
        """The n best entries of the microbatch."""
        found: Candidates = self(
            runtime.kernels.encode_candidates, x_BD, _W_ENC, _B_ENC, n, floor, norm_F, runtime.compute_dtype
        )
        return found

    @torch.no_grad()
    def select_above(
        self, x_BD: Tensor, theta_F: Tensor | float, bandwidth: float, max_density: float, runtime: Runtime
    ) -> Selection | None:
        """Entries above theta or in its band; None when there are too many."""
        found: Selection | None = self(
            runtime.kernels.encode_jumprelu,
            x_BD,
            _W_ENC,
            _B_ENC,
            theta_F,
            bandwidth,
            runtime.compute_dtype,
            max_density,
        )
        return found

    @torch.no_grad()
    def select_auxiliary(self, x_BD: Tensor, dead_F: Tensor, k: int, runtime: Runtime) -> Selection:
        """The k largest positive pre-activations of each token among the dead features."""
        return self(self._select_auxiliary, x_BD, dead_F.nonzero()[:, 0], k, runtime)  # type: ignore[no-any-return]

    def _select_auxiliary(self, x_BD: Tensor, dead: Tensor, k: int, runtime: Runtime) -> Selection:
        if dead.numel() == 0:
            return Selection(dead.new_zeros(x_BD.shape[0] + 1), dead, x_BD.new_zeros(0))
        found = runtime.kernels.encode_topk(
            x_BD, self.W_enc[dead], self.b_enc[dead], min(k, dead.numel()), None, runtime.compute_dtype
        )
        return Selection(found.offsets, dead[found.feature_ids], found.values)

    def attach(
        self, selection: Selection, x_BD: Tensor, runtime: Runtime, *, gated: bool = True
    ) -> tuple[LayerCodes, Tensor]:
        """Codes whose values carry the encoder's gradient, and the number of active entries (with theta's gradient).

        gated=False ignores the threshold of jumprelu (auxiliary codes of dead features).
        """
        codes = LayerCodes(selection.offsets, selection.feature_ids, selection.values, self.n_features)
        log_threshold = _LOG_THRESHOLD if gated else None
        values_N, count = self(
            EncodeValues.apply,
            _W_ENC,
            _B_ENC,
            log_threshold,
            x_BD,
            codes,
            self.spec.bandwidth,
            runtime,
        )
        return codes.with_values(values_N), count

    def decode_into(
        self, y_BTD: Tensor, codes: LayerCodes, x_BD: Tensor | None, runtime: Runtime, *, bias: bool = True
    ) -> Tensor:
        """y with this layer's contributions added in place (b_dec and W_skip too, unless bias=False)."""
        b_dec, W_skip = (_B_DEC, _W_SKIP) if bias else (None, None)
        if bias and self.W_skip is not None and x_BD is None:
            raise ValueError(_NO_INPUT)
        y: Tensor = self(
            DecodeInto.apply, y_BTD, codes.values, _W_DEC, b_dec, W_skip, x_BD, codes, self.targets, runtime
        )
        return y

    def add_bias(self, y_BTD: Tensor, x_BD: Tensor | None, runtime: Runtime) -> Tensor:
        """y with b_dec and W_skip x added in place, for what was decoded with bias=False."""
        if self.W_skip is not None and x_BD is None:
            raise ValueError(_NO_INPUT)
        y: Tensor = self(AddBias.apply, y_BTD, _B_DEC, _W_SKIP, x_BD, self.index, runtime)
        return y

    def dense_into(
        self,
        y_BTD: Tensor,
        x_BD: Tensor,
        norm_F: Tensor | None,
        c: float,
        collectives: Collectives,
        runtime: Runtime,
        *,
        bias: bool = True,
    ) -> DenseOutput:
        """relu, jumprelu: encode, activate and decode without sparse codes."""
        bandwidth = self.spec.bandwidth if self.log_threshold is not None else 0.0
        b_dec, W_skip = (_B_DEC, _W_SKIP) if bias else (None, None)
        outputs = self(
            DenseLayer.apply,
            y_BTD,
            x_BD,
            _W_ENC,
            _B_ENC,
            _LOG_THRESHOLD,
            _W_DEC,
            b_dec,
            W_skip,
            norm_F,
            c,
            self.targets,
            bandwidth,
            collectives,
            runtime,
        )
        return DenseOutput(*outputs)

    def dense_codes_into(
        self, y_BTD: Tensor, codes: LayerCodes, x_BD: Tensor, runtime: Runtime, *, bias: bool = True
    ) -> Tensor:
        """topk, batchtopk: as `attach` and `decode_into` together, by matrix products."""
        b_dec, W_skip = (_B_DEC, _W_SKIP) if bias else (None, None)
        y: Tensor = self(
            DenseCodes.apply,
            y_BTD,
            x_BD,
            _W_ENC,
            _B_ENC,
            _W_DEC,
            b_dec,
            W_skip,
            codes,
            self.targets,
            runtime,
        )
        return y

    def dense_decode_into(
        self, y_BTD: Tensor, codes: LayerCodes, x_BD: Tensor | None, runtime: Runtime, *, bias: bool = True
    ) -> Tensor:
        """As `decode_into`, by matrix products: many codes, which other devices encoded."""
        b_dec, W_skip = (_B_DEC, _W_SKIP) if bias else (None, None)
        y: Tensor = self(
            DenseDecode.apply, y_BTD, codes.values, _W_DEC, b_dec, W_skip, x_BD, codes, self.targets, runtime
        )
        return y


_NO_INPUT = "a transcoder with skip decodes features together with mlp_in; give decode(features, mlp_in)"


def _parameter(partitioning: Partitioning, partition: Partition, *shape: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(partitioning.shape(shape, partition)))
    parameter.partition = partition  # type: ignore[attr-defined]
    return parameter
