"""Triton's Adam of whole tables against torch's in float64, alone and in the optimizer; without CUDA interpreted."""

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.sparse_cases import DEVICE, assert_near

pytest.importorskip("triton")

from benchmarks.steps import MODES, Shape, build_step, random_batch
from trainer.config import OptimConfig
from trainer.kernels.fused_adam_rows import AdamHyper
from trainer.kernels.gpu.dense_adam import dense_adam
from trainer.optimizer import NamedAdam

# Of several programs' size, the last one not full; of one value; of whole programs.
SIZES = [(7, 311), (1,), (2, 1024)]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_torch_adam_over_50_steps(size: tuple[int, ...]) -> None:
    """Gradients divided by another number at every step, and of zeros at every fifth."""
    table = draw(*size, seed=0)
    first, second = torch.zeros_like(table), torch.zeros_like(table)
    parameter = table.double().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=3e-3, betas=(0.9, 0.999), eps=1e-8)
    for step in range(1, 51):
        gradient, divisor = draw(*size, seed=step) * (step % 5 > 0), 1.0 + step % 3
        parameter.grad = gradient.double() / divisor
        optimizer.step()
        kept = gradient.clone()
        hyper = AdamHyper(3e-3, 0.9, 0.999, 1e-8, 1 - 0.9**step, 1 - 0.999**step)
        dense_adam(table, first, second, gradient, hyper, divisor)
        assert torch.equal(gradient, kept)
    state = optimizer.state[parameter]
    assert_near(table, parameter.detach(), 1e-5)
    assert_near(first, state["exp_avg"], 1e-5)
    assert_near(second, state["exp_avg_sq"], 1e-5)


def test_two_runs_are_equal_bit_for_bit_and_nothing_beyond_is_written() -> None:
    results = []
    for _ in range(2):
        whole = torch.full((3, 2000), 7.0, device=DEVICE)
        table = whole.view(-1)[:1999].copy_(draw(1999, seed=1))
        moments = draw(1999, seed=2), draw(1999, seed=3).square()
        dense_adam(table, *moments, draw(1999, seed=4), AdamHyper(0.1, 0.8, 0.9, 1e-6, 0.2, 0.1), 3.0)
        assert bool((whole.view(-1)[1999:] == 7).all())
        results.append((table, *moments))
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


@pytest.mark.parametrize("divisor", [1.0, 2.5])
def test_the_optimizer_updates_tables_by_it_and_all_else_by_torch(divisor: float) -> None:
    """From its first step, from a state put into it, and for a table without a gradient at one step."""
    shapes = {"layers.0.W_enc": (5, 7), "layers.0.W_dec": (5, 2, 7), "layers.0.b_enc": (5,)}
    start = {name: draw(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    calls: list[int] = []

    def counted(parameter: Tensor, *rest: Tensor | AdamHyper | float) -> None:
        calls.append(parameter.numel())
        dense_adam(parameter, *rest)  # type: ignore[arg-type]

    def optimizer(kernel: object) -> NamedAdam:
        parameters = {name: nn.Parameter(value.clone()) for name, value in start.items()}
        return NamedAdam(parameters, OptimConfig(lr=0.1), dense_adam=kernel)  # type: ignore[arg-type]

    def step(adam: NamedAdam, n: int) -> None:
        for seed, (name, parameter) in enumerate(adam.parameters.items()):
            if n != 2 or name != "layers.0.W_dec":
                parameter.grad = draw(*parameter.shape, seed=100 * n + seed)
        adam.step(0.05, divide_gradients_by=divisor)
        adam.zero_grad()

    ours, torchs, later = optimizer(counted), optimizer(None), optimizer(counted)
    for n in range(4):
        step(ours, n)
        step(torchs, n)
    # At the third step one table has no gradient: zeros, as everywhere.
    assert calls == [35, 70] * 4
    for name, tensor in later.tensors().items():
        tensor.copy_(ours.tensors()[name])
    for name, parameter in later.parameters.items():
        parameter.data.copy_(ours.parameters[name])
    for adam in (ours, torchs, later):
        step(adam, 9)
    for name, wanted in torchs.parameters.items():
        torch.testing.assert_close(ours.parameters[name], wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(later.parameters[name], ours.parameters[name])
    for name, wanted in torchs.tensors().items():
        torch.testing.assert_close(ours.tensors()[name], wanted, rtol=1e-5, atol=1e-6)


def test_a_training_step_on_triton_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every layer both tables; a fused update leaves it nothing."""
    sizes: list[int] = []

    def counted(parameter: Tensor, *rest: Tensor | AdamHyper | float) -> None:
        sizes.append(parameter.numel())
        dense_adam(parameter, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("trainer.kernels.gpu.dense_adam.dense_adam", counted)
    # Half a percent active: sparse on any device.
    shape = Shape(2, 8, 200, 6, 1)
    batch = random_batch(shape, torch.device(DEVICE))
    build_step(MODES["triton"], shape, batch)()
    assert sizes == [200 * 8, 200 * 2 * 8, 200 * 8, 200 * 8]
    build_step(MODES["triton fused"], shape, batch)()
    assert len(sizes) == 4
