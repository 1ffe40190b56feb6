"""Shifts, bit fields and counts."""

from __future__ import annotations

import numpy as np

from ..decode import Action, Decoder, instruction
from ..floats import PtxType, ptx_type
from ..ptx import Instruction
from .arithmetic import elementwise


@instruction("shl", "shr")
def shift(i: Instruction, d: Decoder) -> Action:
    kind = i.type()
    if i.name == "shr" and i.parts[-1][0] == "b":
        kind = ptx_type("u" + i.parts[-1][1:])
    a, amount, write = d.read(i.operands[1], kind), d.raw(i.operands[2], 4), d.write(i.operands[0], kind)
    bits, left = 8 * kind.bytes, i.name == "shl"

    def run(block, mask):
        value, by = a(block), amount(block)
        inside = np.minimum(by, bits - 1).astype(kind.dtype)
        shifted = value << inside if left else value >> inside
        if not (kind.signed and not left):  # an arithmetic shift by bits - 1 is already all sign
            shifted = np.where(by < bits, shifted, kind.dtype(0))
        write(block, shifted, mask)

    return run


@instruction("shf")
def funnel(i: Instruction, d: Decoder) -> Action:
    i.allow("l r wrap clamp")
    low, high, amount = (d.raw(operand, 4) for operand in i.operands[1:])
    write, left, wrap = d.write(i.operands[0], ptx_type("b32")), "l" in i.parts, "wrap" in i.parts

    def run(block, mask):
        both = (high(block).astype(np.uint64) << np.uint64(32)) | low(block)
        by = amount(block).astype(np.uint64)
        by = by & np.uint64(31) if wrap else np.minimum(by, np.uint64(32))
        value = (both << by) >> np.uint64(32) if left else both >> by
        write(block, value.astype(np.uint32), mask)

    return run


@instruction("bfe")
def extract(i: Instruction, d: Decoder) -> Action:
    kind = i.type()
    bits = 8 * kind.bytes

    def field(value, start, length):
        start, length = (np.minimum(x.astype(np.int64) & 255, bits) for x in (start, length))
        wide = value.astype(object) if bits == 64 else value.astype(np.int64)
        taken = (wide >> start) & ((1 << length) - 1)
        if kind.signed:
            top = np.where(length > 0, 1 << np.maximum(length - 1, 0), 0)
            taken = (taken ^ top) - top
        return taken.astype(kind.dtype)

    a = d.read(i.operands[1], kind)
    start, length = (d.raw(operand, 4) for operand in i.operands[2:])
    write = d.write(i.operands[0], kind)
    return lambda block, mask: write(block, field(a(block), start(block), length(block)), mask)


@instruction("bfi")
def insert(i: Instruction, d: Decoder) -> Action:
    kind = i.type()
    a, b = (d.read(operand, kind) for operand in i.operands[1:3])
    start, length = (d.raw(operand, 4) for operand in i.operands[3:])
    write = d.write(i.operands[0], kind)
    one = kind.dtype(1)

    def run(block, mask):
        at = start(block).astype(kind.dtype)
        field = ((one << length(block).astype(kind.dtype)) - one) << at
        write(block, (b(block) & ~field) | ((a(block) << at) & field), mask)

    return run


@instruction("lop3")
def logic3(i: Instruction, d: Decoder) -> Action:
    a, b, c = (d.raw(operand, 4) for operand in i.operands[1:4])
    table, write = int(i.operands[4], 0), d.write(i.operands[0], ptx_type("b32"))

    def run(block, mask):
        x, y, z = a(block), b(block), c(block)
        value = np.zeros_like(x)
        for row in range(8):
            if table >> row & 1:
                value |= (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
        write(block, value, mask)

    return run


@instruction("prmt")
def permute(i: Instruction, d: Decoder) -> Action:
    a, b, selector = (d.raw(operand, 4) for operand in i.operands[1:4])
    write = d.write(i.operands[0], ptx_type("b32"))

    def run(block, mask):
        pool = np.stack([a(block), b(block)], 1).view(np.uint8)  # (threads, 8)
        choice = (selector(block)[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
        taken = np.take_along_axis(pool, (choice & 7).astype(np.int64), 1)
        taken = np.where(choice & 8, np.where(taken & 0x80, 0xFF, 0), taken).astype(np.uint8)
        write(block, np.ascontiguousarray(taken).view(np.uint32)[:, 0], mask)

    return run


def _popcount(x: np.ndarray) -> np.ndarray:
    return np.array([bin(v).count("1") for v in x.tolist()], np.uint32)


def _leading_zeros(x: np.ndarray) -> np.ndarray:
    return np.array([8 * x.itemsize - v.bit_length() for v in x.tolist()], np.uint32)


@instruction("popc", "clz")
def count(i: Instruction, d: Decoder) -> Action:
    kind = i.type()
    raw = PtxType(f"b{8 * kind.bytes}", kind.bytes, kind.raw)
    return elementwise(i, d, _popcount if i.name == "popc" else _leading_zeros, raw, ptx_type("u32"))


@instruction("brev")
def reverse(i: Instruction, d: Decoder) -> Action:
    width = 8 * i.type().bytes

    def reversed_bits(x):
        return np.array([int(f"{v:0{width}b}"[::-1], 2) for v in x.tolist()], x.dtype)

    return elementwise(i, d, reversed_bits, i.type())
