"""The exchange of a layer is under way while others are encoded, or decoded on the way back."""

from typing import Any

import pytest
import torch

from tests.model.cases import all_losses, context
from tests.parallel.model_cases import Case, Pair
from tests.parallel.processes import Processes
from trainer.config import KernelsConfig
from trainer.loss import compute_loss
from trainer.model.features import LayerCodes
from trainer.model.layer import SourceLayer
from trainer.parallel.exchange import CodesExchange


def _events() -> list[str]:
    """What happens in a step of relu with columns split over two ranks, in order."""
    pair = Pair(Case(1, 2, True, {"kind": "relu", "n_layers": 5}))
    activation, _ = all_losses(pair.whole)
    activation.auxk_coefficient = 0.0
    events: list[str] = []
    layer_of: dict[int, int] = {}
    kept = {name: getattr(CodesExchange, name) for name in ("send", "start_back", "finish_back")}
    encode = SourceLayer.select_above

    def send(exchange: CodesExchange, codes: LayerCodes) -> None:
        layer_of[id(exchange)] = len(layer_of)
        events.append(f"send {layer_of[id(exchange)]}")
        kept["send"](exchange, codes)

    def start_back(exchange: CodesExchange, grad_N: torch.Tensor) -> torch.Tensor:
        events.append(f"start back {layer_of[id(exchange)]}")
        sent: torch.Tensor = kept["start_back"](exchange, grad_N)
        return sent

    def finish_back(exchange: CodesExchange, grad_n: torch.Tensor) -> torch.Tensor:
        events.append(f"finish back {layer_of[id(exchange)]}")
        total: torch.Tensor = kept["finish_back"](exchange, grad_n)
        return total

    def select_above(layer: SourceLayer, *args: Any) -> Any:
        events.append(f"encode {layer.index}")
        return encode(layer, *args)

    with pytest.MonkeyPatch.context() as patch:
        for function in (send, start_back, finish_back):
            patch.setattr(CodesExchange, function.__name__, function)
        patch.setattr(SourceLayer, "select_above", select_above)
        y = pair.model.local_columns(pair.y)
        kernels = KernelsConfig(dense_above_density=1.0)
        compute_loss(
            pair.model, pair.x, y, context(pair.model), activation=activation, kernels=kernels
        ).total.backward()
    return events


def test_exchanges_overlap(two_ranks: Processes) -> None:
    for events in two_ranks.run(_events):
        at = {event: number for number, event in enumerate(events)}
        for layer in range(3):
            assert at[f"send {layer}"] < at[f"encode {layer + 2}"]
        # Back: the gradients of a layer's codes are on their way while the layer before is decoded.
        for layer in range(1, 5):
            assert at[f"start back {layer - 1}"] < at[f"finish back {layer}"]
