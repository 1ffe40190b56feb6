"""What the threads of a warp do together: shuffles, votes, elections."""

from __future__ import annotations

import numpy as np

from ..decode import Action, Decoder, instruction
from ..errors import SimulationError, Unsupported
from ..floats import ptx_type
from ..ptx import Instruction


@instruction("shfl")
def shuffle(i: Instruction, d: Decoder) -> Action:
    i.allow("sync bfly idx up down")
    names = i.operands[0].split("|")
    write = d.write(names[0], ptx_type("b32"))
    write_valid = d.write_predicate(names[1]) if len(names) > 1 else None
    value, distance, clamp = (d.raw(operand, 4) for operand in i.operands[1:4])
    mode = i.parts[2]

    def run(block, mask):
        lane = block.lanes % 32
        by, limits = distance(block).astype(np.int64) & 31, clamp(block).astype(np.int64)
        segment = limits >> 8 & 31
        low, high = lane & segment, (lane & segment) | (limits & 31 & ~segment)
        source = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": low | (by & ~segment),
        }[mode]
        valid = source >= low if mode == "up" else source <= high
        source = np.where(valid, source, lane) + block.lanes - lane
        taken = value(block)[source]
        if mask is not None and not mask[source[mask]].all():
            raise SimulationError("a shuffle reads from a thread that does not take part")
        write(block, taken, mask)
        if write_valid is not None:
            write_valid(block, valid, mask)

    return run


@instruction("elect")
def elect(i: Instruction, d: Decoder) -> Action:
    lane, chosen = i.operands[0].split("|")
    write, write_chosen = d.write(lane, ptx_type("b32")), d.write_predicate(chosen)

    def run(block, mask):
        write(block, np.zeros(block.threads, np.uint32), mask)
        write_chosen(block, block.lanes % 32 == 0, mask)

    return run


@instruction("vote")
def vote(i: Instruction, d: Decoder) -> Action:
    i.allow("sync all any uni ballot")
    read, mode = d.predicate(i.operands[1]), i.parts[2]
    ballot = d.write(i.operands[0], ptx_type("b32")) if mode == "ballot" else None
    write = None if mode == "ballot" else d.write_predicate(i.operands[0])

    def run(block, mask):
        value = read(block)
        taking = np.ones(block.threads, bool) if mask is None else mask
        yes, part = (value & taking).reshape(-1, 32), taking.reshape(-1, 32)
        if mode == "ballot":
            bits = (yes * (np.uint64(1) << np.arange(32, dtype=np.uint64))).sum(1).astype(np.uint32)
            ballot(block, np.repeat(bits, 32), mask)
            return
        every = (yes == part).all(1)
        result = {"all": every, "any": yes.any(1), "uni": every | ~yes.any(1)}[mode]
        write(block, np.repeat(result, 32), mask)

    return run


@instruction("activemask")
def active_mask(i: Instruction, d: Decoder) -> Action:
    write = d.write(i.operands[0], ptx_type("b32"))

    def run(block, mask):
        taking = (np.ones(block.threads, bool) if mask is None else mask).reshape(-1, 32)
        bits = (taking * (np.uint64(1) << np.arange(32, dtype=np.uint64))).sum(1).astype(np.uint32)
        write(block, np.repeat(bits, 32), mask)

    return run


_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@instruction("redux")
def reduce(i: Instruction, d: Decoder) -> Action:
    i.allow("sync", *_REDUCTIONS)
    kind, function = i.type(), _REDUCTIONS[i.parts[2]]
    if kind.floating:
        raise Unsupported("redux of floats")
    read, write = d.read(i.operands[1], kind), d.write(i.operands[0], kind)

    def run(block, mask):
        if mask is not None:
            raise Unsupported("redux by some of the threads")
        write(block, np.repeat(function.reduce(read(block).reshape(-1, 32), 1, dtype=kind.dtype), 32), mask)

    return run
