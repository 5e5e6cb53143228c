"""A GPU machine may have only torch, triton, numpy and pytest: what runs there imports nothing else of ours.

Simulated: every package that pyproject.toml names besides these, and numba, is not found at import.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
THERE = {"torch", "triton", "numpy", "pytest"}
# Python imports sitecustomize at its start, in child processes too.
BLOCKER = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def blocked_modules() -> set[str]:
    """Top-level modules of all that the project needs but a GPU machine may lack."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *(need for extra in project["optional-dependencies"].values() for need in extra)]
    names = {re.split(r"[^A-Za-z0-9_.-]", need)[0].lower().replace("_", "-") for need in needs} - THERE
    found = {
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if {name.lower().replace("_", "-") for name in distributions} & names
    }
    return found | {"numba", "llvmlite", "hydra", "omegaconf", "zarr", "numcodecs"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a process on such a machine."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(BLOCKER.format(blocked=blocked_modules()))
    # A GPU machine interprets no kernel, as these tests do here; without a device that leaves the reference.
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Installed plugins of pytest would be missing there, and are no part of this.
    return {**own, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def run(environment: dict[str, str], *words: str) -> str:
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_simulation_refuses_what_is_missing(environment: dict[str, str]) -> None:
    for module in ("zarr", "hydra", "omegaconf", "transformers", "datasets", "numba", "psutil", "safetensors"):
        code = f"import {module}"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
        assert done.returncode != 0, module


def test_tests_of_the_gpu_are_collected_and_skip_for_want_of_one_alone(environment: dict[str, str]) -> None:
    """A file that cannot import a package of the machine's would be one skip, with another reason."""
    printed = run(environment, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider")
    skipped = [line for line in printed.splitlines() if line.startswith("SKIPPED")]
    there = torch.cuda.is_available()
    assert all(line.endswith("needs a CUDA device") for line in skipped), printed[-3000:]
    files = {match[0] for line in skipped for match in [re.search(r"tests/\w+/test_\w+", line)] if match}
    assert there or len(files) >= 7, files
    counted = sum(int(number) for number in re.findall(r"(\d+) (?:skipped|passed)", printed))
    assert counted >= 280, printed[-500:]


def test_what_they_call_runs(environment: dict[str, str]) -> None:
    """Beyond the imports: kernels (without a GPU in the interpreter), and a whole loss with its gradients."""
    files = ["tests/kernels/test_strides.py", "tests/kernels/test_triton_backend.py"]
    chosen = "(each_operand_alone and triton and values) or (are_the_references and relu and not jumprelu)"
    printed = run(environment, "-m", "pytest", *files, "-k", chosen, "-q", "-p", "no:cacheprovider")
    assert re.search(r"^2 passed", printed, re.MULTILINE), printed[-3000:]


def test_kernels_run(environment: dict[str, str]) -> None:
    printed = run(environment, "-m", "benchmarks.kernels", "--shape", "41,10,127,30,7", "--device", "cpu")
    assert "| fused_adam_rows | reference |" in printed


def test_step_runs(environment: dict[str, str]) -> None:
    words = ["--shape", "2,8,64,32,4", "--pairs", "1", "--parts", "modes", "selection", "breakdown", "--device", "cpu"]
    printed = run(environment, "-m", "benchmarks.step", *words)
    assert "| reference |" in printed
    assert "| JumpReLU |" in printed
