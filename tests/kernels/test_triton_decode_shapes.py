"""Drawn shapes for the Triton kernels of the decoder; apart, for a GPU machine has no hypothesis."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.sparse_cases import assert_near, sparse, truth

pytest.importorskip("triton")

from tests.kernels.test_triton_decode import F32, NEAR, _short_segments, decoded, gradients

__all__ = ["_short_segments"]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 20), st.integers(4, 40), st.integers(1, 300), st.integers(1, 9), st.booleans(), st.integers(0, 999)
)
def test_decode_and_backward_over_shapes(b: int, f: int, c: int, k: int, hot: bool, seed: int) -> None:
    """Empty tokens, features without entries, and one that all others activate, with as many entries as tokens."""
    case = sparse(b, f, c, min(k, f - 2), seed=seed, hot=hot)
    wanted = truth(case)
    assert_near(decoded(case, F32), wanted.y_BC, NEAR)
    out = torch.full_like(case.rows_FC, torch.nan)
    dots = gradients(case, F32, out_FC=out)
    assert dots is not None
    assert_near(dots, wanted.values_N, NEAR)
    assert_near(out, wanted.rows_FC, NEAR)
