"""Encode, decode, reconstruct, calibrate and initial values on a mesh, as on one device."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.parallel.model_cases import SHAPE, TOKENS, Case, Pair
from tests.parallel.processes import Processes
from trainer.calibrate import calibrate_thresholds
from trainer.model.clt import CrossLayerTranscoder
from trainer.model.spec import ModelSpec
from trainer.parallel.collectives import collectives_of
from trainer.parallel.mesh import end_groups, mesh_of

MESHES = [(1, 4, True), (1, 4, False), (2, 2, True), (2, 2, False), (4, 1, True)]
TOPK = {"kind": "topk", "score": "decoder_norm", "skip": True}
BATCHTOPK = {"kind": "batchtopk", "scope": "all_layers"}
JUMPRELU = {"kind": "jumprelu", "bandwidth": 0.5}


def _methods(mesh: tuple[int, int, bool], spec: dict[str, Any]) -> None:
    pair = Pair(Case(*mesh, spec))
    whole, model, x = pair.whole, pair.model, pair.x
    mine, norms = x[pair.rows], whole.decoder_norms()
    for s, norm_F in enumerate(model.decoder_norms()):
        features = pair.part.part(SHAPE["n_features"])
        torch.testing.assert_close(norm_F, norms[s][features])
    for rule in ("training", "inference") if spec["kind"] == "jumprelu" else ("training",):
        expected = whole.reconstruct(x, rule=rule)[pair.rows]
        found = model.reconstruct(mine, rule=rule)
        torch.testing.assert_close(found, model.local_columns(expected), rtol=0, atol=1e-9)
        decoded = model.decode(model.encode(mine, rule=rule), mine)
        torch.testing.assert_close(model.unscale_targets(decoded).detach(), found, rtol=0, atol=1e-12)


def _calibrated(mesh: tuple[int, int, bool], spec: dict[str, Any], scope: str, one_shot: bool) -> None:
    pair = Pair(Case(*mesh, spec))
    # Unlike batches, so that the first look holds too little; ranks of the data axis have different rows.
    whole = [pair.x, 3 * pair.x, 0.1 * pair.x]
    mine = [batch[pair.rows] for batch in whole]
    calibrate_thresholds(pair.whole, iter(whole) if one_shot else whole, scope)
    calibrate_thresholds(pair.model, iter(mine) if one_shot else mine, scope)
    expected = pair.local("threshold_LF", pair.whole.threshold_LF)
    torch.testing.assert_close(pair.model.threshold_LF, expected, rtol=0, atol=1e-9)


def _initial(mesh: tuple[int, int, bool]) -> None:
    data, feature, by_columns = mesh
    spec = ModelSpec(**SHAPE, kind="jumprelu", skip=True)
    whole = CrossLayerTranscoder(spec, seed=3)
    of_mesh = mesh_of(data, feature, torch.device("cpu"))
    model = CrossLayerTranscoder(spec, seed=3, collectives=collectives_of(of_mesh, by_columns=by_columns))
    g = torch.Generator().manual_seed(0)
    mean_LD, rows = torch.randn(3, 12, generator=g), torch.randn(50, 3, 12, generator=g)
    shift, scale = torch.randn(3, 12, generator=g), torch.rand(3, 12, generator=g) + 0.5
    for each in (whole, model):
        each.set_scaling(shift, scale, scale, shift.abs() + 0.5)
        each.initialise_from_data(mean_LD, rows, 0.1)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in [*whole.named_parameters(), *whole.named_buffers()]:
        local = model.collectives.partitioning.local(tensor, model.partitions()[name])
        assert torch.equal(local.nan_to_num(-7), tensors[name].nan_to_num(-7)), name


def _all(function: Any, cases: list[tuple[Any, ...]]) -> None:
    for case in cases:
        function(*case)
        dist.barrier()
        end_groups()


def test_encode_decode_reconstruct(four_ranks: Processes) -> None:
    cases = [(mesh, spec) for mesh in MESHES for spec in (TOPK, BATCHTOPK, JUMPRELU)]
    four_ranks.run(_all, _methods, cases)


def test_calibrated_thresholds(four_ranks: Processes) -> None:
    cases = [
        ((1, 4, True), TOPK, "layer", False),
        ((2, 2, True), TOPK, "feature", False),
        ((2, 2, False), BATCHTOPK, "layer", False),
        ((4, 1, True), TOPK, "layer", False),
        ((2, 2, True), JUMPRELU, "layer", True),
    ]
    four_ranks.run(_all, _calibrated, cases)


@pytest.mark.parametrize("mesh", [(1, 4, True), (2, 2, False)])
def test_initial_values_are_those_of_one_device(four_ranks: Processes, mesh: tuple[int, int, bool]) -> None:
    four_ranks.run(_initial, mesh)


def test_tokens_divide() -> None:
    """Guards the cases above, whose ranks have equal shares."""
    assert TOKENS % 4 == 0
