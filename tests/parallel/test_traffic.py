"""The formulas of bytes against what is really sent."""

from dataclasses import replace

import pytest

from benchmarks.traffic import CASES, TOLERANCE, Case, EngineCase, FeedCase, measure, measure_engine, measure_feed
from tests.parallel.processes import Processes


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name and case.data * case.feature == 4)


@pytest.mark.parametrize("name", ["topk columns", "topk rows", "jumprelu columns", "batchtopk all layers, columns"])
def test_the_formula_holds(four_ranks: Processes, name: str) -> None:
    counted, formula = four_ranks.run(measure, _case(name))[0]
    assert sum(counted.values()) == pytest.approx(sum(formula.values()), rel=TOLERANCE)
    if name == "topk rows":
        assert "isend" not in counted, "rows send no codes"
        return
    # Codes go point to point, exactly as many as there are.
    of_codes = formula["codes"] + formula["gradients of codes"]
    assert counted["isend"] == pytest.approx(of_codes, rel=1e-3)


@pytest.mark.parametrize("name", ["topk auxk, columns", "topk auxk, rows"])
def test_the_formula_of_auxk_holds(four_ranks: Processes, name: str) -> None:
    """What dead features add, by itself."""
    case = _case(name)
    (counted, formula), (without, _) = (four_ranks.run(measure, each)[0] for each in (case, replace(case, auxk=0)))
    assert sum(counted.values()) - sum(without.values()) == pytest.approx(formula["auxk"], rel=TOLERANCE)


@pytest.mark.parametrize("by_columns", [True, False])
def test_the_formula_of_the_feed_holds(four_ranks: Processes, by_columns: bool) -> None:
    counted, formula = four_ranks.run(measure_feed, FeedCase("feed", 2, 2, by_columns))[0]
    assert sum(counted.values()) == sum(formula.values()) > 0


@pytest.mark.parametrize("engine", ["accelerate", "fsdp", "deepspeed, ZeRO 2", "deepspeed, ZeRO 3"])
def test_the_formula_of_an_engine_holds(four_ranks: Processes, engine: str) -> None:
    counted, formula = four_ranks.run(measure_engine, EngineCase(engine, 4))[0]
    assert sum(counted.values()) == pytest.approx(sum(formula.values()), rel=TOLERANCE)
    gathered = counted.get("all_gather_single", 0) + counted.get("_allgather_base", 0)
    assert gathered == pytest.approx(formula["parameters"], rel=TOLERANCE)
