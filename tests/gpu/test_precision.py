"""Precisions of the optimizer on a CUDA device: the CPU's random bits, and its updates up to rounding.

Needs torch and pytest only.
"""

import pytest
import torch
from torch import Tensor, nn

from trainer.config import Master, OptimConfig, ParamDtype, StateDtype
from trainer.optimizer import NamedAdam
from trainer.stochastic_rounding import bits_key, random_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NO_MASTER = {"param_dtype": ParamDtype.bf16, "master": Master.none}
PRECISIONS = {
    "bf16 states": OptimConfig(state_dtype=StateDtype.bf16),
    "8-bit states": OptimConfig(state_dtype=StateDtype.int8),
    "bf16 with master": OptimConfig(param_dtype=ParamDtype.bf16),
    "all bf16": OptimConfig(state_dtype=StateDtype.bf16, **NO_MASTER),  # type: ignore[arg-type]
    "bf16 and 8 bit": OptimConfig(state_dtype=StateDtype.int8, **NO_MASTER),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("start", [0, 2**31 - 7, 2**40 + 3])
def test_the_random_bits_are_those_of_the_cpu(start: int) -> None:
    key = bits_key(7, 3, "layers.0.W_enc")
    cpu, cuda = (random_bits(key, start, 100_003, torch.device(device)).cpu() for device in ("cpu", "cuda"))
    assert torch.equal(cpu, cuda)


def _train(config: OptimConfig, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"W_enc": (60, 577), "W_dec": (60, 3, 576), "b_enc": (60,)}
    start = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    parameters = {name: nn.Parameter(value.clone().to(device)) for name, value in start.items()}
    adam = NamedAdam(parameters, config, seed=3)
    for _ in range(20):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        adam.step(0.01, divide_gradients_by=3.0)
    with adam.master_weights():
        return {name: parameter.detach().float().cpu() - start[name] for name, parameter in parameters.items()}


@pytest.mark.parametrize("name", PRECISIONS)
def test_updates_are_those_of_the_cpu(name: str) -> None:
    cpu, cuda = (_train(PRECISIONS[name], device) for device in ("cpu", "cuda"))
    for key, way in cpu.items():
        # The same random bits: only where a sum's last bit decides about a rounding do the two part, by a spacing.
        assert float((cuda[key] - way).norm() / way.norm()) < 0.01, key


@pytest.mark.parametrize("name", PRECISIONS)
def test_two_runs_are_equal_bit_for_bit(name: str) -> None:
    first, second = (_train(PRECISIONS[name], "cuda") for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
