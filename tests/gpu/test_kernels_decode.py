"""The cases of tests/kernels/test_triton_decode.py on a CUDA device, without the interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels import test_triton_decode as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Its fixture that applies to every test, and its tests.
_short_segments = cases._short_segments
globals().update({name: value for name, value in vars(cases).items() if name.startswith("test_")})
