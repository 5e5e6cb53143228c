"""The benchmark of whole steps: the dense step trains what the engine trains, JumpReLU's band is what it says."""

import re
import weakref
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks import steps, turns
from benchmarks.breakdown import OP_PARTS, PARTS, breakdown
from benchmarks.dense_step import DenseStep
from benchmarks.measure import Page, check_losses, median_ratio, take_turns
from benchmarks.models import copied_model
from benchmarks.step import selection_table
from benchmarks.steps import MODES, Band, Shape, band, build_step, model_spec, modes_for, random_batch
from benchmarks.turns import modes_table
from trainer.kernels.dispatch import Kernels
from trainer.model.clt import CrossLayerTranscoder

CPU = torch.device("cpu")
SHAPE = Shape(3, 10, 127, 41, 7)
REFERENCE = MODES["reference"]


def test_the_dense_step_trains_the_model_that_the_engine_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "LR", 1e-3)
    batch, made = random_batch(SHAPE, CPU), []

    def make_model(*args: object, **options: object) -> CrossLayerTranscoder:
        made.append(CrossLayerTranscoder(*args, **options))
        return made[-1]

    ours = build_step(REFERENCE, SHAPE, batch, make_model=make_model)
    dense = DenseStep(model_spec(SHAPE, REFERENCE), batch, lr=1e-3, device=CPU)
    for _ in range(3):
        assert dense() == pytest.approx(ours(), rel=1e-5)
    for layer, (W_enc, b_enc, W_dec) in zip(made[0].source_layers, dense.layers, strict=True):
        torch.testing.assert_close(W_enc, layer.W_enc.detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(b_enc, layer.b_enc.detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(W_dec, layer.W_dec.detach().flatten(1), rtol=1e-3, atol=1e-5)


def test_steps_that_do_not_train_the_same_model_are_told() -> None:
    with pytest.raises(RuntimeError, match="do not train the same model"):
        take_turns({"a": lambda: 1.0, "b": lambda: 1.01}, 1, CPU, tolerance=1e-3)
    with pytest.raises(RuntimeError, match="do not train the same model"):
        take_turns({"a": lambda: 1.0, "b": lambda: float("nan")}, 1, CPU, tolerance=1e-3)


def test_steps_take_turns_and_warm_rounds_do_not_count() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    seconds = take_turns(calls, 2, CPU, warm=1, tolerance=0.0)
    assert "".join(order) == "ababab"
    assert [len(times) for times in seconds.values()] == [2, 2]
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0


def test_the_band_holds_at_most_k_entries_beside_the_active_ones() -> None:
    shape = Shape(3, 24, 300, 64, 5)
    batch = random_batch(shape, CPU)
    found: Band = band(shape, batch)
    model = CrossLayerTranscoder(model_spec(shape, REFERENCE), seed=0)
    further = []
    for s, theta in enumerate(found.thetas):
        pre = model.pre_activations(s, batch.mlp_in[:, s]).double()
        assert int((pre > theta).sum()) == shape.k * shape.n_tokens
        further.append(int(((pre <= theta) & ((pre - theta).abs() < found.bandwidth / 2)).sum()) / shape.n_tokens)
    # As wide as it may be: in one layer the band is full.
    assert max(further) == pytest.approx(shape.k, abs=2 / shape.n_tokens)
    assert found.further == pytest.approx(sum(further) / 3, abs=2 / shape.n_tokens)


def test_every_op_of_the_kernels_has_its_part_in_the_breakdown() -> None:
    assert set(OP_PARTS) == {field.name for field in fields(Kernels)} - {"name"}


@pytest.mark.parametrize("fused", [False, True])
def test_the_parts_of_a_breakdown_are_the_whole_step(fused: bool) -> None:
    mode = steps.replace(REFERENCE, fused=fused)
    found = breakdown(mode, SHAPE, random_batch(SHAPE, CPU), calls=1)
    assert list(found) == [*PARTS, "step"]
    assert sum(found[part][0] for part in PARTS) == pytest.approx(found["step"][0])
    assert (found["backward and optimizer, fused"][0] > 0) == fused
    assert (found["backward: decoder"][0] > 0) == (not fused)
    for part in ("encoder product", "index", "decode", "gradient norm", "optimizer"):
        assert found[part][0] > 0, part


def test_tables_have_a_row_for_every_mode_and_selection() -> None:
    assert [mode.name for mode in modes_for(CPU)][:2] == ["dense", "reference"]
    batch = random_batch(SHAPE, CPU)
    modes = modes_table(MODES["dense"], [REFERENCE], SHAPE, batch, 1, {"reference": 5.0, "dense": 7.0})
    assert [line.split(" | ")[0] for line in modes.splitlines()[2:]] == ["| reference", "| dense"]
    assert f"{7.0 / SHAPE.state_mib:.2f}" in modes
    selections = selection_table(REFERENCE, SHAPE, batch, 1)
    for word in ("BatchTopK per layer", "BatchTopK over all layers", "JumpReLU", "tanh penalty", "recipe's eps"):
        assert word in selections


def test_what_does_not_fit_is_measured_apart_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that holds one step at a time, and one that does not hold the dense step."""
    batch, alive, whole = random_batch(SHAPE, CPU), [], build_step

    class Held:
        """A step that takes the card while it lives."""

        def __init__(self, *args: object) -> None:
            if any(ref() is not None for ref in alive) or args[0].name in too_large:
                raise torch.OutOfMemoryError("the card is full")
            self.step = whole(*args)
            alive.append(weakref.ref(self))

        def __call__(self) -> float:
            return self.step()

    monkeypatch.setattr(turns, "build_step", Held)
    too_large: set[str] = set()
    for large, ratio, ms in ((set(), "apart", r"[\d.]+"), ({"dense"}, "-", "left out: out of memory")):
        too_large |= large
        page = modes_table(MODES["dense"], [REFERENCE], SHAPE, batch, 2, {"reference": None})
        rows = [line.split(" | ") for line in page.splitlines()[2:4]]
        assert rows[0][0] == "| reference"
        assert rows[0][2].endswith(ratio)
        assert rows[0][3:] == ["-", "- |"]
        assert float(rows[0][1]) > 0
        assert re.fullmatch(ms, rows[1][1])
        assert page.endswith("do not fit the card together.")


def test_steps_measured_apart_must_train_the_same_model_too() -> None:
    with pytest.raises(RuntimeError, match="do not train the same model"):
        check_losses({"dense": 1.0, "triton": 1.1}, 1e-2)
    check_losses({}, 1e-2)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_copied_models_are_the_drawn_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And from the second on nothing is drawn."""
    spec = model_spec(SHAPE, steps.replace(REFERENCE, kind=kind))
    drawn = CrossLayerTranscoder(spec, seed=0, backend="reference").state_dict()
    copied_model(spec, CPU, backend="reference", make_model=CrossLayerTranscoder)
    monkeypatch.setattr(torch.Tensor, "uniform_", None)
    copied = copied_model(spec, CPU, backend="reference", make_model=CrossLayerTranscoder)
    assert copied.state_dict().keys() == drawn.keys()
    for name, value in copied.state_dict().items():
        assert torch.equal(value.nan_to_num(), drawn[name].nan_to_num()), name
    assert copied.partitions().keys() == drawn.keys()


def test_a_page_is_written_after_every_section(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    page = Page(str(file), "# Title", "Conditions.")
    for section in ("first", "second"):
        page.add(section)
        assert file.read_text().endswith(f"\n\n{section}\n")
    assert file.read_text() == "# Title\n\nConditions.\n\nfirst\n\nsecond\n"


def test_shapes_count_parameters_as_the_model_has_them() -> None:
    model = CrossLayerTranscoder(model_spec(SHAPE, REFERENCE))
    assert SHAPE.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert Shape.parse(SHAPE.words) == SHAPE
    with pytest.raises(SystemExit, match="five numbers"):
        Shape.parse("1,2,3")
