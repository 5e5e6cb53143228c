"""Which way decoders are split, and why."""

from typing import Any

import pytest

from trainer.config import ActivationConfig, ActivationKind, DecoderSplit, ModelConfig, ParallelConfig
from trainer.model.spec import ModelSpec
from trainer.parallel.split import SplitChoice, choose_split, columns_bytes, rows_bytes

SPEC: dict[str, Any] = {"n_layers": 12, "d_model": 768, "n_features": 32768}


def _choice(feature: int = 8, split: str = "auto", kind: str = "topk", **settings: Any) -> SplitChoice:
    model = ModelConfig(initial_density=settings.pop("initial_density", None))
    activation = ActivationConfig(kind=ActivationKind(kind), **settings)
    k = {"k": settings["k"]} if "k" in settings else {}
    spec = ModelSpec(kind=kind, **SPEC, **k)
    return choose_split(ParallelConfig(feature=feature, decoder_split=DecoderSplit(split)), model, activation, spec)


@pytest.mark.parametrize(
    ("settings", "by_columns", "words"),
    [
        ({"k": 16}, True, "columns: about 1,764 bytes a token and rank by columns, 64,512 by rows, with 192 entries"),
        ({"k": 900}, False, "rows: about 94,584 bytes a token and rank by columns, 64,512 by rows"),
        ({"kind": "relu"}, False, "half of all"),
        ({"kind": "relu", "initial_density": 0.001}, True, "model.initial_density"),
        ({"kind": "jumprelu", "l0_lambda": 1e-3, "l0_target": 200.0}, True, "activation.l0_target"),
        # All but 1e-8 of the pre-activations are above -0.47, 5.3 deviations below 0.
        ({"kind": "jumprelu"}, False, "with 393,216 entries a token over all layers expected (active or in the band"),
        ({"k": 16, "split": "rows"}, False, "rows, as asked for"),
        ({"kind": "relu", "split": "columns"}, True, "columns, as asked for"),
        ({"k": 16, "feature": 1}, True, "columns: one rank holds them all"),
        ({"k": 16, "feature": 5}, False, "rows: d_model=768 is not divisible by parallel.feature=5"),
    ],
)
def test_choices(settings: dict[str, Any], by_columns: bool, words: str) -> None:
    choice = _choice(**settings)
    assert choice.by_columns is by_columns
    assert words in choice.reason
    assert "\n" not in choice.reason


def test_bytes_by_hand() -> None:
    spec = ModelSpec(n_layers=2, d_model=6, n_features=40)
    # 3 others; a quarter of 5 entries, each a value of 4 bytes, an id of 2 and a gradient of 4; a count a layer.
    assert columns_bytes(spec, 4, 5) == 3 * (5 / 4 * 10 + 2)
    assert rows_bytes(spec, 4) == 2 * 3 / 4 * 2 * 6 * 4
    # More than a tenth of 80 features: dense.
    assert columns_bytes(spec, 4, 9) == 3 * 3 / 4 * 2 * 40 * 4
