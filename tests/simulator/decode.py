"""Operands to functions: what an instruction reads and writes is worked out once, not at every execution."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import Unsupported
from .floats import UNSIGNED, PtxType, ptx_type
from .ptx import Instruction, Program

if TYPE_CHECKING:
    from .block import Block

Mask = np.ndarray | None  # None: every thread of the block
Action = Callable[["Block", Mask], None]
Read = Callable[["Block"], np.ndarray]
Write = Callable[["Block", np.ndarray, Mask], None]

HANDLERS: dict[str, Callable[[Instruction, Decoder], Action]] = {}

# generic addresses: shared memory and parameters live in windows far above global memory
SHARED_WINDOW, PARAM_WINDOW, LOCAL_WINDOW = 1 << 56, 1 << 57, 1 << 58


def instruction(*names: str):
    """Registers what decodes the instructions of these names."""

    def register(handler):
        for name in names:
            assert name not in HANDLERS, name
            HANDLERS[name] = handler
        return handler

    return register


class Decoder:
    """Resolves the operands of one program, for blocks of `threads` threads."""

    def __init__(self, program: Program, threads: int):
        self.program, self.threads = program, threads
        self.slots: dict[str, int] = {}
        self.param_offsets: dict[str, int] = {}
        offset = 0
        for name, kind, size in program.params:
            align = min(size, 8) if ptx_type(kind).bytes == size else 64
            offset = -(-offset // align) * align
            self.param_offsets[name] = offset
            offset += size
        self.param_bytes = offset

    def decode(self, i: Instruction) -> Action:
        """An unknown instruction raises when it is executed: a kernel may hold it in a branch never taken."""
        try:
            if i.name not in HANDLERS:
                raise Unsupported(f"instruction {i.name}")
            return HANDLERS[i.name](i, self)
        except Unsupported as error:
            message = str(error)

            def refuse(block: Block, mask: Mask) -> None:
                raise Unsupported(f"{message} is not modelled")

            return refuse

    def slot(self, register: str) -> int:
        if self.program.register_type(register) is None:
            raise Unsupported(f"operand {register!r}")
        return self.slots.setdefault(register, len(self.slots))

    def is_register(self, operand: str) -> bool:
        return self.program.register_type(operand) is not None

    def width(self, register: str) -> int:
        """Bytes of a declared register."""
        return ptx_type(self.program.register_type(register)).bytes

    def predicate(self, operand: str) -> Read:
        negated, operand = operand.startswith("!"), operand.lstrip("!")
        if not self.is_register(operand):
            return _constant(np.full(self.threads, bool(int(operand, 0)) != negated))
        slot = self.slot(operand)
        if negated:
            return lambda block: ~block.registers[slot].view(np.bool_)
        return lambda block: block.registers[slot].view(np.bool_)

    def raw(self, operand: str, size: int) -> Read:
        """The operand's bits, as unsigned integers of `size` bytes."""
        unsigned = UNSIGNED[size]
        if self.is_register(operand):
            slot = self.slot(operand)
            if self.program.register_type(operand) == "pred":
                raise Unsupported(f"predicate {operand} as a number")
            if (width := self.width(operand)) == size:
                return lambda block: block.registers[slot].view(unsigned)
            wide = UNSIGNED[width]
            return lambda block: block.registers[slot].view(wide).astype(unsigned)
        if operand.startswith("%"):
            return lambda block: block.special(operand).astype(unsigned)
        bits = self._constant_bits(operand, size)
        return _constant(np.full(self.threads, bits & ((1 << 8 * size) - 1), unsigned))

    def read(self, operand: str, kind: PtxType) -> Read:
        raw = self.raw(operand, kind.bytes)
        if kind.plain:
            dtype = kind.dtype
            return lambda block: raw(block).view(dtype)
        return lambda block: kind.decode(raw(block))

    def write(self, operand: str, kind: PtxType) -> Write:
        """Stores values of `kind`; a wider register is filled up with zeros or the sign."""
        if operand == "_":
            return lambda block, value, mask: None
        slot, width = self.slot(operand), self.width(operand)
        if width == kind.bytes and kind.plain:
            return lambda block, value, mask: block.put(slot, value, mask)
        if width < kind.bytes:
            raise Unsupported(f"{kind.name} written to the narrower register {operand}")
        wide = (np.int64 if width == 8 else np.int32 if width == 4 else np.int16) if kind.signed else UNSIGNED[width]

        def write(block: Block, value: np.ndarray, mask: Mask) -> None:
            bits = kind.encode(value)
            block.put(slot, (bits if kind.signed else bits.view(kind.raw)).astype(wide, copy=False), mask)

        return write

    def write_predicate(self, operand: str) -> Write:
        if operand == "_":
            return lambda block, value, mask: None
        slot = self.slot(operand)
        return lambda block, value, mask: block.put(slot, value, mask)

    def address(self, operand: str, size: int = 8) -> Read:
        """The address of `[base+offset]`, (threads,) int64; `size` is 4 for shared addresses."""
        found = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not found:
            raise Unsupported(f"address {operand}")
        base, offset = self.raw(found[1], size), int(found[2] or "0", 0)
        if not self.is_register(found[1]):
            return _constant(base(None).astype(np.int64) + offset)
        slot = self.slot(found[1])
        if self.width(found[1]) == size == 8:
            return lambda block: block.registers[slot].view(np.int64) + offset
        return lambda block: base(block).astype(np.int64) + offset

    def _constant_bits(self, operand: str, size: int) -> int:
        if operand in self.program.shared:
            return self.program.shared[operand]
        if operand in self.param_offsets:
            return PARAM_WINDOW + self.param_offsets[operand]
        if operand in self.program.local:
            return self.program.local[operand]
        if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", operand):
            return int(operand[2:], 16)
        if re.fullmatch(r"0[dD][0-9A-Fa-f]{16}", operand):
            bits = int(operand[2:], 16)
            value = struct.unpack("<d", struct.pack("<Q", bits))[0]
            return bits if size == 8 else struct.unpack("<I", struct.pack("<f", value))[0]
        try:
            return int(operand.rstrip("U"), 0)
        except ValueError:
            raise Unsupported(f"operand {operand!r}") from None


def vector(operand: str) -> list[str]:
    """The registers of `{%r1, %r2}`, or of a single one."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def _constant(value: np.ndarray) -> Read:
    value.flags.writeable = False
    return lambda block: value
