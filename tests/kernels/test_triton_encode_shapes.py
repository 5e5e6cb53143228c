"""The Triton kernels of the encode side over drawn shapes, small blocks and searches beyond registers included."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.encode_cases import F32, NO_FLOOR, assert_candidates, assert_selection, assert_topk, encoder, norms

pytest.importorskip("triton")

from tests.kernels.test_triton_encode import small_blocks
from trainer.kernels.gpu.batch_threshold import encode_candidates
from trainer.kernels.gpu.encode_jumprelu import encode_jumprelu
from trainer.kernels.gpu.encode_topk import encode_topk

__all__ = ["small_blocks"]
pytestmark = pytest.mark.usefixtures("small_blocks")

PROFILE = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOKENS, FEATURES, SEEDS = st.integers(1, 5), st.integers(1, 150), st.integers(0, 10**6)


@PROFILE
@given(TOKENS, FEATURES, st.integers(1, 160), SEEDS, st.booleans())
def test_topk(b: int, f: int, k: int, seed: int, by_norm: bool) -> None:
    case, norm_F = encoder(b, f, seed=seed), norms(f) if by_norm else None
    assert_topk(encode_topk(*case.operands, k, norm_F, F32), case, k, norm_F)


@PROFILE
@given(TOKENS, FEATURES, st.integers(0, 800), SEEDS, st.booleans())
def test_candidates(b: int, f: int, n: int, seed: int, by_norm: bool) -> None:
    case, norm_F = encoder(b, f, seed=seed), norms(f) if by_norm else None
    assert_candidates(encode_candidates(*case.operands, n, NO_FLOOR, norm_F, F32), case, n, norm_F)


@PROFILE
@given(TOKENS, FEATURES, st.sampled_from([0.0, 0.5, 7.0]), st.sampled_from([0.0, 1.0, 12.0]), SEEDS)
def test_jumprelu(b: int, f: int, theta: float, bandwidth: float, seed: int) -> None:
    case = encoder(b, f, seed=seed)
    found = encode_jumprelu(*case.operands, theta, bandwidth, F32)
    assert found is not None
    kept = case.pre_BF - theta > -bandwidth / 2
    assert_selection(found, case, [row.nonzero()[:, 0].tolist() for row in kept])
