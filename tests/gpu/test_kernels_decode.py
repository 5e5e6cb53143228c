"""The cases of tests/kernels/test_triton_decode.py and test_strides.py on a CUDA device, without the interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels import test_strides as strides
from tests.kernels import test_triton_decode as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# The fixtures, one of which applies to every test, and the tests.
_short_segments = cases._short_segments
backend = strides.backend
for module in (cases, strides):
    globals().update({name: value for name, value in vars(module).items() if name.startswith("test_")})
