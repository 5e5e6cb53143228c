"""Adam's update of a whole table from its gradient, in Triton: one pass, 16 bytes a value read and 12 written.

torch's fused Adam writes the gradient back too where it divides it, as clipping asks. Needs float32 throughout.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.fused_adam_rows import AdamHyper
from trainer.kernels.gpu.compile import CompileCase
from trainer.kernels.gpu.fused_adam_rows import constants, moved
from trainer.kernels.gpu.launch import blocks, run

# 8 values a thread: two loads of 16 bytes of each operand.
_BLOCK, _WARPS = 1024, 4


def dense_adam(
    parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, hyper: AdamHyper, divisor: float
) -> None:
    """Update in place with gradient / divisor. All float32, contiguous, of one shape."""
    for tensor in (parameter, exp_avg, exp_avg_sq, gradient):
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert tensor.shape == parameter.shape
    n = parameter.numel()
    run(
        _dense_adam,
        (blocks(n, _BLOCK),),
        parameter,
        parameter,
        exp_avg,
        exp_avg_sq,
        gradient,
        n,
        divisor,
        *constants(hyper),
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


@triton.jit
def _dense_adam(
    parameters, exp_avgs, exp_avg_sqs, gradients, n, divisor,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK values."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < n
    gradient = tl.load(gradients + places, mask=inside, other=0.0, eviction_policy="evict_first") / divisor
    first = tl.load(exp_avgs + places, mask=inside, other=0.0, eviction_policy="evict_first")
    second = tl.load(exp_avg_sqs + places, mask=inside, other=0.0, eviction_policy="evict_first")
    parameter = tl.load(parameters + places, mask=inside, other=0.0, eviction_policy="evict_first")
    parameter, first, second = moved(
        parameter, first, second, gradient,
        beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction2,
    )  # fmt: skip
    tl.store(exp_avgs + places, first, mask=inside, eviction_policy="evict_first")
    tl.store(exp_avg_sqs + places, second, mask=inside, eviction_policy="evict_first")
    tl.store(parameters + places, parameter, mask=inside, eviction_policy="evict_first")


_OPERANDS = dict.fromkeys(("parameters", "exp_avgs", "exp_avg_sqs", "gradients"), "*fp32")
_NUMBERS = ("divisor", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "step_size", "root_correction2")

COMPILE_CASES = [
    CompileCase(
        name="dense Adam",
        kernel=_dense_adam,
        signature=_OPERANDS | {"n": "i32:16"} | dict.fromkeys(_NUMBERS, "fp32"),
        constexprs={"BLOCK": _BLOCK},
        num_warps=_WARPS,
    )
]
