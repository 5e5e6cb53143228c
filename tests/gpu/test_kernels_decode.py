"""The cases of tests/kernels/test_triton_decode.py, test_triton_adam.py and test_strides.py on a CUDA device."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels import test_strides as strides
from tests.kernels import test_triton_adam as adam
from tests.kernels import test_triton_decode as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# The fixtures, one of which applies to every test, and the tests.
_short_segments = cases._short_segments
backend = strides.backend
for module in (cases, strides, adam):
    globals().update({name: value for name, value in vars(module).items() if name.startswith("test_")})
