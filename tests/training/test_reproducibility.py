"""The mode in which training runs on CUDA: its switches are torch's, and are there without a device."""

import os

import pytest
import torch

from trainer.reproducibility import deterministic


def switches() -> tuple[bool, bool, bool, bool]:
    """As the mode sets them: True, True, False, False."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    )


def test_the_mode_of_cuda_and_what_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic kernels, sums of bf16 products in float32, and no buffer filled for nothing; afterwards all as it
    was, also where the run fails."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = switches()
    seen = []

    def run() -> None:
        with deterministic(torch.device("cuda")):
            seen.append(switches())
            raise RuntimeError("the run fails")

    with pytest.raises(RuntimeError, match="the run fails"):
        run()
    assert seen == [(True, True, False, False)]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert switches() == before != seen[0]


def test_a_cpu_is_left_alone() -> None:
    before = switches()
    with deterministic(torch.device("cpu")):
        assert switches() == before
