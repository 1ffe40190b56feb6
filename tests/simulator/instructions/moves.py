"""Moves, packing and unpacking of registers, and what does nothing here."""

from __future__ import annotations

import numpy as np

from ..decode import Action, Decoder, instruction, vector
from ..errors import SimulationError, Unsupported
from ..floats import UNSIGNED, ptx_type
from ..ptx import Instruction


@instruction("mov")
def move(i: Instruction, d: Decoder) -> Action:
    target, source = i.operands
    if i.parts[-1] == "pred":
        write, read = d.write_predicate(target), d.predicate(source)
        return lambda block, mask: write(block, read(block), mask)
    kind = ptx_type("b" + i.parts[-1][1:]) or i.type()
    if target.startswith("{"):
        return _unpack(d, vector(target), source, kind.bytes)
    if source.startswith("{"):
        return _pack(d, target, vector(source), kind.bytes)
    write = d.write(target, kind)
    if d.is_register(source) and d.is_register(target) and d.width(source) == d.width(target) == kind.bytes:
        to, origin = d.slot(target), d.slot(source)

        def rename(block, mask):
            if mask is None:  # by reference: the value may be a product still in flight
                block.registers[to] = block.registers[origin]
            else:
                write(block, block.registers[origin].view(kind.dtype), mask)

        return rename
    read = d.read(source, kind)
    return lambda block, mask: write(block, read(block), mask)


def _unpack(d: Decoder, targets: list[str], source: str, size: int) -> Action:
    part = UNSIGNED[size // len(targets)]
    read = d.raw(source, size)
    writes = [d.write(target, ptx_type(f"b{8 * size // len(targets)}")) for target in targets]

    def run(block, mask):
        parts = np.ascontiguousarray(read(block)).view(part).reshape(-1, len(writes))
        for column, write in enumerate(writes):
            write(block, np.ascontiguousarray(parts[:, column]), mask)

    return run


def _pack(d: Decoder, target: str, sources: list[str], size: int) -> Action:
    reads = [d.raw(source, size // len(sources)) for source in sources]
    write = d.write(target, ptx_type(f"b{8 * size}"))

    def run(block, mask):
        write(block, np.stack([read(block) for read in reads], 1).view(UNSIGNED[size])[:, 0], mask)

    return run


@instruction("prefetch", "prefetchu", "nanosleep", "griddepcontrol", "setmaxnreg", "membar", "discard", "applypriority")
def hint(i: Instruction, d: Decoder) -> Action:
    """Changes the speed, or an order between blocks that this simulator does not model."""
    return lambda block, mask: None


@instruction("createpolicy")
def policy(i: Instruction, d: Decoder) -> Action:
    write = d.write(i.operands[0], ptx_type("b64"))
    return lambda block, mask: write(block, np.zeros(block.threads, np.uint64), mask)


@instruction("fence")
def fence(i: Instruction, d: Decoder) -> Action:
    if "proxy" in i.parts and "async" in i.parts:
        return lambda block, mask: block.shared.proxy_fence(np.unique(block.warps[block.active(mask)]))
    return lambda block, mask: None


@instruction("bar", "barrier")
def warp_barrier(i: Instruction, d: Decoder) -> Action:
    """bar.warp.sync; barriers of the block are the scheduler's. Races inside a warp are not looked for."""
    if "warp" not in i.parts:
        raise Unsupported(i.opcode)
    return lambda block, mask: None


@instruction("trap", "brkpt")
def trap(i: Instruction, d: Decoder) -> Action:
    def run(block, mask):
        raise SimulationError("the kernel trapped: an assertion of its own failed")

    return run


@instruction("call")
def call(i: Instruction, d: Decoder) -> Action:
    if "assert" in i.text:
        return trap(i, d)
    raise Unsupported("a function call")
