"""Loads, stores and atomics in every state space."""

from __future__ import annotations

import re

import numpy as np

from ..decode import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, Action, Decoder, instruction, vector
from ..errors import OutOfBounds, Unsupported
from ..floats import UNSIGNED, ptx_type
from ..ptx import Instruction

_SPACES = ("global", "shared", "param", "local")
_HINTS = (
    "global shared param local nc cta cluster gpu sys weak relaxed acquire release volatile ca cg cs cv lu wb wt "
    "L1 L2 evict_last evict_first evict_normal evict_unchanged no_allocate cache_hint 64B 128B 256B v2 v4 v8"
)


def _layout(i: Instruction) -> tuple[str, int]:
    """(space, registers) of a load or store."""
    i.allow(_HINTS, "const")
    space = next((part for part in i.parts[1:] if part in _SPACES), "generic")
    return space, next((int(part[1]) for part in i.parts if re.fullmatch(r"v\d", part)), 1)


@instruction("ld", "ldu")
def load(i: Instruction, d: Decoder) -> Action:
    space, count = _layout(i)
    kind, targets = i.type(), vector(i.operands[0])
    assert len(targets) == count, i.text
    if space == "param":
        return _load_param(i, d, kind, targets)
    size = kind.bytes
    address = d.address(i.operands[1], 4 if space == "shared" else 8)
    writes = [d.write(target, ptx_type(("s" if kind.signed else "b") + str(8 * size))) for target in targets]
    # bits, or the signed integers that a wider register wants
    column_type = kind.dtype if kind.signed else UNSIGNED[size]

    def run(block, mask):
        lanes = block.active(mask)
        data = _read(block, space, address(block)[lanes], size * count, lanes)
        columns = np.ascontiguousarray(data).view(column_type)
        for column, write in enumerate(writes):
            if mask is None:
                write(block, np.ascontiguousarray(columns[:, column]), None)
            else:
                full = np.zeros(block.threads, column_type)
                full[lanes] = columns[:, column]
                write(block, full, mask)

    return run


def _load_param(i: Instruction, d: Decoder, kind, targets: list[str]) -> Action:
    address = d.address(i.operands[1], 8)  # of a name, or of a register that was moved one
    writes = [d.write(target, kind) for target in targets]

    def run(block, mask):
        starts = np.unique(address(block)[block.active(mask)]) - PARAM_WINDOW
        if len(starts) > 1:
            raise Unsupported("threads that read different parameters in one instruction")
        if not 0 <= starts[0] <= len(block.params) - len(writes) * kind.bytes:
            raise OutOfBounds(f"a parameter at byte {starts[0]} of {len(block.params)}")
        values = np.frombuffer(block.params, kind.raw, len(writes), starts[0]).view(kind.dtype)
        for value, write in zip(values, writes, strict=True):
            write(block, np.full(block.threads, value), mask)

    return run


@instruction("st")
def store(i: Instruction, d: Decoder) -> Action:
    space, count = _layout(i)
    size, sources = i.type().bytes, vector(i.operands[1])
    assert len(sources) == count, i.text
    address = d.address(i.operands[0], 4 if space == "shared" else 8)
    reads = [d.raw(source, size) for source in sources]

    def run(block, mask):
        lanes = block.active(mask)
        values = np.stack([read(block)[lanes] for read in reads], 1).view(np.uint8)
        _write(block, space, address(block)[lanes], values, lanes)

    return run


def _space_of(space: str, addresses: np.ndarray) -> tuple[str, np.ndarray]:
    if space != "generic":
        return space, addresses
    low, high = int(addresses.min()), int(addresses.max())
    for name, window, end in (
        ("global", 0, SHARED_WINDOW),
        ("shared", SHARED_WINDOW, PARAM_WINDOW),
        ("local", LOCAL_WINDOW, 1 << 62),
    ):
        if window <= low and high < end:
            return name, addresses - window
    raise Unsupported("generic addresses of several state spaces in one instruction")


def _read(block, space: str, addresses: np.ndarray, n: int, lanes: np.ndarray) -> np.ndarray:
    if not addresses.size:
        return np.empty((0, n), np.uint8)
    space, addresses = _space_of(space, addresses)
    if space == "shared":
        return block.shared.load(addresses, n, block.warps[lanes])
    if space == "local":
        return block.local[lanes[:, None], _local(block, addresses, n)]
    return block.memory.load(addresses, n, block.number)


def _write(block, space: str, addresses: np.ndarray, values: np.ndarray, lanes: np.ndarray) -> None:
    if not addresses.size:
        return
    space, addresses = _space_of(space, addresses)
    if space == "shared":
        block.shared.store(addresses, values, block.warps[lanes])
    elif space == "local":
        block.local[lanes[:, None], _local(block, addresses, values.shape[1])] = values
    else:
        block.memory.store(addresses, values, block.number)


def _local(block, addresses: np.ndarray, n: int) -> np.ndarray:
    if int(addresses.min()) < 0 or int(addresses.max()) + n > block.local.shape[1]:
        raise OutOfBounds("local access outside the thread's own memory")
    return addresses[:, None] + np.arange(n)


_UPDATES = {
    "add": lambda old, new: old + new,
    "min": min,
    "max": max,
    "exch": lambda old, new: new,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
}


@instruction("atom", "red")
def atomic(i: Instruction, d: Decoder) -> Action:
    i.allow(_HINTS, "noftz acq_rel cas", *_UPDATES)
    kind = i.type()
    update = next((_UPDATES[part] for part in i.parts[1:] if part in _UPDATES), None)
    swap = "cas" in i.parts
    if not kind.plain or "shared" in i.parts or (update is None and not swap):
        raise Unsupported("this atomic")
    operands = i.operands if i.name == "atom" else ("_", *i.operands)
    address = d.address(operands[1])
    targets = vector(operands[0])
    sources = [[d.read(name, kind) for name in vector(operand)] for operand in operands[2:4] if operand != "_"]
    sources = sources if swap else sources[:1]
    writes = [d.write(target, kind) for target in targets]

    def run(block, mask):
        lanes = block.active(mask)
        start = address(block)[lanes]
        for column, value in enumerate(sources[0]):
            new = value(block)[lanes]
            if swap:
                swapped = sources[1][column](block)[lanes]
                change = lambda old, lane, new=new, swapped=swapped: swapped[lane] if old == new[lane] else old  # noqa: E731
            else:
                change = lambda old, lane, new=new: update(old, new[lane])  # noqa: E731
            old = block.memory.atomic(start + column * kind.bytes, kind.dtype, change, block.number)
            if i.name == "atom":
                full = np.zeros(block.threads, kind.dtype)
                full[lanes] = old
                writes[column](block, full, mask)

    return run
