"""The initial models of the benchmarks: on CUDA their tables are drawn once in a process, by the host, and copied.

At GPT-2's shape one draw takes some twenty seconds of one thread, and a page of `benchmarks.step` makes many models.
"""

from collections.abc import Callable, Iterator
from functools import cache
from unittest import mock

import torch
from torch import Tensor, nn

from trainer.model.clt import CrossLayerTranscoder
from trainer.model.spec import ModelSpec

_DRAW = "trainer.model.initialise._draw"


def new_model(
    spec: ModelSpec,
    device: torch.device,
    *,
    backend: str,
    make_model: Callable[..., CrossLayerTranscoder] = CrossLayerTranscoder,
) -> CrossLayerTranscoder:
    """The model of seed 0, on the device."""
    if device.type != "cuda":
        # A kept copy would count as memory of the step, which is the process' here.
        return make_model(spec, seed=0, backend=backend).to(device)
    return copied_model(spec, device, backend=backend, make_model=make_model)


def copied_model(
    spec: ModelSpec, device: torch.device, *, backend: str, make_model: Callable[..., CrossLayerTranscoder]
) -> CrossLayerTranscoder:
    """As `new_model`, with the tables of an earlier call of this shape."""
    tables = iter(_tables(spec.n_layers, spec.d_model, spec.n_features))

    def copy(parameter: nn.Parameter, *_: object) -> None:
        parameter.copy_(next(tables))

    with mock.patch(_DRAW, copy), device:
        return make_model(spec, seed=0, backend=backend)


@cache
def _tables(n_layers: int, d_model: int, n_features: int) -> tuple[Tensor, ...]:
    """What a model of this shape draws, in order; every kind of activation draws the same."""
    model = CrossLayerTranscoder(
        ModelSpec(n_layers=n_layers, d_model=d_model, n_features=n_features, k=1), seed=0, backend="reference"
    )
    return tuple(_drawn(model))


def _drawn(model: CrossLayerTranscoder) -> Iterator[Tensor]:
    for layer in model.source_layers:
        yield layer.W_enc.detach()
        yield layer.W_dec.detach()
