"""The Triton kernels. Imported only when the backend `triton` is chosen."""

import os

# Sums here want fused multiply-adds; since 3.9 Triton warns unless that is said.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
