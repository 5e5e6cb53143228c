"""No [B, L, F] tensor in a step, at most two [B, F] buffers on the dense path, and two runs equal bit for bit."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.model.cases import all_losses, available_backends, context, kill, make_model
from tests.model.peak_memory import ALL_LAYERS_BYTES, CASES, LIMITS
from trainer.config import KernelsConfig
from trainer.loss import compute_loss
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.functions import squared_error

# Parameters are small beside B * L * F here, so that whatever reaches it depends on tokens, layers and features.
SHAPE: dict[str, Any] = {"n_layers": 4, "d_model": 6, "n_features": 512, "n_tokens": 96, "dtype": torch.float32}
KINDS = ["relu", "jumprelu", "topk", "batchtopk"]


class Watch(TorchDispatchMode):
    """Largest tensor that any operation returned, and the most memory that large ones held together."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large, self.biggest, self.peak_bytes = large, 0, 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_sparse:
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        self.biggest = max(self.biggest, tensor.numel())
        if tensor.numel() < self.large:
            return
        storage = tensor.untyped_storage()
        self._alive[storage.data_ptr()] = (weakref.ref(storage), storage.nbytes())
        self._alive = {key: value for key, value in self._alive.items() if value[0]() is not None}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone sets a process's peak memory back")
@pytest.mark.parametrize("backend", available_backends())
def test_a_step_never_holds_all_layers(backend: str) -> None:
    """Every activation in a process of the backend's: parameters, moments and kept gradients are there before. With a
    mask of all layers beside it, which is a quarter of the pre-activations, every case breaks its limit."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.peak_memory", backend],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert list(peaks) == list(CASES) == list(LIMITS)
    shares = {case: [peak / ALL_LAYERS_BYTES for peak in both] for case, both in peaks.items()}
    assert shares["relu sparse"][0] > 0.3, "the measurement sees what is there"
    assert {case: both for case, both in shares.items() if not both[0] < LIMITS[case] < both[1]} == {}


def one_step(model: CrossLayerTranscoder, x: Tensor, y: Tensor, kernels: KernelsConfig) -> Tensor:
    config, _ = all_losses(model)
    output = compute_loss(model, x, y, context(model), activation=config, kernels=kernels)
    output.total.backward()
    model.record_step(output.fired, x.shape[0], output.batch_threshold_L)
    return output.total.detach()


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("scope", ["layer", "all_layers"])
@pytest.mark.parametrize("score", ["activation", "decoder_norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_tokens_by_layers_by_features(kind: str, score: str, scope: str, backend: str) -> None:
    """Every loss on; with initial pre-activations half positive, relu and jumprelu go dense by themselves."""
    model, x, y = make_model(kind=kind, score=score, scope=scope, **SHAPE)
    model.backend = backend
    kill(model)
    model.running_threshold_L.fill_(0.5)
    with Watch(1) as watch:
        one_step(model, x, y, KernelsConfig())
    assert watch.biggest >= x.shape[0] * model.spec.n_features, "the watch sees the pre-activations of a layer"
    assert watch.biggest < x.shape[0] * model.spec.n_layers * model.spec.n_features


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_path_holds_at_most_two_layer_buffers(kind: str) -> None:
    """Bytes alive in tensors of a quarter of [B, F] and more, AuxK and penalties included; the widest of y and the
    decoder is far smaller than a block here."""
    shape = {**SHAPE, "n_features": 2048, "n_layers": 2, "d_model": 4, "n_tokens": 192}
    model, x, y = make_model(kind=kind, **shape)
    # The path is the same on every backend; another backend holds other things while it chooses it.
    model.backend = "reference"
    config, _ = all_losses(model)
    with Watch(192 * 2048 // 8) as watch:
        output = compute_loss(
            model, x, y, context(model), activation=config, kernels=KernelsConfig(dense_above_density=0.0)
        )
        forward_peak = watch.peak_bytes
        watch.peak_bytes = 0
        output.total.backward()
    buffer_bytes = 192 * 2048 * 4
    # Choosing the path reads one layer's pre-activations and a mask; the difference to theta is a passing third.
    assert 0 < forward_peak <= 2.5 * buffer_bytes
    assert 0 < watch.peak_bytes <= 2 * buffer_bytes


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("dense_above", [0.0, 1.0])
@pytest.mark.parametrize("scope", ["layer", "all_layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_are_equal_bit_for_bit(kind: str, scope: str, dense_above: float, backend: str) -> None:
    """Five Adam steps in fp32; wide rows (span * d > 1024) so that the sparse product runs too."""
    weights = []
    for _ in range(2):
        model, x, y = make_model(
            kind=kind, scope=scope, n_layers=3, d_model=400, n_features=200, n_tokens=64, dtype=torch.float32
        )
        model.backend = backend
        kill(model)
        model.gradient_buffers.enabled = True
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(5):
            optimizer.zero_grad(set_to_none=True)
            one_step(model, x, y, KernelsConfig(dense_above_density=dense_above))
            optimizer.step()
        weights.append(model.state_dict())
    for name, first in weights[0].items():
        assert torch.equal(first.nan_to_num(), weights[1][name].nan_to_num()), name


@pytest.mark.parametrize("dense_above", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_is_close_and_keeps_fp32(kind: str, dense_above: float) -> None:
    """Products in bf16 move the loss by about a bf16 rounding; parameters, gradients and loss stay fp32."""
    totals = {}
    for enabled in (False, True):
        model, x, y = make_model(kind=kind, n_layers=3, d_model=24, n_features=200, n_tokens=64, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            config, _ = all_losses(model)
            kernels = KernelsConfig(dense_above_density=dense_above)
            output = compute_loss(model, x, y, context(model), activation=config, kernels=kernels)
        output.total.backward()
        totals[enabled] = output.total.detach()
        assert output.total.dtype == torch.float32
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert float(totals[True]) == pytest.approx(float(totals[False]), rel=0.02)
    assert float(totals[True]) != float(totals[False])


def test_the_squared_error_of_many_tokens_is_exact_to_float32() -> None:
    """float64 as reference; a single float32 reduction over tokens and d was off by 2e-4 at this size."""
    g = torch.Generator().manual_seed(0)
    y_hat, y = (torch.randn(1024, 2, 576, generator=g) for _ in range(2))
    squares, _ = squared_error(y_hat, y)
    expected = (y_hat.double() - y.double()).square().sum(dim=(0, 2))
    torch.testing.assert_close(squares.double(), expected, rtol=2e-6, atol=0)
