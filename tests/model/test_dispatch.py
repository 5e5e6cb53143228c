"""Which backend runs, why, and what a user reads when one cannot. Works with and without numba and triton."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from trainer.kernels import dispatch
from trainer.kernels.dispatch import REFERENCE, Kernels, choose, kernels
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.spec import ModelSpec

ROOT = Path(__file__).parents[2]
CPU, TRITON = (dataclasses.replace(REFERENCE, name=name) for name in ("cpu", "triton"))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets what imports: `installed(cpu=True, triton=False)`; the choices of other tests are put back."""

    def set_up(*, cpu: bool, triton: bool) -> None:
        there = {"cpu": CPU if cpu else None, "triton": TRITON if triton else None}
        loaders = {name: partial(load, name, backend) for name, backend in there.items()}
        monkeypatch.setattr(dispatch, "_COMPILED", loaders)
        dispatch._choose.cache_clear()

    def load(name: str, there: Kernels | None) -> Kernels:
        if there is None:
            raise ImportError(f"no module\nof {name}")
        return there

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._choose.cache_clear()
    yield set_up
    dispatch._choose.cache_clear()


@pytest.mark.parametrize(
    ("device", "dtype", "name", "reason"),
    [
        ("cpu", torch.float32, "cpu", "auto: float32 on a CPU"),
        ("cpu", torch.float64, "reference", "auto: the compiled kernels of a CPU take float32, not float64"),
        ("cuda", torch.float32, "triton", "auto: float32 on CUDA"),
        ("cuda:1", torch.float32, "triton", "auto: float32 on CUDA"),
        ("mps", torch.float32, "reference", "auto: no compiled kernels for device mps"),
    ],
)
def test_the_rule(device: str, dtype: torch.dtype, name: str, reason: str, installed: Callable[..., None]) -> None:
    installed(cpu=True, triton=True)
    choice = choose("auto", device, dtype)
    assert (choice.kernels.name, choice.reason) == (name, reason)
    assert choose("reference", device, dtype).kernels is REFERENCE


@pytest.mark.parametrize(("device", "package"), [("cpu", "numba"), ("cuda", "triton")])
def test_auto_goes_without_what_does_not_import(device: str, package: str, installed: Callable[..., None]) -> None:
    installed(cpu=False, triton=False)
    choice = choose("auto", device)
    backend = {"numba": "cpu"}.get(package, package)
    assert choice.kernels is REFERENCE
    assert choice.reason == f"auto: {package} does not import (no module of {backend})"
    with pytest.raises(
        ValueError, match=rf"kernels\.backend={backend} needs {package}, .*pip install {package}, or use"
    ):
        kernels(backend, device)


@pytest.mark.parametrize(("backend", "device", "own"), [("cpu", "cuda", "cpu"), ("triton", "cpu", "cuda")])
def test_a_backend_on_another_device_is_refused(
    backend: str, device: str, own: str, installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(cpu=True, triton=True)
    with pytest.raises(ValueError, match=rf"={backend} runs on device={own}, not on {device}; use .*=auto, or device="):
        kernels(backend, device)
    # The interpreter runs Triton's kernels anywhere.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels("triton", "cpu") is TRITON


def test_an_unknown_backend_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"kernels\.backend=fpga is unknown; use one of auto, reference, cpu, triton"):
        kernels("fpga")
    with pytest.raises(ValueError, match=r"kernels\.backend=fpga is unknown"):
        CrossLayerTranscoder(ModelSpec(n_layers=1, d_model=2, n_features=3, k=1), backend="fpga")


def test_a_model_takes_the_backend_of_where_it_lies(installed: Callable[..., None]) -> None:
    installed(cpu=True, triton=True)
    model = CrossLayerTranscoder(ModelSpec(n_layers=1, d_model=2, n_features=3, k=1))
    assert model.kernels is CPU
    assert model.double().kernels is REFERENCE
    assert model.float().to("meta").kernels is REFERENCE
    # Made on the CPU, to be moved to a GPU: refused only where it would run.
    moving = CrossLayerTranscoder(model.spec, backend="triton")
    with pytest.raises(ValueError, match="runs on device=cuda"):
        _ = moving.kernels


def test_compiled_backends_are_imported_only_when_chosen() -> None:
    code = (
        "import sys; from trainer.loss import compute_loss; from trainer.kernels.dispatch import kernels; "
        "kernels('reference'); kernels('auto', 'mps'); "
        "sys.exit(str({'numba', 'triton'} & set(sys.modules)) if {'numba', 'triton'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
