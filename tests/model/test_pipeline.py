"""The order of a training pass where codes travel: the exchange of a layer runs while the next ones are encoded."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from tests.model.cases import all_losses, context, make_model
from trainer.config import KernelsConfig
from trainer.kernels.encode_topk import Selection
from trainer.loss import compute_loss
from trainer.model.activation import one_ahead
from trainer.model.collectives import Exchange, IdentityCollectives
from trainer.model.features import LayerCodes
from trainer.model.layer import SourceLayer


class _Watched:
    """An exchange that notes what is asked of it."""

    def __init__(self, exchange: Exchange, layer: int, events: list[str]) -> None:
        self._exchange, self._layer, self._events = exchange, layer, events

    def total(self) -> int | None:
        return self._exchange.total()

    def send(self, codes: LayerCodes) -> None:
        self._events.append(f"send {self._layer}")
        self._exchange.send(codes)

    def receive(self) -> LayerCodes:
        self._events.append(f"receive {self._layer}")
        return self._exchange.receive()


class _Traveling(IdentityCollectives):
    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead
        self.events: list[str] = []

    def announce(self, selection: Selection | LayerCodes | None) -> Exchange:
        layer = sum(event.startswith("announce") for event in self.events)
        self.events.append(f"announce {layer}")
        return _Watched(super().announce(selection), layer, self.events)


def _loss(ahead: int, monkeypatch: pytest.MonkeyPatch, **spec: Any) -> tuple[Tensor, list[str], dict[str, Tensor]]:
    model, x, y = make_model(**spec)
    model.collectives = collectives = _Traveling(ahead)
    name = "select_above" if spec["kind"] == "relu" else "select_topk"
    encode = getattr(SourceLayer, name)

    def noted(layer: SourceLayer, *args: Any) -> Any:
        collectives.events.append(f"encode {layer.index}")
        return encode(layer, *args)

    activation, _ = all_losses(model)
    with monkeypatch.context() as patch:
        patch.setattr(SourceLayer, name, noted)
        total = compute_loss(
            model, x, y, context(model), activation=activation, kernels=KernelsConfig(dense_above_density=1.0)
        ).total
    total.backward()
    return total.detach(), collectives.events, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("spec", [{"kind": "relu"}, {"kind": "topk"}])
def test_layers_are_encoded_while_codes_travel(spec: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    n_layers = 4
    shape = {**spec, "n_layers": n_layers}
    expected, _, gradients = _loss(0, monkeypatch, **shape)
    found, events, found_gradients = _loss(2, monkeypatch, **shape)
    # Encoding and exchange of the layers of AuxK follow those of the loss.
    at = {event: events.index(event) for event in events[::-1]}
    for layer in range(n_layers - 1):
        assert at[f"announce {layer}"] < at[f"encode {layer + 1}"] < at[f"send {layer}"]
    for layer in range(n_layers - 2):
        assert at[f"send {layer}"] < at[f"encode {layer + 2}"] < at[f"receive {layer}"]
    assert found == expected
    assert all((found_gradients[name] == gradient).all() for name, gradient in gradients.items())


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_result_is_asked_for_when_the_next_has_begun(n: int) -> None:
    events: list[str] = []

    def begin(i: int) -> Callable[[], int]:
        events.append(f"begin {i}")

        def result() -> int:
            events.append(f"result {i}")
            return i

        return result

    assert list(one_ahead(begin(i) for i in range(n))) == list(range(n))
    expected = ["begin 0", "begin 1", "result 0", "begin 2", "result 1", "result 2"]
    assert events == {0: [], 1: ["begin 0", "result 0"], 3: expected}[n]
