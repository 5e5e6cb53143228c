"""Which way decoders are split, and why."""

from typing import Any

import pytest

from trainer.config import ActivationConfig, ActivationKind, DecoderSplit, ModelConfig, ParallelConfig
from trainer.model.spec import ModelSpec
from trainer.parallel.split import SplitChoice, choose_split, columns_bytes, kept_split, rows_bytes
from trainer.parallel.split_table import Link, Steps, groups_in_one_machine, measured_steps

SPEC: dict[str, Any] = {"n_layers": 12, "d_model": 768, "n_features": 32768}
GPUS = Link("cuda", one_machine=True)
MACHINE, NETWORK = (Link("cpu", one_machine=one) for one in (True, False))


def _choice(
    feature: int = 8, split: str = "auto", kind: str = "topk", link: Link = GPUS, **settings: Any
) -> SplitChoice:
    model = ModelConfig(initial_density=settings.pop("initial_density", None))
    activation = ActivationConfig(kind=ActivationKind(kind), **settings)
    k = {"k": settings["k"]} if "k" in settings else {}
    spec = ModelSpec(kind=kind, **SPEC, **k)
    parallel = ParallelConfig(feature=feature, decoder_split=DecoderSplit(split))
    return choose_split(parallel, model, activation, spec, link)


@pytest.mark.parametrize(
    ("settings", "by_columns", "words"),
    [
        ({"k": 16}, True, "columns: about 1,764 bytes a token and rank by columns, 64,512 by rows, by the bytes alone"),
        (
            {"k": 16},
            True,
            "nothing was measured on cuda, with 192 entries a token over all layers expected (k a layer)",
        ),
        ({"k": 16, "link": NETWORK}, True, "(two CPU processes over 1 Gbit/s), with 192 entries"),
        # 0.7 of the bytes of rows, which take less time all the same.
        ({"k": 430, "link": NETWORK}, False, "rows: about 45,234 bytes a token and rank by columns, 64,512 by rows, "),
        ({"k": 430}, True, "columns: about 45,234 bytes"),
        ({"k": 16, "link": MACHINE}, False, "(two CPU processes of one machine)"),
        ({"k": 16, "link": MACHINE, "split": "columns"}, True, "columns, as asked for"),
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


@pytest.mark.parametrize(
    ("written_by", "parallel", "kept"),
    [
        ({"feature": 2, "decoder_split": "columns"}, {"feature": 2}, True),
        ({"feature": 2, "decoder_split": "columns"}, {"feature": 2, "data": 4}, True),
        ({"feature": 4, "decoder_split": "columns"}, {"feature": 2}, False),
        ({"feature": 2, "decoder_split": "columns"}, {"feature": 2, "decoder_split": DecoderSplit.rows}, False),
        ({"feature": 2, "decoder_split": "auto"}, {"feature": 2}, False),
        ({}, {"feature": 2}, False),
    ],
)
def test_what_auto_has_decided_stays(written_by: dict[str, Any], parallel: dict[str, Any], kept: bool) -> None:
    choice = SplitChoice(by_columns=False, reason="rows")
    found = kept_split(choice, ParallelConfig(**parallel), written_by)
    assert found == (SplitChoice(True, "columns, as before the checkpoint") if kept else choice)


def test_the_time_between_two_points_and_outside() -> None:
    steps = Steps("somewhere", ((0.1, 0.8), (1.0, 1.2)))
    assert [steps.time_ratio(ratio) for ratio in (0.01, 0.1, 1.0, 30.0)] == [0.8, 0.8, 1.2, 1.2]
    assert steps.time_ratio(10**-0.5) == pytest.approx(1.0)


@pytest.mark.parametrize("link", [MACHINE, NETWORK])
def test_the_measured_points_are_in_order(link: Link) -> None:
    steps = measured_steps(link)
    assert steps is not None
    ratios = [ratio for ratio, _ in steps.points]
    assert ratios == sorted(set(ratios))
    assert all(0.5 < time < 2 for _, time in steps.points)


def test_feature_groups_in_one_machine() -> None:
    hosts = ["a", "a", "b", "b"]
    assert groups_in_one_machine(hosts, 1)
    assert groups_in_one_machine(hosts, 2)
    assert not groups_in_one_machine(hosts, 4)
    assert not groups_in_one_machine(["a", "b", "a", "b"], 2)


def test_bytes_by_hand() -> None:
    spec = ModelSpec(n_layers=2, d_model=6, n_features=40)
    # 3 others; a quarter of 5 entries, each a value of 4 bytes, an id of 2 and a gradient of 4; a count a layer.
    assert columns_bytes(spec, 4, 5) == 3 * (5 / 4 * 10 + 2)
    assert rows_bytes(spec, 4) == 2 * 3 / 4 * 2 * 6 * 4
    # More than a tenth of 80 features: dense.
    assert columns_bytes(spec, 4, 9) == 3 * 3 / 4 * 2 * 40 * 4
