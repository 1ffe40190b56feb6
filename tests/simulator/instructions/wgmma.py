"""wgmma: asynchronous products of a warpgroup, operands in shared memory.

A product is computed when it is waited for. Until then its accumulators are `Pending`: reading one raises;
and its operands are compared with what they were at the start: overwriting one raises too.
"""

from __future__ import annotations

import re

import numpy as np

from ..decode import Action, Decoder, instruction, vector
from ..errors import Hazard, OutOfBounds, SimulationError, Unsupported
from ..floats import truncate_tf32
from ..ptx import Instruction
from .matrices import half_values, halves_16x16, tf32_16x8

_SWIZZLE_BYTES = {1: 128, 2: 64, 3: 32}


class Accumulators:
    """The result of one product, (warpgroups, 64, N); known once it has landed."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None
        self._registers: np.ndarray | None = None

    def register(self, number: int) -> np.ndarray:
        if self.value is None:
            raise Hazard("an accumulator of wgmma is used before wgmma.wait_group")
        if self._registers is None:
            groups, _, n = self.value.shape
            split = self.value.reshape(groups, 4, 2, 8, n // 8, 4, 2)  # warpgroup, warp, half, row, column block, pair
            self._registers = np.ascontiguousarray(split.transpose(4, 2, 6, 0, 1, 3, 5)).reshape(n // 2, -1)
        return self._registers[number]


class Pending:
    """One accumulator register; behaves as an array once the product has landed."""

    def __init__(self, accumulators: Accumulators, number: int):
        self.accumulators, self.number = accumulators, number

    def view(self, dtype):
        return self.accumulators.register(self.number).view(dtype)


def swizzle(addresses: np.ndarray, mode: int) -> np.ndarray:
    """The XOR of address bits 4–6 with bits 7–9 by which 128, 64 or 32-byte rows are spread over the banks."""
    rows = {0: 0, 1: 7, 2: 3, 3: 1}[mode]
    return addresses ^ (((addresses >> 7) & rows) << 4)


def operand_addresses(descriptor: int, rows: int, k: int, transposed: bool, size: int) -> np.ndarray:
    """(rows, k) shared addresses of the elements that a matrix descriptor names."""
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> 16) & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    mode = (descriptor >> 62) & 3
    if (descriptor >> 49) & 7:
        raise Unsupported("a base offset in a matrix descriptor")
    r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
    if mode == 0:
        if transposed:
            raise Unsupported("an operand of wgmma that is transposed and not swizzled")
        chunk = 16 // size  # core matrices of 8 rows of 16 bytes
        return start + (r // 8) * stride + (c // chunk) * leading + (r % 8) * 16 + (c % chunk) * size
    width = _SWIZZLE_BYTES[mode]
    if transposed:
        across = width // size
        plain = start + (r // across) * leading + (r % across) * size + (c // 8) * stride + (c % 8) * width
    else:
        plain = start + (r // 8) * stride + (r % 8) * width + c * size
    return swizzle(plain, mode)


@instruction("wgmma")
def wgmma(i: Instruction, d: Decoder) -> Action:
    i.allow("fence sync aligned commit_group wait_group mma_async tf32", *[p for p in i.parts if p.startswith("m64")])
    match i.parts[1]:
        case "fence":
            return lambda block, mask: None
        case "commit_group":
            return _whole(lambda block: block.products.commit())
        case "wait_group":
            pending = int(i.operands[0], 0)
            return _whole(lambda block: block.products.wait(pending))
    return _product(i, d)


def _whole(action) -> Action:
    def run(block, mask):
        if mask is not None:
            raise Unsupported("wgmma by some of the warpgroups")
        action(block)

    return run


def _product(i: Instruction, d: Decoder) -> Action:
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", i.parts[4])
    kinds = i.parts[5:8]
    if not shape or kinds[0] != "f32" or kinds[1] != kinds[2] or kinds[1] not in ("bf16", "f16", "tf32"):
        raise Unsupported(f"wgmma of {kinds}")
    n, k, kind = int(shape[1]), int(shape[2]), kinds[1]
    size = 4 if kind == "tf32" else 2
    if k * size != 32:
        raise Unsupported(f"wgmma with k = {k} of {kind}")
    accumulators = vector(i.operands[0])
    a_registers = vector(i.operands[1]) if i.operands[1].startswith("{") else None
    keep, *scales = i.operands[3:]
    if any(scale != "1" for scale in scales[:2]):
        raise Unsupported("wgmma that negates an operand")
    transposed = [s != "0" for s in scales[2:]]  # [A, B], or [B] where A is in registers; none for TF32
    transposed_b = transposed[-1] if transposed else False
    transposed_a = transposed[0] if len(transposed) == 2 else False
    slots = [d.slot(name) for name in accumulators]
    read_a = [d.raw(name, 4) for name in a_registers] if a_registers else d.raw(i.operands[1], 8)
    read_b, keeps = d.raw(i.operands[2], 8), d.predicate(keep)

    def values(block, addresses):
        if kind == "tf32":
            return truncate_tf32(block.shared.views[4][addresses // 4])
        return half_values(kind, block.shared.views[2][addresses // 2])

    def run(block, mask):
        if mask is not None:
            raise Unsupported("wgmma by some of the warpgroups")
        groups = block.threads // 128
        if block.threads % 128:
            raise SimulationError("wgmma in a block that is not made of whole warpgroups")
        before = _current(block, slots, groups, n) if keeps(block).any() else None
        if before is not None and not keeps(block).all():
            raise Unsupported("wgmma that accumulates in some threads only")
        places, a = [], None
        for descriptor in _descriptors(read_b(block), groups):
            places.append(operand_addresses(descriptor, n, k, transposed_b, size))
        if a_registers:
            fragment = [read(block).copy() for read in read_a]
            a = tf32_16x8(fragment) if kind == "tf32" else halves_16x16(kind, fragment)
            a = a.reshape(groups, 64, k)
        else:
            for descriptor in _descriptors(read_a(block), groups):
                places.append(operand_addresses(descriptor, 64, k, transposed_a, size))
        for place in places:
            if int(place.max()) + size > block.shared.size:
                raise OutOfBounds("an operand of wgmma lies outside the shared allocation")
        touched = np.unique(np.concatenate([place.reshape(-1) for place in places]) // 16) * 16
        block.shared.tensor_core_read(touched)
        seen = block.shared.views[16][touched // 16].copy()
        result = Accumulators()

        def land():
            if (block.shared.views[16][touched // 16].view(np.uint64) != seen.view(np.uint64)).any():
                raise Hazard("an operand of wgmma is overwritten before wgmma.wait_group")
            block.shared.tensor_core_read(touched)
            block.counts["products"] += 1
            b = np.stack([values(block, place) for place in places[:groups]])  # (warpgroups, N, k)
            left = a if a is not None else np.stack([values(block, place) for place in places[groups:]])
            product = np.matmul(left, b.transpose(0, 2, 1))
            result.value = product if before is None else product + before()

        block.products.open.append(land)
        for number, slot in enumerate(slots):
            block.registers[slot] = Pending(result, number)

    return run


def _current(block, slots: list[int], groups: int, n: int):
    """What the accumulators hold, as a function to call when the product lands."""
    held = [block.registers[slot] for slot in slots]
    if isinstance(held[0], Pending):
        source = held[0].accumulators
        if all(isinstance(h, Pending) and h.accumulators is source and h.number == j for j, h in enumerate(held)):
            return lambda: source.value  # a chain of products: the earlier one lands first
    stacked = np.stack([h.view(np.float32) for h in held]).reshape(n // 8, 2, 2, groups, 4, 8, 4)
    value = np.ascontiguousarray(stacked.transpose(3, 4, 1, 5, 0, 6, 2)).reshape(groups, 64, n)
    return lambda: value


def _descriptors(raw: np.ndarray, groups: int) -> list[int]:
    """One matrix descriptor for each warpgroup."""
    by_group = raw.reshape(groups, 128)
    if (by_group != by_group[:, :1]).any():
        raise SimulationError("the threads of a warpgroup disagree on a matrix descriptor")
    return [int(x) for x in by_group[:, 0]]
