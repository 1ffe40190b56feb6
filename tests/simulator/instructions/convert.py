"""cvt and cvta."""

from __future__ import annotations

import numpy as np

from ..decode import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, Action, Decoder, instruction
from ..errors import Unsupported
from ..floats import ptx_type, round_tf32
from ..ptx import Instruction
from .arithmetic import elementwise

_TO_WHOLE = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt")
def convert(i: Instruction, d: Decoder) -> Action:
    i.allow("rn rna rz ftz sat tf32 satfinite", *_TO_WHOLE)
    if "tf32" in i.parts:
        if "rna" not in i.parts:
            raise Unsupported("cvt to tf32 that is not .rna")
        return elementwise(i, d, round_tf32, ptx_type("f32"), ptx_type("b32"))
    target, source = i.type(-2), i.type(-1)
    if target.packed == 2:
        return _pack(i, d, target)
    if target.packed > 1 or source.packed > 1:
        raise Unsupported("packed cvt")
    whole = next((_TO_WHOLE[part] for part in i.parts if part in _TO_WHOLE), None)
    if "rz" in i.parts:
        raise Unsupported("cvt.rz")
    if not source.floating:
        if "sat" in i.parts:
            raise Unsupported("cvt.sat of an integer")
        return elementwise(i, d, lambda x: x.astype(target.dtype), source, target)
    if target.floating:
        return elementwise(i, d, lambda x: (whole(x) if whole else x).astype(target.dtype), source, target)
    limits = np.iinfo(target.dtype)

    def to_integer(x: np.ndarray) -> np.ndarray:
        wide = np.nan_to_num(whole(x.astype(np.float64)), nan=0.0)
        inside = np.clip(wide, limits.min, limits.max)
        high = inside >= float(limits.max)  # 2**63 - 1 is no float64
        return np.where(high, limits.max, np.where(high, 0, inside).astype(target.dtype))

    return elementwise(i, d, to_integer, source, target)


def _pack(i: Instruction, d: Decoder, target) -> Action:
    """cvt.rn.bf16x2.f32 d, a, b: a is the upper half."""
    if i.parts[-1] != "f32" or "satfinite" in i.parts or "rn" not in i.parts:
        raise Unsupported("packed cvt")
    high, low = (d.read(operand, ptx_type("f32")) for operand in i.operands[1:])
    write = d.write(i.operands[0], ptx_type("b32"))
    relu = "relu" in i.parts

    def run(block, mask):
        values = np.stack([low(block), high(block)], 1)
        write(block, target.encode(np.maximum(values, 0) if relu else values), mask)

    return run


@instruction("cvta")
def convert_address(i: Instruction, d: Decoder) -> Action:
    """Generic addresses are global ones; the other spaces have windows above them."""
    windows = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": 0, "param": 0}
    space = next((part for part in i.parts[1:] if part in windows), None)
    if space is None:
        raise Unsupported("cvta of this space")
    kind = ptx_type("u64")
    window = np.uint64(windows[space])
    if space == "param":  # the address of a parameter carries its window already
        assert PARAM_WINDOW
    if "to" in i.parts:
        return elementwise(i, d, lambda a: a - window, kind)
    return elementwise(i, d, lambda a: a + window, kind)
