"""Folding against the scaled equations themselves, in float64 on odd sizes."""

import pytest
import torch
from torch import Tensor

from trainer.publish.fold import (
    Scaling,
    fold_decoder,
    fold_encoder,
    fold_output_bias,
    fold_skip,
)

B, F, S, D = 11, 7, 3, 5


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _random(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def _scaling(rng: torch.Generator, mean: float = 4.0) -> Scaling:
    return Scaling(mean * _random(rng, D), torch.rand(D, generator=rng, dtype=torch.float64) + 0.1)


def test_encoder_reads_raw_activations(rng: torch.Generator) -> None:
    W_FD, b_F, inputs, x_BD = _random(rng, F, D), _random(rng, F), _scaling(rng), _random(rng, B, D)
    folded_W, folded_b = fold_encoder(W_FD, b_F, inputs, torch.float64)
    scaled_BD = (x_BD - inputs.shift_D) * inputs.scale_D
    expected_BF = torch.einsum("bd,fd->bf", scaled_BD, W_FD) + b_F
    torch.testing.assert_close(x_BD @ folded_W.T + folded_b.double(), expected_BF, rtol=0, atol=3e-6)


def test_decoder_bias_and_skip_write_raw_outputs(rng: torch.Generator) -> None:
    W_FSD, b_D, skip_DD = _random(rng, F, S, D), _random(rng, D), _random(rng, D, D)
    a_BF, x_BD, inputs, targets = _random(rng, B, F).relu(), _random(rng, B, D), _scaling(rng), _scaling(rng)
    later = [_scaling(rng) for _ in range(S - 1)]
    scale_SD = torch.stack([targets.scale_D, *(scaling.scale_D for scaling in later)])
    folded_W = fold_decoder(W_FSD, scale_SD, torch.float64)
    folded_skip = fold_skip(skip_DD, inputs, targets, torch.float64)
    folded_b = fold_output_bias(b_D, targets, folded_skip, inputs).double()

    scaled_BD = (x_BD - inputs.shift_D) * inputs.scale_D
    own_BD = a_BF @ W_FSD[:, 0] + b_D + torch.einsum("od,bd->bo", skip_DD, scaled_BD)
    expected_BD = own_BD / targets.scale_D + targets.shift_D
    published_BD = a_BF @ folded_W[:, 0] + folded_b + x_BD @ folded_skip.T
    torch.testing.assert_close(published_BD, expected_BD, rtol=1e-6, atol=1e-5)
    for j, scaling in enumerate(later, start=1):
        torch.testing.assert_close(a_BF @ folded_W[:, j], a_BF @ W_FSD[:, j] / scaling.scale_D)


def test_biases_are_computed_from_the_rounded_matrices(rng: torch.Generator) -> None:
    """At the mean of the inputs a bfloat16 encoder is exact, however large the mean is."""
    W_FD, b_F = _random(rng, F, D), _random(rng, F)
    inputs = _scaling(rng, mean=1000.0)
    folded_W, folded_b = fold_encoder(W_FD, b_F, inputs, torch.bfloat16)
    assert folded_W.dtype == torch.bfloat16
    assert folded_b.dtype == torch.float32
    at_mean_F = folded_W.double() @ inputs.shift_D + folded_b.double()
    torch.testing.assert_close(at_mean_F, b_F, rtol=0, atol=1e-3)  # float32 bias of size 1e3..1e4
    naive_b = (b_F - (W_FD * inputs.scale_D) @ inputs.shift_D).float()
    assert (folded_W.double() @ inputs.shift_D + naive_b.double() - b_F).abs().max() > 0.1
