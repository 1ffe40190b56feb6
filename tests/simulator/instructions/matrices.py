"""Matrix fragments of a warp: ldmatrix, stmatrix, mma.sync. Layouts are those of the PTX manual's figures."""

from __future__ import annotations

import re

import numpy as np

from ..decode import Action, Decoder, instruction, vector
from ..errors import Unsupported
from ..floats import bf16_to_f32, ptx_type, truncate_tf32
from ..ptx import Instruction


def half_values(kind: str, bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bf16 or f16 as float32."""
    return bf16_to_f32(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def _matrix_addresses(block, base: np.ndarray, matrix: int, mask) -> tuple[np.ndarray, np.ndarray]:
    """(addresses of the rows, their warps): threads 8·matrix … + 7 of each warp hold its rows' addresses."""
    rows = base.reshape(-1, 32)[:, 8 * matrix : 8 * matrix + 8].reshape(-1)
    warps = np.repeat(np.arange(block.threads // 32), 8)
    if mask is None:
        return rows, warps
    taking = np.repeat(mask.reshape(-1, 32)[:, 0], 8)
    return rows[taking], warps[taking]


def _count(i: Instruction) -> int:
    i.allow("sync aligned m8n8 x1 x2 x4 trans shared cta")
    return next(int(part[1]) for part in i.parts if re.fullmatch(r"x[124]", part))


@instruction("ldmatrix")
def load_matrix(i: Instruction, d: Decoder) -> Action:
    count, transposed = _count(i), "trans" in i.parts
    writes = [d.write(target, ptx_type("b32")) for target in vector(i.operands[0])]
    address = d.address(i.operands[1], 4)
    assert len(writes) == count, i.text

    def run(block, mask):
        base = address(block)
        for matrix, write in enumerate(writes):
            rows, warps = _matrix_addresses(block, base, matrix, mask)
            loaded = block.shared.load(rows, 16, warps).view(np.uint16).reshape(-1, 8, 8)
            loaded = np.ascontiguousarray(loaded.transpose(0, 2, 1) if transposed else loaded)
            registers = loaded.view(np.uint32).reshape(-1)
            if mask is not None:
                full = np.zeros(block.threads, np.uint32)
                full[block.active(mask)] = registers
                registers = full
            write(block, registers, mask)

    return run


@instruction("stmatrix")
def store_matrix(i: Instruction, d: Decoder) -> Action:
    _count(i)
    transposed = "trans" in i.parts
    address = d.address(i.operands[0], 4)
    reads = [d.raw(source, 4) for source in vector(i.operands[1])]

    def run(block, mask):
        base = address(block)
        for matrix, read in enumerate(reads):
            rows, warps = _matrix_addresses(block, base, matrix, mask)
            registers = read(block) if mask is None else read(block)[block.active(mask)]
            values = np.ascontiguousarray(registers).view(np.uint16).reshape(-1, 8, 8)
            values = np.ascontiguousarray(values.transpose(0, 2, 1) if transposed else values)
            block.shared.store(rows, values.view(np.uint8).reshape(-1, 16), warps)

    return run


def halves_16x16(kind: str, registers: list[np.ndarray]) -> np.ndarray:
    """The A operand of k = 16: four registers of two halves each to (warps, 16, 16)."""
    quarters = [half_values(kind, np.ascontiguousarray(r).view(np.uint16)).reshape(-1, 8, 8) for r in registers]
    return np.concatenate([np.concatenate(quarters[:2], 1), np.concatenate(quarters[2:], 1)], 2)


def tf32_16x8(registers: list[np.ndarray]) -> np.ndarray:
    """The A operand of k = 8: four TF32 registers to (warps, 16, 8)."""
    quarters = [truncate_tf32(r).reshape(-1, 8, 4) for r in registers]
    return np.concatenate([np.concatenate(quarters[:2], 1), np.concatenate(quarters[2:], 1)], 2)


@instruction("mma")
def multiply(i: Instruction, d: Decoder) -> Action:
    """D = A·B + C for 16×8 tiles: A row-major, B column-major, float32 accumulation."""
    i.allow("sync aligned row col m16n8k16 m16n8k8 tf32")
    shape, kinds = i.parts[3], i.parts[6:10]
    if kinds[0] != "f32" or kinds[3] != "f32" or kinds[1] != kinds[2] or i.parts[4:6] != ("row", "col"):
        raise Unsupported(f"mma of {kinds}")
    kind = kinds[1]
    if (shape, kind) not in {("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32"), ("m16n8k8", "bf16"),
                             ("m16n8k8", "f16")}:  # fmt: skip
        raise Unsupported(f"mma.{shape} of {kind}")
    writes = [d.write(name, ptx_type("f32")) for name in vector(i.operands[0])]
    a, b = ([d.raw(name, 4) for name in vector(operand)] for operand in i.operands[1:3])
    c = [d.read(name, ptx_type("f32")) for name in vector(i.operands[3])]

    def halves(registers):
        return [half_values(kind, np.ascontiguousarray(r).view(np.uint16)).reshape(-1, 8, 8) for r in registers]

    def fragment_a(registers):
        if kind == "tf32":
            return tf32_16x8(registers)
        return halves_16x16(kind, registers) if len(registers) == 4 else np.concatenate(halves(registers), 1)

    def fragment_b(registers):  # (warps, 8, k): each row one column of B
        parts = [truncate_tf32(r).reshape(-1, 8, 4) for r in registers] if kind == "tf32" else halves(registers)
        return np.concatenate(parts, 2)

    def run(block, mask):
        block.counts["products"] += 1
        left, right = block.fragments(a, fragment_a), block.fragments(b, fragment_b)
        product = np.matmul(left, right.transpose(0, 2, 1))  # (warps, 16, 8)
        quads = np.ascontiguousarray(product.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)).reshape(2, 2, -1)
        for number, (write, read) in enumerate(zip(writes, c, strict=True)):
            write(block, quads[number >> 1, number & 1] + read(block), mask)

    return run
