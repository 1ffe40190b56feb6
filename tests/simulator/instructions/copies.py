"""cp.async: copies to shared memory that land only at their wait, and are NaN until then."""

from __future__ import annotations

import numpy as np

from ..decode import Action, Decoder, instruction
from ..errors import Unsupported
from ..ptx import Instruction
from . import tma


@instruction("cp")
def copy(i: Instruction, d: Decoder) -> Action:
    if "bulk" in i.parts:
        return tma.bulk(i, d)
    i.allow("async ca cg shared cta global commit_group wait_group wait_all L2 128B 64B 256B cache_hint")
    if "commit_group" in i.parts:
        return _together(i, lambda block: block.copies.commit())
    if "wait_group" in i.parts:
        pending = int(i.operands[0], 0)
        return _together(i, lambda block: block.copies.wait(pending))
    if "wait_all" in i.parts:

        def wait_all(block):
            block.copies.commit()
            block.copies.wait(0)

        return _together(i, wait_all)
    return _start(i, d)


def _together(i: Instruction, action) -> Action:
    def run(block, mask):
        if mask is not None:
            raise Unsupported(f"{i.opcode} by some of the threads")
        action(block)

    return run


def _start(i: Instruction, d: Decoder) -> Action:
    target, source = d.address(i.operands[0], 4), d.address(i.operands[1])
    n = int(i.operands[2], 0)
    # fewer bytes than n: the rest is filled with zeros
    given = d.raw(i.operands[3], 4) if len(i.operands) > 3 and "cache_hint" not in i.parts else None
    if len(i.operands) > 4:
        raise Unsupported("cp.async with a size and a cache policy")

    def run(block, mask):
        lanes = block.active(mask)
        to, start = target(block)[lanes], source(block)[lanes]
        values = np.zeros((lanes.size, n), np.uint8)
        sizes = np.full(lanes.size, n) if given is None else given(block)[lanes].astype(np.int64)
        if not np.isin(sizes, (0, n)).all():
            raise Unsupported("cp.async of part of its bytes")
        some = sizes > 0
        values[some] = block.memory.load(start[some], n, block.number)
        warps = block.warps[lanes]
        block.shared.store(to, np.full_like(values, 0xFF), warps)
        block.copies.open.append(lambda: block.shared.store(to, values, warps))

    return run
