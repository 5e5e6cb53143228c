"""The formula of bytes against what is really sent."""

import pytest

from benchmarks.traffic import CASES, TOLERANCE, Case, measure
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
