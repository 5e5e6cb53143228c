"""The benchmarks as programs, at tiny sizes: what they print and write."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import checkpoints, jumprelu_bandwidth, kernel_times, kernels, scaling, step
from tests.store.making import manifest, random_rows, write_store
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.spec import ModelSpec


def run(module: object, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])  # type: ignore[attr-defined]
    module.main()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 random rows of 3 layers of width 5, and 24 held out."""
    folder, begun = tmp_path_factory.mktemp("bench") / "store", manifest()
    write_store(folder, begun, [random_rows(96, begun, 0)])
    write_store(folder / "held_out", manifest(), [random_rows(24, begun, 1)])
    return folder


def test_step_with_memory_in_its_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "step.md"
    words = ["--shape", "2,64,512,64,4", "--pairs", "1", "--modes", "reference", "--parts", "modes", "memory"]
    run(step, monkeypatch, *words, "--device", "cpu", "--write", str(page))
    text = page.read_text()
    assert f"python -m benchmarks.step {' '.join(words)} --device cpu\n" in text
    reference = next(line for line in text.splitlines() if line.startswith("| reference |"))
    # Parameters, moments and gradients at least; less than ten times that.
    assert 1.0 < float(reference.split("|")[-2]) < 20


def test_step_on_rows_of_a_store(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    words = ["--shape", "0,0,64,32,4", "--pairs", "1", "--modes", "reference", "--parts", "modes", "breakdown"]
    run(step, monkeypatch, *words, "--device", "cpu", "--data", str(store))
    text = capsys.readouterr().out
    assert "## L = 3, d = 5, F = 64, B = 32, K = 4" in text
    assert "| decode |" in text


def test_kernels_of_an_odd_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "kernels.md"
    words = ["--shape", "41,10,127,30,7", "--backends", "reference", "--device", "cpu"]
    run(kernels, monkeypatch, *words, "--write", str(page))
    assert "## B = 41, D = 10, F = 127, C = 30, K = 7; fp32" in page.read_text()


def test_scaling_writes_a_table_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, picture = tmp_path / "scaling.md", tmp_path / "images" / "scaling.png"
    words = ["--shape", "2,8,64,32,4", "--features", "32", "64", "--ks", "2", "4", "8", "--rounds", "1"]
    words += ["--modes", "reference", "--device", "cpu"]
    run(scaling, monkeypatch, *words, "--write", str(page), "--plot", str(picture))
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 * 2 + 2 + 3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bandwidth_trains_every_eps(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "bandwidth.md"
    words = [str(store), "--eps", "1", "0.1", "--layers", "2", "--n-features", "32", "--k", "4", "--tokens", "64"]
    run(jumprelu_bandwidth, monkeypatch, *words, "--batch", "16", "--device", "cpu", "--write", str(page))
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith(("| 1 |", "| 0.1 |"))]
    assert len(rows) == 2
    wide, narrow = (float(row[1].split("%")[0]) for row in rows)
    assert wide > narrow


def test_thresholds_are_shifted_to_the_l0_that_is_asked_for() -> None:
    model = CrossLayerTranscoder(ModelSpec(n_layers=2, d_model=12, n_features=64, kind="jumprelu"), seed=0)
    x_BLD = torch.randn(200, 2, 12, generator=torch.Generator().manual_seed(0))
    for target in (3.0, 20.0):
        jumprelu_bandwidth.match_l0(model, x_BLD, target)
        l0 = sum(float(codes.l0()) for codes in model.encode(x_BLD, rule="inference").layers)
        assert l0 == pytest.approx(target, abs=0.02)


def test_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "checkpoints.md"
    words = ["--shape", "2,32,64,16,4", "--every", "2", "--rounds", "1", "--folder", str(tmp_path / "here")]
    run(checkpoints, monkeypatch, *words, "--write", str(page))
    lines = page.read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:] == [
        "---",
        "none",
        "while training waits",
        "in the background",
    ]
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["step_00000002"]


def test_kernel_times_of_a_trace() -> None:
    """Kernels that follow one another with a gap, two at once, and what is none of the device's."""
    spans = [("a", 10.0, 5.0), ("b", 20.0, 10.0), ("a", 22.0, 3.0), ("c", 31.0, 1.0)]
    events = [{"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": dur} for name, start, dur in spans]
    others = [
        {"ph": "X", "cat": "cpu_op", "name": "host", "ts": 0.0, "dur": 99.0},
        {"ph": "s", "cat": "kernel", "name": "arrow", "ts": 0.0},
    ]
    found = kernel_times.read_trace({"traceEvents": [*others, *reversed(events)]})
    assert found == kernel_times.Profile({"b": (10.0, 1), "a": (8.0, 2), "c": (1.0, 1)}, span=22.0, idle=6.0)
    assert list(found.kernels) == ["b", "a", "c"]
    assert "| `a` | 0.01 | 2 |" in kernel_times.profile_table(found)
    with pytest.raises(SystemExit, match="saw no kernel"):
        kernel_times.read_trace({"traceEvents": others})


def test_kernel_times_wants_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="wants a CUDA device"):
        run(kernel_times, monkeypatch, "--device", "cpu")
