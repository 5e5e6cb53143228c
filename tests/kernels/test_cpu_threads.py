"""How kernels are compiled and run: every way gives the same bits, on any number of threads."""

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

from tests.kernels.sparse_cases import sparse
from tests.kernels.test_cpu_sparse import adam_case, backward, on_cpu
from trainer.kernels.cpu import compiling, threads
from trainer.kernels.cpu.backend import CPU
from trainer.kernels.cpu.compiling import Kernel, block_of, int64_array, kernel, next_part
from trainer.kernels.fused_adam_rows import AdamHyper

F32 = torch.float32
HYPER = AdamHyper(1e-2, 0.9, 0.999, 1e-8, 1 - 0.9**3, 1 - 0.999**3)


@pytest.fixture
def free_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@kernel
def _visit(pointer: Any) -> None:
    a = block_of(pointer)
    visits = int64_array(a[2], a[1])
    part = next_part(pointer)
    while part < a[1]:
        visits[part] += part
        part = next_part(pointer)


def everything() -> list[torch.Tensor]:
    """Results of every op whose sums are long, with a hot feature."""
    # More entries of one feature than two parts hold, so that its columns and its dots are cut.
    case = on_cpu(sparse(3000, 60, 96, 3))
    y, out = case.y_BC.clone(), torch.empty_like(case.rows_FC)
    CPU.sparse_decode(y, case.offsets, case.feature_ids, case.values, case.rows_FC, F32)
    dots = backward(case, out_FC=out, accumulate=False, dots=True)
    rows, *moments = adam_case(60, 96)
    squares, more = CPU.fused_adam_rows(rows, *moments, case.index, case.values, case.grad_BC, HYPER, dots=True)
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=g) for shape in ((300, 90), (700, 90), (700,)))
    topk = CPU.encode_topk(x, weight, bias, 9, None, F32)
    best = CPU.encode_candidates(x, weight, bias, 2000, float("-inf"), None, F32)
    jump = CPU.encode_jumprelu(x, weight, bias, 12.0, 0.5, F32)
    assert dots is not None
    assert more is not None
    assert jump is not None
    sums = CPU.feature_sums(case.index, case.values)
    return [y, out, dots, rows, *moments, squares, more, *topk, *best, *jump, *CPU.build_csc(*case_ids(case), 60), sums]


def case_ids(case: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return case.feature_ids, case.tokens


def test_bits_do_not_depend_on_threads_or_on_the_run(free_threads: None) -> None:
    results = []
    for n_threads in (1, 2, 2, 3):
        torch.set_num_threads(n_threads)
        results.append(everything())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("way", ["openmp", "pool"])
def test_every_part_is_visited_once(way: str, free_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "pool":
        monkeypatch.setattr(threads, "_open_mp", lambda: None)
    for n_threads, parts in ((1, 5), (2, 1), (2, 1000), (4, 3)):
        torch.set_num_threads(n_threads)
        visits = torch.zeros(parts, dtype=torch.int64)
        threads.launch(_visit, parts, visits)
        assert visits.tolist() == list(range(parts))
    threads.launch(_visit, 0, torch.zeros(0))


@pytest.mark.skipif(sys.platform != "linux", reason="torch runs on libgomp on Linux")
def test_the_pool_is_torchs_own() -> None:
    path = threads.find_libgomp()
    assert path is not None
    assert Path(torch.__file__).parent.parent in Path(path).parents
    assert threads._open_mp() is not None


def test_both_ways_give_the_same_bits(free_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    usual = everything()
    monkeypatch.setattr(threads, "_open_mp", lambda: None)
    for a, b in zip(usual, everything(), strict=True):
        assert torch.equal(a, b)


def _run(compiled: Kernel) -> int:
    visits = torch.zeros(4, dtype=torch.int64)
    block = (ctypes.c_int64 * compiling.BLOCK)(0, 4, visits.data_ptr())
    compiled.function(ctypes.addressof(block))
    return int(visits.sum())


def test_machine_code_is_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("LAYERLOOM_CACHE", str(tmp_path))
    assert _run(Kernel(_visit.body)) == 6
    assert [file.suffix for file in tmp_path.rglob("*.nbc")] == [".nbc"]
    again = Kernel(_visit.body)
    assert _run(again) == 6
    assert again.compiled.cache_hits == 1
    assert numba.config.CACHE_DIR == ""


def test_compiles_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no folder can be written to, numba refuses to cache at all."""
    made: list[bool] = []
    real: Callable[..., Any] = numba.cfunc

    def cfunc(*arguments: Any, cache: bool = False, **options: Any) -> Any:
        made.append(cache)
        if cache:
            raise RuntimeError("cannot cache function '_visit': no locator available for file 'x.py'")
        return real(*arguments, **options)

    monkeypatch.setattr(numba, "cfunc", cfunc)
    assert _run(Kernel(_visit.body)) == 6
    assert made == [True, False]


def test_numba_is_imported_only_with_the_backend() -> None:
    code = "import sys, trainer.kernels.dispatch as d; d.kernels('reference'); assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_of_several_libraries_torchs_own_runs_the_kernels() -> None:
    site = Path("/site-packages")
    other = str(site / "sentencepiece.libs/libgomp-1.so.1.0.0")
    inside, beside = str(site / "torch/lib/libgomp.so.1"), str(site / "torch.libs/libgomp-2.so.1.0.0")
    assert threads.torchs_own([other, inside], site / "torch") == inside
    assert threads.torchs_own([other, beside], site / "torch") == beside
    assert threads.torchs_own([other], site / "torch") == other
    assert threads.torchs_own([], site / "torch") is None


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is Linux's")
def test_a_package_with_a_library_of_its_own_changes_nothing() -> None:
    """sentencepiece, which subjects' tokenizers load, brings a libgomp."""
    code = (
        "import torch; from trainer.kernels.cpu.threads import find_libgomp; before = find_libgomp(); "
        "import sentencepiece; print(before is not None and find_libgomp() == before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
