"""The cases of test_triton_encode.py and test_triton_topk.py on a CUDA device without the interpreter; large layers."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels import test_triton_encode as cases
from tests.kernels import test_triton_topk as topk_cases
from tests.kernels.encode_cases import NO_FLOOR, Encoder, encoder
from trainer.kernels import batch_threshold as reference_batch
from trainer.kernels import encode_jumprelu as reference_jumprelu
from trainer.kernels import encode_topk as reference_topk
from trainer.kernels.gpu import products
from trainer.kernels.gpu.batch_threshold import encode_candidates
from trainer.kernels.gpu.encode_jumprelu import encode_jumprelu
from trainer.kernels.gpu.encode_topk import encode_topk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Its fixture, and its tests.
small_blocks = cases.small_blocks
for module in (cases, topk_cases):
    globals().update({name: value for name, value in vars(module).items() if name.startswith("test_")})

# Two blocks of tokens and a smaller third one at F = 32,768 in bfloat16, where memory allows no larger ones.
B, F, D, K = 9001, 32768, 256, 32
SMALLEST_BLOCK = 384 * 2**20


@pytest.fixture(params=["blocks of this device", "smallest blocks"])
def both_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as large as this device's memory allows, and as on a small one."""
    if request.param == "smallest blocks":
        monkeypatch.setattr(products, "block_bytes", lambda device: SMALLEST_BLOCK)


@pytest.fixture(scope="module", params=cases.PRECISIONS, ids=["fp32", "bf16", "bf16 parameters"])
def large(request: pytest.FixtureRequest) -> Encoder:
    """Sums of small integers, of which each backend must select the same entries."""
    parameters, compute = request.param
    return encoder(B, F, D, compute=compute, parameters=parameters)


@pytest.mark.usefixtures("both_blocks")
def test_large_topk(large: Encoder) -> None:
    wanted = reference_topk.encode_topk(*large.operands, K, None, large.compute)
    for _ in range(2):
        found = encode_topk(*large.operands, K, None, large.compute)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("both_blocks")
def test_large_candidates(large: Encoder) -> None:
    wanted = reference_batch.encode_candidates(*large.operands, K * B, NO_FLOOR, None, large.compute)
    for _ in range(2):
        found = encode_candidates(*large.operands, K * B, NO_FLOOR, None, large.compute)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("both_blocks")
def test_large_jumprelu(large: Encoder) -> None:
    theta_F = torch.full((F,), 90.0, device="cuda", dtype=large.bias_F.dtype)
    for bandwidth in (0.0, 1.5):
        wanted = reference_jumprelu.encode_jumprelu(*large.operands, theta_F, bandwidth, large.compute)
        found = encode_jumprelu(*large.operands, theta_F, bandwidth, large.compute)
        assert found is not None
        assert wanted is not None
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("both_blocks")
def test_peak_memory_is_that_of_a_block() -> None:
    """Whatever a device's block is; with the smallest, half of what the pre-activations of all tokens need."""
    limit = products.block_bytes(torch.device("cuda")) + 128 * 2**20
    case = encoder(4 * 4096, F, 64, compute=torch.bfloat16)
    case.pre_BF = case.pre_BF[:0]
    torch.cuda.empty_cache()
    for select in (
        lambda: encode_topk(*case.operands, K, None, case.compute),
        lambda: encode_candidates(*case.operands, K * 4096, NO_FLOOR, None, case.compute),
        lambda: encode_jumprelu(*case.operands, 60.0, 0.0, case.compute),
    ):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        select()
        assert torch.cuda.max_memory_allocated() - before < limit
