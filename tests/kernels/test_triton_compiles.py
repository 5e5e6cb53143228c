"""Every Triton kernel compiles ahead of time for the GPUs of three generations, without a spill.

In a process of its own: in this one, kernels may be the interpreter's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# A thread has at most 255; above 128 fewer than 16 warps fit an SM, too few for kernels of one warp that gather. At odd
# widths (in the name) a value has an address of its own: 14 warps fit.
GATHERING_REGISTERS, AT_ODD_WIDTHS = 128, 144


def compiled(arch: int, cache: Path) -> dict[str, dict[str, Any]]:
    """The records of benchmarks.triton_resources by kernel, compiled anew."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.triton_resources", "--json", "--arch", str(arch)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    records = {record["name"]: record for record in map(json.loads, done.stdout.splitlines())}
    assert {name: record["spills"] for name, record in records.items() if record["spills"]} == {}
    assert done.returncode == 0, done.stderr
    return records


@pytest.mark.parametrize(
    "arch", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)
def test_kernels_compile_without_spills(arch: int, tmp_path: Path) -> None:
    records = compiled(arch, tmp_path)
    assert len(records) >= 17
    for name, record in records.items():
        assert record["ptx_target"].startswith(f"sm_{arch}"), name
        assert 0 < record["registers"] <= 255, name
    assert sum("odd widths" in name for name in records) >= 15
    for name, record in records.items():
        # One between the steps of a token, whose lists lie in memory: the interpreter does without.
        steps = 2 if "groups of 8" in name else 3
        assert record["barriers"] == (steps if name.startswith("best of a token") else 0), name
    for name, record in records.items():
        if name.startswith(("decode", "backward", "encoder rows", "fused Adam")):
            odd = "odd widths" in name
            # Rows are gathered 16 bytes a thread, a row of 512 bytes per load of the warp, eight rows at once.
            assert odd or "join" in name or record["wide_loads"] >= 8, name
            assert arch != 90 or record["registers"] <= (AT_ODD_WIDTHS if odd else GATHERING_REGISTERS), name
