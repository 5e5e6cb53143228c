"""Import before any Triton kernel: on a machine without CUDA the kernels then run in Triton's interpreter."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Read when triton, and when a kernel, is imported.
    os.environ["TRITON_INTERPRET"] = "1"
