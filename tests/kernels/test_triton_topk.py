"""encode_topk in Triton against brute force in float64, to the bit, and what its lists hold.

Without CUDA it runs in Triton's interpreter; tests/gpu runs the same functions on a device.
"""

from dataclasses import replace

import pytest
import torch

from tests.kernels import test_triton_encode as others
from tests.kernels.encode_cases import BF16, F32, assert_topk, encoder, norms, of_table
from tests.kernels.sparse_cases import DEVICE

pytest.importorskip("triton")

from trainer.kernels import encode_topk as reference_topk
from trainer.kernels.gpu import best_of_token, groups, products
from trainer.kernels.gpu.encode_topk import begin_topk, encode_topk

ODD, PRECISIONS, small_blocks, with_nan = others.ODD, others.PRECISIONS, others.small_blocks, others.with_nan


@pytest.mark.parametrize(("parameters", "compute"), PRECISIONS)
def test_topk(parameters: torch.dtype, compute: torch.dtype) -> None:
    case = encoder(*ODD, compute=compute, parameters=parameters)
    found = encode_topk(*case.operands, 7, None, compute)
    assert_topk(found, case, 7)
    wanted = reference_topk.encode_topk(*case.operands, 7, None, compute)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_topk_of_two_to_the_20_features() -> None:
    """The best are at both ends of a token's 16,384 groups."""
    weight_FD = torch.full((2**20, 1), -1.0, device=DEVICE)
    best = [0, 77, 2**20 - 2, 2**20 - 1]
    weight_FD[best, 0] = torch.tensor([1.0, 4.0, 2.0, 3.0], device=DEVICE)
    bias_F = torch.zeros(2**20, device=DEVICE)
    found = encode_topk(torch.ones(1, 1, device=DEVICE), weight_FD, bias_F, 3, None, F32)
    assert found.offsets.tolist() == [0, 3]
    assert found.feature_ids.tolist() == best[1:]
    assert found.values.tolist() == [4.0, 2.0, 3.0]


def test_topk_by_norm() -> None:
    case = encoder(9, 300, compute=BF16)
    for k in (7, 250):
        assert_topk(encode_topk(*case.operands, k, norms(300), BF16), case, k, norms(300))


@pytest.mark.parametrize(
    ("shape", "k"), [((5, 64), 64), ((2, 9), 20), ((4, 1), 1), ((3, 200), 150), ((5, 24), 4), ((5, 16), 3)]
)
def test_topk_of_many(shape: tuple[int, int], k: int) -> None:
    """k near, at and above the number of features, and of groups of 8."""
    case = encoder(*shape)
    assert_topk(encode_topk(*case.operands, k, None, F32), case, k)


@pytest.mark.usefixtures("small_blocks")
def test_topk_where_marks_descend() -> None:
    """The marks that registers hold are all above those of the k-th group."""
    case = of_table(torch.arange(64 * 40, 0, -1).expand(2, -1))
    assert_topk(encode_topk(*case.operands, 20, None, F32), case, 20)


@pytest.mark.parametrize(("ties", "full"), [(False, False), (True, False), (True, True)])
def test_topk_writes_within_its_lists(ties: bool, full: bool) -> None:
    """k groups full of the best; or k - 1, and in 2 k - 1 others one tie or all. Nothing behind the lists changes."""
    k, size, f = 70, 64, 64 * 210
    table = torch.zeros(1, f)
    table[0, : (3 * k - 2) * size : 1 if full else size] = 1.0
    best = torch.arange(1, (k - ties) * size + 1) + 1000.0
    table[0, : best.numel()] = best
    case, device = replace(encoder(1, 1), pre_BF=table.to(DEVICE, torch.float64)), torch.device(DEVICE)
    block = products.Block(first=0, product_RF=table.to(DEVICE), bias_F=None)
    rule, scratch = groups.Rule(kind=groups.PLAIN), groups.new_groups(1, f, size, device)
    assert scratch.size == groups.group_size(f, k) == size
    groups.mark_groups(block, rule, scratch)
    wide = best_of_token.new_scratch(2, f, size, k, device)
    wide.candidates.fill_(-7)
    wide.parts.fill_(-7)
    lists = best_of_token.Scratch(candidates=wide.candidates[:1], parts=wide.parts[:1])
    ids, values = torch.empty(1, k, dtype=torch.int64, device=device), torch.empty(1, k, device=device)
    counts = torch.empty(1, dtype=torch.int32, device=device)
    best_of_token.select(block, rule, scratch, k, lists, (ids, values, counts))
    offsets = torch.tensor([0, k], device=device)
    assert_topk(reference_topk.Selection(offsets, ids.flatten(), values.flatten()), case, k)
    assert bool((wide.candidates[1] == -7).all())
    assert bool((wide.parts[1] == -7).all())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("norm", [False, True])
def test_topk_in_blocks(norm: bool) -> None:
    """Several blocks of tokens, the last one smaller; group marks and candidates beyond what registers hold."""
    case = encoder(7, 300)
    norm_F = norms(300) if norm else None
    assert_topk(encode_topk(*case.operands, 20, norm_F, F32), case, 20, norm_F)


def test_topk_all_equal() -> None:
    """The first k features, wherever groups and tiles end."""
    case = of_table(torch.ones(2, 1100))
    found = encode_topk(*case.operands, 70, None, F32)
    assert_topk(found, case, 70)


def test_topk_of_nothing() -> None:
    """No positive entry in one token, in all tokens; no tokens."""
    table = torch.randn(3, 70)
    table[1] = 0
    assert_topk(encode_topk(*of_table(table).operands, 5, None, F32), of_table(table), 5)
    dead = of_table(-table.abs())
    assert_topk(encode_topk(*dead.operands, 5, norms(70), F32), dead, 5, norms(70))
    empty = of_table(table[:0])
    assert_topk(encode_topk(*empty.operands, 5, None, F32), empty, 5)


@pytest.mark.usefixtures("small_blocks")
def test_topk_of_two_layers_at_once() -> None:
    """Both queued before the first is waited for; few entries of the second are positive."""
    cases = [encoder(13, 150), encoder(11, 150)]
    cases[1].bias_F.sub_(5)
    cases[1].pre_BF.sub_(5)
    begun = [begin_topk(*case.operands, 20, None, F32) for case in cases]
    for result, case in zip(begun, cases, strict=True):
        assert_topk(result(), case, 20)
