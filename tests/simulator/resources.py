"""What a compiled kernel takes of a chip, read from the machine code that ptxas makes of its PTX.

`of_triton(kernel)` and `of_ptx(text)` give a `Resources`; `gate` says whether it will do, `table` prints many.
"""

from __future__ import annotations

import collections
import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import nvcc

TENSOR_CORE = ("HGMMA", "HMMA", "UTCHMMA")
COPIES = ("UTMALDG", "LDGSTS")
_SHOWN = (*TENSOR_CORE, *COPIES, "LDG", "STG", "STS", "LDS", "LDSM", "MUFU", "BAR", "ATOMG", "RED")
_SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


@dataclass(frozen=True)
class Resources:
    label: str
    arch: int | str
    warps: int
    registers: int  # a thread
    spills: int  # bytes stored and loaded, a thread
    stack: int  # bytes, a thread
    shared: int  # bytes, a block
    blocks_per_sm: int
    loop: dict[str, int]  # instructions of the innermost loop with tensor-core work: name -> count
    whole: dict[str, int]  # the same for the whole kernel
    warnings: tuple[str, ...]  # ptxas saying that it serialises wgmma


def of_triton(kernel, label: str = "") -> Resources:
    """Of a compiled Triton kernel: `launches[-1].kernel`, or what `warmup` returns."""
    metadata, label = kernel.metadata, label or kernel.metadata.name
    if metadata.target.backend == "hip":
        return _of_amd(kernel, label)
    return of_ptx(kernel.asm["ptx"], metadata.target.arch, metadata.num_warps, metadata.shared, label)


def of_ptx(ptx: str, arch: int, warps: int, dynamic_shared: int, label: str) -> Resources:
    """Of one kernel's PTX, Triton's or nvcc's."""
    log, sass = _assemble(ptx, arch, label)
    stack, stores, loads = map(
        int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()
    )
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    static = re.search(r"(\d+) bytes smem", log)
    shared = dynamic_shared + (int(static[1]) if static else 0)
    warnings = tuple(line.strip() for line in log.splitlines() if "erializ" in line or re.search(r"C75\d\d", line))
    lines = sass.splitlines()
    return Resources(
        label,
        arch,
        warps,
        registers,
        stores + loads,
        stack,
        shared,
        _blocks_per_sm(arch, warps, registers, shared),
        _innermost_loop(lines),
        _count(lines),
        warnings,
    )


def gate(r: Resources, *, blocks_per_sm: int = 1, tensor_core: bool = True, tma: bool = False) -> tuple[bool, str]:
    """(True, "") where the kernel will do, else (False, why not)."""
    if r.spills or r.stack:
        return False, f"{r.spills} bytes of spills and {r.stack} of stack in each thread"
    if r.warnings:
        return False, r.warnings[0]
    if r.blocks_per_sm < blocks_per_sm:
        return False, (
            f"{r.blocks_per_sm} blocks fit a multiprocessor, {blocks_per_sm} are wanted "
            f"({r.registers} registers × {32 * r.warps} threads, {r.shared} bytes of shared memory)"
        )
    if tensor_core and not any(r.loop.get(name) for name in TENSOR_CORE):
        return False, f"no tensor-core instruction in an innermost loop; the kernel has {r.whole}"
    if tma and not r.loop.get("UTMALDG"):
        return False, f"no TMA load in the innermost loop, which has {r.loop}"
    return True, ""


def table(rows: list[Resources]) -> str:
    """One line for each, aligned."""
    head = ("kernel", "arch", "warps", "regs", "spill", "shared", "blocks/SM", "innermost loop", "warnings")
    cells = [head] + [
        (
            r.label,
            str(r.arch),
            str(r.warps),
            str(r.registers),
            str(r.spills),
            f"{r.shared / 1024:.0f}K",
            str(r.blocks_per_sm),
            " ".join(f"{name}:{r.loop[name]}" for name in _SHOWN if r.loop.get(name)) or "-",
            str(len(r.warnings) or "-"),
        )
        for r in rows
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _assemble(ptx: str, arch: int, label: str) -> tuple[str, str]:
    """(what ptxas says, the machine code as text)."""
    target = re.search(r"^\.target\s+(\w+)", ptx, re.M)[1]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        for ptxas in _tools("ptxas", arch):
            command = [ptxas, "-v", f"--gpu-name={target}", source, "-o", cubin]
            done = subprocess.run(command, capture_output=True, text=True)
            if "Unsupported .version" not in done.stderr:  # an nvcc newer than this ptxas: the next one may know
                break
        if done.returncode:
            raise RuntimeError(f"{ptxas} failed on {label}: {done.stderr[-1000:]}")
        command = [_tools("nvdisasm", arch)[0], "-c", cubin]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return done.stderr + done.stdout, sass


@cache
def _tools(name: str, arch: int) -> list[str]:
    """Where ptxas or nvdisasm may be: in Triton's package, beside nvcc, on PATH."""
    folders = []
    if package := importlib.util.find_spec("triton"):
        here = Path(package.submodule_search_locations[0], "backends/nvidia/bin")
        folders = [here / f"{name}-blackwell", here / name] if arch == 100 else [here / name]
    if compiler := nvcc.find():
        folders.append(Path(compiler).with_name(name))
    if found := shutil.which(name):
        folders.append(Path(found))
    present = [str(path) for path in folders if path.exists()]
    if not present:
        raise FileNotFoundError(f"{name} is neither in Triton's package, nor beside nvcc, nor on PATH")
    return present


def _blocks_per_sm(arch: int, warps: int, registers: int, shared: int) -> int:
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = _SHARED_PER_SM[arch] // (shared + 1024)  # the system keeps 1 KB of each block
    return min(by_registers, by_shared, 64 // warps, 32)


_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


def _count(lines: list[str]) -> dict[str, int]:
    return dict(collections.Counter(found[1] for line in lines if (found := _OPCODE.search(line))))


def _innermost_loop(lines: list[str]) -> dict[str, int]:
    """The smallest loop (a label and a branch back to it) around the most tensor-core work; {} where there is none."""
    labels = {found[1]: n for n, line in enumerate(lines) if (found := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for n, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*?`\((\.L_x_\d+)\)", line)
        if target and labels.get(target[1], n) < n:
            start = labels[target[1]]
            counts = _count(lines[start : n + 1])
            if work := sum(counts.get(name, 0) for name in TENSOR_CORE):
                loops.append((start, n, work, counts))
    inner = [a for a in loops if not any(b is not a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return max(inner, key=lambda loop: loop[2])[3] if inner else {}


def _of_amd(kernel, label: str) -> Resources:
    """Reported, not gated: what the assembler says of itself."""
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    mfma = len(re.findall(r"^\s+v_mfma", text, re.M))
    whole = {"HMMA": mfma}
    spills = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count"))
    return Resources(
        label,
        kernel.metadata.target.arch,
        kernel.metadata.num_warps,
        number("vgpr_count"),
        spills,
        number("private_segment_fixed_size"),
        kernel.metadata.shared,
        0,
        {},
        whole,
        (),
    )
