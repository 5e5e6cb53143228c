"""Sums of rows, compiled and by torch, against numpy in float64."""

import errno
import os
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activation_store import compiling, statistics, sums_compiled

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@settings(deadline=None, max_examples=100)
@given(
    dtype=st.sampled_from(DTYPES), layers=st.integers(1, 3), rows=st.integers(1, 9), width=st.integers(1, 70),
    rows_first=st.booleans(), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_sums_and_norms_are_numpys(
    dtype: torch.dtype, layers: int, rows: int, width: int, rows_first: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = (rows, layers, width) if rows_first else (layers, rows, width)
    x = torch.from_numpy(rng.normal(size=shape) * 10.0 ** rng.integers(-3, 4, shape)).to(dtype)
    x_LND = x.transpose(0, 1) if rows_first else x
    weight_N = torch.from_numpy((rng.random(rows) < 0.7).astype(np.float64))
    before = rng.normal(size=(2, layers, width))
    wide = x_LND.double().numpy()
    weight = weight_N.numpy()[None, :, None]
    wanted = before + np.stack([(weight * wide).sum(1), (weight * wide**2).sum(1)])
    magnitude = np.abs(before) + np.stack([np.abs(wide).sum(1), (wide**2).sum(1)])
    for way in (lambda dtype: sums_compiled, lambda dtype: None):
        sums = torch.from_numpy(before.copy())
        with patch.object(statistics, "compiled_sums", way):
            norms_NL = statistics.sum_chunk(x_LND, weight_N, (sums[0], sums[1]))
        assert (np.abs(sums.numpy() - wanted) <= 1e-14 * magnitude).all()
        np.testing.assert_allclose(norms_NL.numpy(), np.sqrt((wide**2).sum(2)).T, rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_so(dtype: torch.dtype) -> None:
    x_LND = torch.zeros(1, 3, 20, dtype=dtype)
    x_LND[0, 0, 3], x_LND[0, 1, 17], x_LND[0, 2, 19] = torch.inf, torch.nan, 2.0
    sums = torch.zeros(2, 1, 20, dtype=torch.float64)
    assert statistics.compiled_sums(dtype) is sums_compiled
    norms_NL = statistics.sum_chunk(x_LND, torch.ones(3, dtype=torch.float64), (sums[0], sums[1]))
    assert norms_NL[0] == torch.inf
    assert norms_NL[1].isnan()
    assert norms_NL[2] == 2.0
    assert sums[:, 0, 3].tolist() == [torch.inf, torch.inf]
    assert sums[:, 0, 17].isnan().all()
    assert sums[:, 0, [3, 17]].isfinite().logical_not().all()
    assert sums[1, 0, 19] == 4.0


def test_what_cannot_be_compiled_is_left_to_torch() -> None:
    ask = statistics.compiled_sums.__wrapped__
    assert ask(torch.float64) is None
    with patch.object(compiling, "widens_half", lambda: False):
        assert all(ask(dtype) is None for dtype in DTYPES)
    package = sys.modules["activation_store"]
    with patch.dict(sys.modules, {"activation_store.sums_compiled": None}), patch.dict(package.__dict__):
        del package.__dict__["sums_compiled"]
        assert ask(torch.float32) is None


def test_a_processor_without_conversion_of_half_is_left_to_torch() -> None:
    """LLVM would end the process where it cannot find a function that converts."""
    code = (
        "import torch; from activation_store import scatter, statistics; "
        "print(statistics.compiled_sums(torch.float32), scatter.compiled(None))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NUMBA_CPU_NAME": "generic"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.split() == ["None", "None"], run.stderr


def test_a_full_disk_of_the_cache_stops_nothing() -> None:
    real = compiling.numba.cfunc

    def cfunc(*arguments: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    with patch.object(compiling.numba, "cfunc", cfunc):
        add = compiling.native(sums_compiled._sum)
    block = np.zeros(sums_compiled.BLOCK, dtype=np.int64)
    assert add(block.ctypes.data) == 0
