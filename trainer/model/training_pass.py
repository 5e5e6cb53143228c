"""Encode, select and decode for training, one source layer at a time, sparse or dense as the data ask for.

Where the codes of a layer travel between devices, the next layers are encoded meanwhile.

Legend: B tokens, L layers, T target layers, D d_model, F features of a layer.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from trainer.kernels.encode_topk import Selection
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.collectives import Exchange
from trainer.model.features import LayerCodes
from trainer.model.functions import tanh_penalty
from trainer.model.runtime import Runtime


@dataclass(slots=True)
class TrainingPass:
    """What a training forward leaves behind, of the features and columns that this device holds.

    y_hat_BTD scaled; codes: per layer, detached, None where the dense path of relu and jumprelu ran; active_counts: per
    layer 0-dim, with theta's gradient for jumprelu; tanh_sums: per layer 0-dim sum over tokens and features (zero
    without a penalty); fired: per layer (F) bool.
    """

    y_hat_BTD: Tensor
    codes: list[LayerCodes | None] = field(default_factory=list)
    active_counts: list[Tensor] = field(default_factory=list)
    tanh_sums: list[Tensor] = field(default_factory=list)
    fired: list[Tensor] = field(default_factory=list)


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
    selections: Iterable[Selection | None]
    selections = model.select(x_BLD, runtime, k=k, max_density=max_density, per_token=per_token)
    collectives = model.collectives
    if collectives.ahead == 0:
        # Nothing travels: the temporaries of encoding are gone before y is there.
        selections = list(selections)
    decoder = _Decoder(model, x_BLD, runtime, max_density, norms, c)
    announced: deque[_Layer] = deque()
    sent: deque[_Layer] = deque()
    for s, selection in enumerate(selections):
        announced.append(_Layer(s, selection, collectives.announce(selection)))
        if len(announced) > min(collectives.ahead, 1):
            sent.append(decoder.send(announced.popleft()))
        if len(sent) > max(collectives.ahead - 1, 0):
            decoder.decode(sent.popleft())
    for layer in announced:
        sent.append(decoder.send(layer))
    for layer in sent:
        decoder.decode(layer)
    decoder.result.y_hat_BTD = model.complete(decoder.result.y_hat_BTD, x_BLD, runtime)
    return decoder.result


@dataclass(slots=True)
class _Layer:
    """A layer on its way: selected, then (unless it goes dense) with codes that are sent, then decoded."""

    index: int
    selection: Selection | None
    exchange: Exchange
    dense: bool = False
    codes: LayerCodes | None = None
    count: Tensor | None = None


class _Decoder:
    """The steps of a layer after its selection; each adds to `result`."""

    def __init__(
        self,
        model: CrossLayerTranscoder,
        x_BLD: Tensor,
        runtime: Runtime,
        max_density: float,
        norms: list[Tensor | None],
        c: float,
    ) -> None:
        self._model, self._x_BLD, self._runtime, self._norms, self._c = model, x_BLD, runtime, norms, c
        self._most = max_density * x_BLD.shape[0] * model.spec.n_features
        self._bias = not model.collectives.partitioning.rows_split
        self.result = TrainingPass(model.empty_output(x_BLD.shape[0]))

    def send(self, layer: _Layer) -> _Layer:
        """Sparse or dense, by the share of all features of the layer, which is the same on all devices."""
        total, source = layer.exchange.total(), self._model.source_layers[layer.index]
        layer.dense = total is None or total > self._most
        if layer.selection is None or (layer.dense and not self._model.spec.is_topk):
            return layer
        if layer.dense and not self._model.collectives.partitioning.columns_split:
            # Encoded and decoded at once.
            layer.codes = LayerCodes(*layer.selection, self._model.n_features)
            return layer
        layer.codes, layer.count = source.attach(layer.selection, self._x_BLD[:, layer.index], self._runtime)
        layer.exchange.send(layer.codes)
        return layer

    def decode(self, layer: _Layer) -> None:
        """Adds the layer's part to y."""
        source, x_BD, result = self._model.source_layers[layer.index], self._x_BLD[:, layer.index], self.result
        y_BTD, norm_F, runtime = result.y_hat_BTD, self._norms[layer.index], self._runtime
        tanh_sum = y_BTD.new_zeros(())
        if layer.codes is None:
            y_BTD, count, tanh_sum, fired_F = source.dense_into(
                y_BTD, x_BD, norm_F, self._c, self._model.collectives, runtime, bias=self._bias
            )
        elif layer.count is None:
            y_BTD = source.dense_codes_into(y_BTD, layer.codes, x_BD, runtime, bias=self._bias)
            count, fired_F = y_BTD.new_full((), layer.codes.values.numel()), layer.codes.fired()
        else:
            count = layer.count
            if norm_F is not None:
                tanh_sum = tanh_penalty(layer.codes.values, norm_F, self._c, layer.codes, runtime.kernels)
            codes = layer.exchange.receive()
            decode = source.dense_decode_into if layer.dense else source.decode_into
            y_BTD = decode(y_BTD, codes, x_BD, runtime, bias=self._bias)
            fired_F = layer.codes.fired()
        result.y_hat_BTD = y_BTD
        result.codes.append(layer.codes.detach() if layer.codes is not None else None)
        result.active_counts.append(count)
        result.tanh_sums.append(tanh_sum)
        result.fired.append(fired_F)
