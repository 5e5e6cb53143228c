"""Ahead-of-time compilation of a kernel for an architecture, without a device, and what it needs of one.

Every module of kernels lists what it launches in `COMPILE_CASES`. Not under TRITON_INTERPRET=1, where nothing compiles.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileCase:
    """A kernel with the types of its arguments.

    name: unique among all cases. signature: argument -> Triton type; `*fp32` is a pointer (taken as aligned to 16
    bytes, as torch allocates), `i64:16` an integer divisible by 16. constexprs: the other arguments.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int = 3

    def at_odd_widths(self) -> "CompileCase | None":
        """The kernel as Triton compiles it for sizes and strides that 16 does not divide; None where it takes none.

        There no load is wide, and every value has an address of its own.
        """
        if not any(type_.endswith(":16") for type_ in self.signature.values()):
            return None
        plain = {name: type_.split(":")[0] for name, type_ in self.signature.items()}
        return replace(self, name=f"{self.name}, odd widths", signature=plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileReport:
    """Per thread: 32-bit registers and bytes spilled to local memory; per program: bytes of shared memory, and barriers
    that the kernel itself asks for.
    """

    registers: int
    spills: int
    shared_bytes: int
    barriers: int
    ptx: str


def compile_for(case: CompileCase, arch: int) -> CompileReport:
    """Compile for compute capability `arch` (80, 90, 100).

    Raises:
        ValueError: the kernel was imported for the interpreter.
    """
    if not hasattr(case.kernel, "cache_key"):
        raise ValueError(f"{case.name} was imported under TRITON_INTERPRET=1; compile in a process without it")
    types = {name: case.signature.get(name, "constexpr").split(":")[0] for name in case.kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(case.kernel.arg_names)
        if types[name].startswith("*") or case.signature.get(name, "").endswith(":16")
    }
    source = ASTSource(fn=case.kernel, signature=types, constexprs=case.constexprs, attrs=aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return CompileReport(
        registers=usage["REG"],
        spills=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        barriers=len(re.findall(r"\b(?:ttg|gpu)\.barrier\b", compiled.asm["ttgir"])),
        ptx=compiled.asm["ptx"],
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of the one kernel of a cubin, from the cuobjdump of Triton's wheel."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
