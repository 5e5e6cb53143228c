"""The import directions: launch -> trainer -> activation_store, and what single modules may not import."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("activation_store", "trainer", "launch")
FORBIDDEN_EVERYWHERE = {
    # package -> what it never imports
    "activation_store": ("trainer", "launch"),
    "trainer": ("launch",),
}
OWN = (*PACKAGES, "conf", "tests", "benchmarks")
NUMERIC = ("torch.distributed", "accelerate", "deepspeed", "wandb", "zarr")
# What the module of the key may import beyond what its package may; each says why.
EXCEPTIONS = {
    # `CrossLayerTranscoder.load` is the door for notebooks; it hands over to the loader, inside the function.
    "trainer/model/clt.py": ("trainer.load",),
}


def _files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that `file` imports, at any depth. `from a import b` is both `a` and `a.b`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively; write the whole name"
            assert node.module is not None
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _offences(files: list[Path], forbidden: tuple[str, ...]) -> list[str]:
    found = []
    for file in files:
        relative = file.relative_to(ROOT).as_posix()
        allowed = EXCEPTIONS.get(relative, ())
        for line, name in _imports(file):
            if any(_within(name, package) for package in forbidden) and not any(_within(name, ok) for ok in allowed):
                found.append(f"{relative}:{line} imports {name}")
    return found


def _outside(files: list[Path], allowed_own: tuple[str, ...], allowed_third: tuple[str, ...]) -> list[str]:
    """Imports that are neither the standard library's nor on the lists."""
    found = []
    for file in files:
        relative = file.relative_to(ROOT).as_posix()
        allowed = (*allowed_own, *allowed_third, *EXCEPTIONS.get(relative, ()))
        for line, name in _imports(file):
            if name.split(".")[0] in sys.stdlib_module_names:
                continue
            if not any(_within(name, package) for package in allowed):
                found.append(f"{relative}:{line} imports {name}")
    return found


def test_the_walk_sees_imports() -> None:
    """Guards the tests below against looking at nothing."""
    for package in PACKAGES:
        assert sum(1 for file in _files(package) for _ in _imports(file)) > 10, package


@pytest.mark.parametrize("package", FORBIDDEN_EVERYWHERE)
def test_packages_import_downwards_only(package: str) -> None:
    assert _offences(_files(package), FORBIDDEN_EVERYWHERE[package]) == []


def test_the_model_imports_torch_and_kernels_only() -> None:
    assert _outside(_files("trainer/model"), ("trainer.model", "trainer.kernels"), ("torch",)) == []


def test_kernels_import_torch_numpy_and_compilers_at_most() -> None:
    third = ("torch", "numpy", "triton", "numba", "llvmlite")
    assert _outside(_files("trainer/kernels"), ("trainer.kernels",), third) == []


COMPILED = ("compiling", "scatter_compiled", "sums_compiled")


def test_numba_is_imported_by_the_compiled_cpu_backend_and_the_stores_compiled_functions_alone() -> None:
    trainer = [file for file in _files("trainer") if "trainer/kernels/cpu/" not in file.as_posix()]
    store = [file for file in _files("activation_store") if file.stem not in COMPILED]
    assert _offences([*trainer, *store, *_files("launch")], ("numba", "llvmlite")) == []


def test_what_is_compiled_is_imported_when_it_is_needed() -> None:
    """numba takes most of a second to import."""
    users = [ROOT / "activation_store" / name for name in ("scatter.py", "statistics.py")]
    for file in users:
        top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        said = "".join(map(ast.dump, top))
        assert not any(name in said for name in COMPILED)
    others = [f for f in _files("activation_store") if f not in users and f.stem not in COMPILED]
    assert _offences(others, tuple(f"activation_store.{name}" for name in COMPILED)) == []


def test_the_loss_and_the_model_know_no_engine_and_no_store() -> None:
    assert _offences([*_files("trainer/model"), ROOT / "trainer/loss.py"], NUMERIC) == []


def test_engines_are_imported_by_parallel_alone() -> None:
    others = [file for file in _files("trainer") if "trainer/parallel/" not in file.as_posix()]
    assert _offences([*others, *_files("activation_store"), *_files("launch")], ("accelerate", "deepspeed")) == []


@pytest.mark.parametrize("engine", ["accelerate", "deepspeed"])
def test_each_engine_is_imported_by_its_own_file_alone(engine: str) -> None:
    """So that the others run where it is not installed; the builder imports the file when the engine is asked for."""
    own = f"trainer/parallel/{engine}_engine.py"
    others = [file for file in _files("trainer/parallel") if file.relative_to(ROOT).as_posix() != own]
    assert _offences(others, (engine,)) == []


@pytest.mark.parametrize("module", ["activation_store/config.py", "trainer/config.py", "launch/config.py"])
def test_configs_import_nothing_heavy(module: str) -> None:
    own = ("activation_store.config", "trainer.config")
    assert _outside([ROOT / module], own, ()) == []


@pytest.mark.parametrize("package", ["activation_store", "trainer"])
def test_package_roots_are_empty(package: str) -> None:
    assert (ROOT / package / "__init__.py").read_text() == ""


def test_what_is_imported_is_declared() -> None:
    """Every third-party import is a dependency of pyproject.toml, or of the extra that its place belongs to."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needs = [*project["dependencies"], *extras["gpu"], *extras["deepspeed"]]
    declared = {re.split(r"[^A-Za-z0-9_.-]", need)[0].lower().replace("_", "-") for need in needs}
    modules = importlib.metadata.packages_distributions()
    missing = set()
    for package in PACKAGES:
        for file in _files(package):
            for _, name in _imports(file):
                top = name.split(".")[0]
                if top in sys.stdlib_module_names or top in OWN:
                    continue
                names = {found.lower().replace("_", "-") for found in modules.get(top, [top])}
                if not names & declared:
                    missing.add(f"{file.relative_to(ROOT)}: {top}")
    assert missing == set()
