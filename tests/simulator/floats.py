"""The rounding of bfloat16, float16 and TF32, and the PTX types that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; the bits as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def truncate_tf32(bits: np.ndarray) -> np.ndarray:
    """What a tensor core reads of a float32 given as TF32: it ignores the 13 lowest bits."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def round_tf32(x: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32.f32: to nearest, ties away from zero; the bits as uint32."""
    return (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


@dataclass(frozen=True)
class PtxType:
    """One type of PTX: how wide it is in a register, and the numpy type that its arithmetic uses."""

    name: str
    bytes: int
    dtype: type
    packed: int = 1  # values in one register

    @property
    def raw(self) -> type:
        return UNSIGNED[self.bytes]

    @property
    def plain(self) -> bool:
        """Arithmetic works on a view of the register."""
        return self.packed == 1 and self.name != "bf16"

    @property
    def signed(self) -> bool:
        return np.issubdtype(self.dtype, np.signedinteger)

    @property
    def floating(self) -> bool:
        return np.issubdtype(self.dtype, np.floating)

    def decode(self, raw: np.ndarray) -> np.ndarray:
        """Register bits to values, (lanes,) or (lanes, packed)."""
        if self.plain:
            return raw.view(self.dtype)
        halves = np.ascontiguousarray(raw).view(np.uint16)
        if self.packed > 1:
            halves = halves.reshape(-1, self.packed)
        return bf16_to_f32(halves) if self.name.startswith("bf16") else halves.view(np.float16)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Values to register bits, (lanes,)."""
        if self.plain:
            return values.astype(self.dtype, copy=False)
        halves = f32_to_bf16(values) if self.name.startswith("bf16") else values.astype(np.float16).view(np.uint16)
        return np.ascontiguousarray(halves).view(self.raw).reshape(-1)


@cache
def ptx_type(name: str) -> PtxType | None:
    """The type of that name, or None where there is none here."""
    special = {
        "f16": PtxType("f16", 2, np.float16),
        "bf16": PtxType("bf16", 2, np.float32),
        "f16x2": PtxType("f16x2", 4, np.float16, packed=2),
        "bf16x2": PtxType("bf16x2", 4, np.float32, packed=2),
        "f32": PtxType("f32", 4, np.float32),
        "f64": PtxType("f64", 8, np.float64),
    }
    if name in special:
        return special[name]
    kind, width = name[:1], name[1:]
    if kind not in "bus" or width not in ("8", "16", "32", "64"):
        return None
    bits = int(width)
    return PtxType(name, bits // 8, getattr(np, f"int{bits}" if kind == "s" else f"uint{bits}"))
