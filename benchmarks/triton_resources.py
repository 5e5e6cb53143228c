"""What every Triton kernel needs of a GPU, compiled ahead of time: registers, spills, shared memory. No GPU wanted.

    python -m benchmarks.triton_resources                   the table of docs/kernels.md, as markdown
    python -m benchmarks.triton_resources --arch 90 --json  one JSON object per kernel and architecture

Every kernel is compiled twice: for sizes and strides that 16 divides, and for any others (`odd widths`; in brackets in
the table). Exit 1 where a kernel spills. `programs per SM` is what the registers alone allow on sm_90 (64 K registers,
64 warps and 32 programs an SM).
"""

import argparse
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Iterator

from trainer.kernels import gpu
from trainer.kernels.gpu.compile import CompileCase, CompileReport, compile_for

ARCHITECTURES = (80, 90, 100)


def all_cases() -> list[CompileCase]:
    """The cases of every module of trainer.kernels.gpu, in order of module.

    Raises:
        ValueError: two cases of one name.
    """
    found = [
        case
        for module in sorted(info.name for info in pkgutil.iter_modules(gpu.__path__) if info.name != "backend")
        for case in getattr(importlib.import_module(f"{gpu.__name__}.{module}"), "COMPILE_CASES", ())
    ]
    names = [case.name for case in found]
    if len(set(names)) < len(names):
        raise ValueError(f"two compile cases have one name: {sorted({n for n in names if names.count(n) > 1})}")
    return found


def programs_per_sm(registers: int, num_warps: int) -> int:
    """Programs whose registers fit an SM; a warp takes them in units of 256."""
    per_warp = -(-registers * 32 // 256) * 256
    return min(32, 64 // num_warps, 65536 // (per_warp * num_warps))


def record(case: CompileCase, arch: int, report: CompileReport) -> dict[str, str | int]:
    """One line of JSON."""
    return {
        "name": case.name,
        "arch": arch,
        "num_warps": case.num_warps,
        "registers": report.registers,
        "spills": report.spills,
        "shared_bytes": report.shared_bytes,
        "barriers": report.barriers,
        "wide_loads": sum("ld.global" in line and ".v4.b32" in line for line in report.ptx.splitlines()),
        "ptx_target": next(line.split()[1] for line in report.ptx.splitlines() if line.startswith(".target")),
    }


def table(cases: list[CompileCase], records: list[dict[str, str | int]], archs: list[int]) -> Iterator[str]:
    """Markdown: a row per kernel, registers per architecture, in brackets those at odd widths."""
    found = {(str(r["name"]), int(r["arch"])): r for r in records}
    head = ["kernel", "warps", *(f"registers sm_{arch}" for arch in archs), "shared bytes", "spills", "programs per SM"]
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    shown = 90 if 90 in archs else archs[0]
    for case in cases:
        names = [each.name for each in (case, case.at_odd_widths()) if each is not None]
        of_case = {arch: [found[name, arch] for name in names] for arch in archs}
        flat = [r for each in of_case.values() for r in each]
        registers = [_with_brackets([int(r["registers"]) for r in of_case[arch]]) for arch in archs]
        shared, spills = max(int(r["shared_bytes"]) for r in flat), sum(int(r["spills"]) for r in flat)
        programs = [programs_per_sm(int(r["registers"]), case.num_warps) for r in of_case[shown]]
        cells = [case.name, case.num_warps, *registers, shared, spills, _with_brackets(programs)]
        yield f"| {' | '.join(map(str, cells))} |"


def _with_brackets(values: list[int]) -> str:
    """The first, and the second in brackets if there is one."""
    return " ".join([str(values[0]), *(f"({value})" for value in values[1:])])


def main() -> int:
    """Compile all, print, and say by the exit code whether anything spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="compute capability times 10")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    arguments = parser.parse_args()
    cases, records = all_cases(), []
    for case in (each for pair in zip(cases, (c.at_odd_widths() for c in cases), strict=True) for each in pair if each):
        for arch in arguments.arch:
            records.append(record(case, arch, compile_for(case, arch)))
            if arguments.json:
                print(json.dumps(records[-1]), flush=True)
    if not arguments.json:
        print("\n".join(table(cases, records, arguments.arch)))
    return int(any(r["spills"] for r in records))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("TRITON_INTERPRET=1 compiles nothing; unset it")
    sys.exit(main())
