"""Runs a grid of blocks over PTX text."""

from __future__ import annotations

import struct
from functools import lru_cache

import numpy as np

from . import instructions  # noqa: F401  registers what every instruction does
from .block import Block, Code
from .decode import PARAM_WINDOW
from .floats import ptx_type
from .global_memory import GlobalMemory
from .instructions.tma import TensorMap
from .ptx import parse


@lru_cache(maxsize=256)
def _code(ptx: str, entry: str | None, threads: tuple[int, int, int] | None) -> Code:
    program = parse(ptx, entry)
    chosen = threads or program.block
    if chosen is None:
        raise ValueError(f"the PTX of {program.name} does not say how many threads it wants: pass threads=")
    return Code(program, chosen)


def launch(
    ptx: str,
    grid: tuple[int, ...],
    args: list,
    memory: GlobalMemory,
    *,
    shared_bytes: int = 0,
    entry: str | None = None,
    threads: tuple[int, ...] | None = None,
    seed: int | None = 0,
) -> dict[str, int]:
    """Executes every block and returns what was counted: instructions, tensor-core products, barriers.

    args: addresses that `memory.add` returned, numbers, or TensorMaps, one for each parameter of the kernel.
    shared_bytes: the dynamic shared memory of the launch.
    seed: shuffles the order of the blocks; None runs them in the order of their numbers.

    Raises a SimulationError where a check fails or an instruction is not modelled.
    """
    grid = (*grid, 1, 1)[:3]
    code = _code(ptx, entry, tuple((*threads, 1, 1)[:3]) if threads else None)
    params = _pack(code, args, memory)
    blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    if seed is not None:
        np.random.default_rng(seed).shuffle(blocks)
    memory.reset_races()
    totals: dict[str, int] = {}
    with np.errstate(all="ignore"):
        for index in blocks:
            block = Block(code, memory, params, tuple(int(x) for x in index), grid, shared_bytes)
            block.run()
            for name, count in block.counts.items():
                totals[name] = totals.get(name, 0) + count
    return totals


def _pack(code: Code, args: list, memory: GlobalMemory) -> bytes:
    params = code.program.params
    if len(args) != len(params):
        raise ValueError(f"{code.program.name} takes {len(params)} parameters, {len(args)} were given")
    buffer = bytearray(code.param_bytes)
    for (name, kind, size), value in zip(params, args, strict=True):
        offset = code.param_offsets[name]
        if isinstance(value, TensorMap):
            memory.tensor_maps[PARAM_WINDOW + offset] = value
        elif isinstance(value, bytes):
            buffer[offset : offset + size] = value.ljust(size, b"\0")
        elif isinstance(value, float) or kind[0] == "f":
            buffer[offset : offset + size] = struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], value)
        else:
            bits = int(value) & ((1 << 8 * size) - 1)
            buffer[offset : offset + size] = bits.to_bytes(ptx_type(kind).bytes, "little")
    return bytes(buffer)
