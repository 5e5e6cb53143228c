"""`layerloom tune`: a real run of the verb, the table that it keeps, and what training makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.main import main
from tests.training.runs import tiny_run
from trainer import tune
from trainer.config import KernelsConfig, RunConfig
from trainer.kernels.dispatch import REFERENCE
from trainer.model.break_even import MOST_SPARSE, BreakEven, limited, mean_span, shipped_break_even
from trainer.model.spec import ModelSpec
from trainer.train import train
from trainer.tune import Measured, Timing, break_even
from trainer.tuned import machine, save, table_file, tuned_break_even

CPU = torch.device("cpu")
MACHINE = machine(CPU, "reference", torch.float32)
SPEC = ModelSpec(n_layers=3, d_model=16, n_features=64, k=2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("LAYERLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def measured(density: float) -> Measured:
    return Measured(tokens=96, density=density, timings=[Timing(density, 0.5, 0.5)])


def words_of(run: RunConfig, **more: str) -> list[str]:
    """What a user types for the shape of `tiny_run`."""
    words = {
        "store.path": run.store.path,
        "model.n_features": "64",
        "activation": "topk",
        "activation.k": "2",
        "train.batch_size_tokens": "96",
        "kernels.backend": "reference",
        "launch.threads": "1",
        "device": "cpu",
        **more,
    }
    return [f"{key}={value}" for key, value in words.items()]


def test_train_uses_what_the_verb_measured(
    tiny_store: RunConfig, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *words_of(tiny_store)]) == 0
    captured = capsys.readouterr()
    file = table_file(MACHINE)
    assert f"kept for train in {file}" in captured.out
    assert file.is_relative_to(cache)
    (entry,) = json.loads(file.read_text())["entries"]
    assert entry["shape"] == {"family": "topk", "span": "cross_layer", "n_layers": 3, "d_model": 16, "n_features": 64}
    assert len(entry["timings"]) >= 1
    assert all(timing["sparse_s"] > 0 and timing["dense_s"] > 0 for timing in entry["timings"])
    assert f"{entry['timings'][0]['density']:8.2%}" in captured.out

    run = tiny_run(tiny_store, tmp_path / "run", {"kernels": KernelsConfig(), "kernels.backend": "reference"})
    train(run)
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("train: kernels:"))
    used = tuned_break_even(MACHINE, SPEC)
    assert used is not None
    assert used.density == min(entry["density"], MOST_SPARSE)
    assert line == (
        f"train: kernels: reference (as asked for), 1 thread; layers with more than {used.density:.3g} of their "
        f"entries active are dense ({used.source})"
    )
    assert "measured by layerloom tune" in used.source


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 99, "entries": []}',
        '{"format": 1, "entries": [{"shape": {}, "density": 0.1}]}',
        '{"format": 1, "entries": [{"shape": {"family": "topk", "span": "cross_layer", "n_layers": 3, "d_model": 16, '
        '"n_features": 64}, "density": 7}]}',
    ],
)
def test_a_damaged_table_is_passed_over_in_one_line(
    content: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = table_file(MACHINE)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert tuned_break_even(MACHINE, SPEC) is None
    line = capsys.readouterr().err
    assert line.startswith(f"{file} is damaged")
    assert line.count("\n") == 1
    # Tuning again replaces it.
    save(MACHINE, SPEC, measured(0.0625))
    assert tuned_break_even(MACHINE, SPEC) == (0.0625, "measured by layerloom tune")


def test_the_table_is_of_one_machine_and_one_shape(cache: Path) -> None:
    assert tuned_break_even(MACHINE, SPEC) is None
    save(MACHINE, SPEC, measured(0.03125))
    save(MACHINE, SPEC, measured(0.0625))
    save(MACHINE, ModelSpec(n_layers=3, d_model=16, n_features=4096, k=2), measured(0.09375))
    assert tuned_break_even(MACHINE, SPEC) == (0.0625, "measured by layerloom tune")
    near = ModelSpec(n_layers=3, d_model=16, n_features=128, kind="batchtopk", k=9)
    assert tuned_break_even(MACHINE, near) == (0.0625, "measured by layerloom tune at n_features=64")
    for other in ({"kind": "relu"}, {"span": "per_layer"}, {"d_model": 17}):
        values: dict[str, Any] = {"n_layers": 3, "d_model": 16, "n_features": 64, "k": 2, **other}
        assert tuned_break_even(MACHINE, ModelSpec(**values)) is None
    for change in ({"threads": 63}, {"hardware": "another"}, {"torch": "1.0"}, {"backend": "cpu"}):
        assert tuned_break_even({**MACHINE, **change}, SPEC) is None


def test_where_the_break_even_is() -> None:
    """sparse costs 1 + 100 density against 3: equal at 0.02. Between 0.016 and 0.032 on logarithms."""
    timings = [Timing(density, 1 + 100 * density, 3.0) for density in (0.008, 0.016, 0.032)]
    assert break_even(timings) == pytest.approx(0.02, rel=0.02)
    assert break_even([Timing(0.001, 2.0, 1.0)]) == 0.001
    # Not reached, in time or at all: in proportion, and at most 1, which is never.
    assert break_even([Timing(0.1, 1.0, 4.0)]) == pytest.approx(0.4)
    assert break_even([Timing(0.5, 1.0, 4.0)]) == 1.0


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "batchtopk"])
def test_every_family_is_measured(kind: str) -> None:
    found = tune.measure(
        ModelSpec(
            n_layers=3, d_model=5, n_features=40, k=3, kind=kind, span="per_layer" if kind == "relu" else "cross_layer"
        ),
        n_tokens=30,
        kernels=REFERENCE,
        device=CPU,
        compute_dtype=torch.float32,
        seconds=0.5,
    )
    assert found.tokens == 30
    assert 0 < found.density <= 1
    assert [timing.density for timing in found.timings] == list(tune.DENSITIES[: len(found.timings)])


def test_ctrl_c_leaves_nothing(
    tiny_store: RunConfig, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> Timing:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune._Bench, "time", interrupted)
    assert main(["tune", *words_of(tiny_store)]) == 130
    assert not cache.exists()


def test_without_a_store_the_shape_must_be_given(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", f"store.path={tmp_path / 'none'}"]) == 2
    line = capsys.readouterr().err
    assert "tune.n_layers=" in line
    assert line.count("\n") == 1


def test_the_shipped_table_knows_width_and_family() -> None:
    assert mean_span(ModelSpec(n_layers=6, d_model=1, n_features=9, k=1)) == 3.5
    assert mean_span(ModelSpec(n_layers=6, d_model=1, n_features=9, k=1, span="per_layer")) == 1
    known = shipped_break_even("reference", "cpu", torch.float32, SPEC)
    assert 0 < known.density < 1
    assert "the table in the code" in known.source
    # Above a tenth the codes of all layers would take too much memory, however fast they are.
    assert limited(BreakEven(0.5, "measured")) == (MOST_SPARSE, "for memory; by time 0.5, measured")
    assert limited(BreakEven(0.05, "measured")) == (0.05, "measured")
    assert "a guess" in shipped_break_even("reference", "mps", torch.float32, SPEC).source
