"""The model on a mesh equals the model on one device: losses, selections, gradients, norms and weights, in float64.

A covering choice of cases runs by default; `make test-matrix` runs every activation on every mesh with both splits.
"""

import itertools
from typing import Any

import pytest

from tests.parallel.model_cases import Case, check_all
from tests.parallel.processes import Processes

MESHES = {2: [(1, 2), (2, 1)], 4: [(2, 2), (1, 4), (4, 1)]}
SPECS: list[dict[str, Any]] = [
    {"kind": "relu"},
    {"kind": "jumprelu", "bandwidth": 0.5},
    {"kind": "relu", "span": "per_layer", "skip": True},
    {"kind": "jumprelu", "bandwidth": 0.5, "skip": True},
    *(
        {"kind": kind, "scope": scope, "score": score}
        for kind, scope, score in itertools.product(
            ("topk", "batchtopk"), ("layer", "all_layers"), ("activation", "decoder_norm")
        )
    ),
    {"kind": "topk", "scope": "layer", "span": "per_layer", "skip": True},
    {"kind": "batchtopk", "scope": "all_layers", "span": "per_layer", "skip": True},
]


def _variants(data: int, feature: int, spec: dict[str, Any]) -> list[Case]:
    splits = (True, False) if feature > 1 else (True,)
    cases = [Case(data, feature, split, spec, dense=dense) for split in splits for dense in (False, True)]
    if spec["kind"] in {"topk", "batchtopk"}:
        cases += [Case(data, feature, split, spec, tied=True, steps=1) for split in splits]
    if spec["kind"] == "batchtopk":
        cases += [Case(data, feature, split, spec, per_token=True) for split in splits]
    return cases


def _matrix(ranks: int) -> list[Case]:
    return [case for data, feature in MESHES[ranks] for spec in SPECS for case in _variants(data, feature, spec)]


def _covering(ranks: int) -> list[Case]:
    """Every activation, scope and score; every mesh; both splits; dense, tied and per-token cases in turn."""
    chosen: list[Case] = []
    for number, spec in enumerate(SPECS):
        data, feature = MESHES[ranks][number % len(MESHES[ranks])]
        variants = _variants(data, feature, spec)
        chosen.append(variants[number % len(variants)])
        if feature == 1:
            data, feature = MESHES[ranks][(number + 1) % len(MESHES[ranks])]
            chosen.append(Case(data, feature, True, spec))
        else:
            chosen.append(Case(data, feature, True, spec))
    # Ties across layers, ranks and tokens.
    data, feature = MESHES[ranks][0]
    everywhere: list[dict[str, Any]] = [{"kind": kind, "scope": "all_layers"} for kind in ("topk", "batchtopk")]
    # More wanted of a token than a rank has.
    chosen += [Case(1, ranks, True, {"kind": kind, "k": 40}) for kind in ("topk", "batchtopk")]
    return [*chosen, *(Case(data, feature, True, spec, tied=True, steps=1) for spec in everywhere)]


def _run(processes: Processes, cases: list[Case], timeout: float) -> None:
    wrong = {said for answers in processes.run(check_all, cases, timeout=timeout) for said in answers}
    assert not wrong, "\n".join(sorted(wrong))


def test_two_ranks(two_ranks: Processes) -> None:
    _run(two_ranks, _covering(2), 300)


def test_four_ranks(four_ranks: Processes) -> None:
    _run(four_ranks, _covering(4), 300)


def test_compiled_kernels(two_ranks: Processes) -> None:
    """They see rows that are parts, and features of all ranks in one index. One step: in float32 runs part."""
    specs = [SPECS[0], SPECS[1], SPECS[4], SPECS[10]]
    splits = (True, False)
    cases = [Case(1, 2, split, spec, compiled=True, steps=1) for split in splits for spec in specs]
    _run(two_ranks, cases, 300)


@pytest.mark.matrix
def test_every_case_on_two_ranks(two_ranks: Processes) -> None:
    _run(two_ranks, _matrix(2), 3600)


@pytest.mark.matrix
def test_every_case_on_four_ranks(four_ranks: Processes) -> None:
    _run(four_ranks, _matrix(4), 3600)
