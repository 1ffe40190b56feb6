"""Arithmetic, comparison and selection, on every type."""

from __future__ import annotations

import numpy as np

from ..decode import Action, Decoder, instruction
from ..errors import Unsupported
from ..floats import PtxType
from ..ptx import Instruction

_ROUNDING = "rn rm rp rz approx full ftz sat NaN lo hi wide"
_TOWARDS = {"rm": -np.inf, "rp": np.inf, "rz": 0.0}
_BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax}
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def elementwise(i: Instruction, d: Decoder, function, kind: PtxType, result: PtxType | None = None) -> Action:
    """destination = function(sources), every operand of one type."""
    write = d.write(i.operands[0], result or kind)
    reads = [d.read(operand, kind) for operand in i.operands[1:]]
    mode = next((part for part in i.parts if part in _TOWARDS), None)
    if mode is not None:
        if kind.name != "f32":
            raise Unsupported(f".{mode} of {kind.name}")
        function = _directed(function, _TOWARDS[mode])
    if kind.floating and "ftz" in i.parts:
        function = _flushed(function)
    if kind.floating and "sat" in i.parts:
        function = _saturated(function)
    if len(reads) == 1:
        (a,) = reads
        return lambda block, mask: write(block, function(a(block)), mask)
    if len(reads) == 2:
        a, b = reads
        return lambda block, mask: write(block, function(a(block), b(block)), mask)
    return lambda block, mask: write(block, function(*[read(block) for read in reads]), mask)


def _directed(function, towards: float):
    """Rounded towards a number instead of to the nearest: what float64 says of the result decides."""

    def rounded(*operands):
        exact = function(*(operand.astype(np.float64) for operand in operands))
        nearest = exact.astype(np.float32)
        beyond = np.abs(nearest) > np.abs(exact) if towards == 0.0 else (nearest - exact) * -np.sign(towards) > 0
        return np.where(beyond, np.nextafter(nearest, np.float32(towards)), nearest)

    return rounded


def _flushed(function):
    tiny = np.finfo(np.float32).tiny

    def flushed(*operands):
        value = function(*operands)
        return np.where(np.abs(value) < tiny, np.copysign(np.float32(0), value), value)

    return flushed


def _saturated(function):
    return lambda *operands: np.nan_to_num(np.clip(function(*operands), 0, 1), nan=0.0)


@instruction("add", "sub", "min", "max")
def binary(i: Instruction, d: Decoder) -> Action:
    i.allow(_ROUNDING)
    kind, function = i.type(), _BINARY[i.name]
    if i.name in ("min", "max") and (not kind.floating or "NaN" in i.parts):
        function = np.minimum if i.name == "min" else np.maximum
    return elementwise(i, d, function, kind)


@instruction("and", "or", "xor")
def logic(i: Instruction, d: Decoder) -> Action:
    if i.parts[-1] == "pred":
        write = d.write_predicate(i.operands[0])
        a, b = (d.predicate(operand) for operand in i.operands[1:])
        function = _LOGIC[i.name]
        return lambda block, mask: write(block, function(a(block), b(block)), mask)
    return elementwise(i, d, _LOGIC[i.name], i.type())


@instruction("not")
def complement(i: Instruction, d: Decoder) -> Action:
    if i.parts[-1] == "pred":
        write, a = d.write_predicate(i.operands[0]), d.predicate(i.operands[1])
        return lambda block, mask: write(block, ~a(block), mask)
    return elementwise(i, d, np.invert, i.type())


@instruction("neg", "abs")
def sign(i: Instruction, d: Decoder) -> Action:
    i.allow(_ROUNDING)
    return elementwise(i, d, np.negative if i.name == "neg" else np.abs, i.type())


@instruction("mul", "mad")
def multiply(i: Instruction, d: Decoder) -> Action:
    i.allow(_ROUNDING)
    kind = i.type()
    if kind.floating:
        return elementwise(i, d, np.multiply if i.name == "mul" else fused, kind)
    if "wide" in i.parts:
        wide = np.dtype(f"{'i' if kind.signed else 'u'}{2 * kind.bytes}").type
        result = PtxType(("s" if kind.signed else "u") + str(16 * kind.bytes), 2 * kind.bytes, wide)
        a, b = (d.read(operand, kind) for operand in i.operands[1:3])
        write = d.write(i.operands[0], result)
        if i.name == "mul":
            return lambda block, mask: write(block, a(block).astype(wide) * b(block).astype(wide), mask)
        c = d.read(i.operands[3], result)
        return lambda block, mask: write(block, a(block).astype(wide) * b(block).astype(wide) + c(block), mask)
    product = _high_product if "hi" in i.parts else np.multiply
    if i.name == "mul":
        return elementwise(i, d, product, kind)
    return elementwise(i, d, lambda a, b, c: product(a, b) + c, kind)


def _high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    if bits == 64:  # no wider integer in numpy
        return np.array([(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=True)]).astype(a.dtype)
    wide = np.int64 if np.issubdtype(a.dtype, np.signedinteger) else np.uint64
    return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    # float64 holds the product exactly; rounding the sum twice is off by at most a hair over half an ulp
    return (a.astype(np.float64) * b + c).astype(a.dtype)


@instruction("fma")
def fma(i: Instruction, d: Decoder) -> Action:
    i.allow(_ROUNDING)
    if i.parts[-1] == "f64":
        raise Unsupported("fma in float64")  # it would need more than float64
    return elementwise(i, d, fused, i.type())


@instruction("div", "rem")
def divide(i: Instruction, d: Decoder) -> Action:
    i.allow(_ROUNDING)
    kind = i.type()
    if kind.floating:
        return elementwise(i, d, np.divide, kind)

    def quotient(a, b):
        safe = np.where(b == 0, b.dtype.type(1), b)
        whole = a // safe  # rounded down; C rounds towards zero
        if kind.signed:
            whole = whole + ((whole * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
        return np.where(b == 0, ~b.dtype.type(0), whole)

    if i.name == "div":
        return elementwise(i, d, quotient, kind)
    return elementwise(i, d, lambda a, b: np.where(b == 0, a, a - quotient(a, b) * b), kind)


_FUNCTIONS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: np.reciprocal(x),
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.reciprocal(np.sqrt(x)),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@instruction(*_FUNCTIONS)
def function(i: Instruction, d: Decoder) -> Action:
    """The approximate functions, computed better than a GPU does: their error is not modelled."""
    i.allow(_ROUNDING)
    return elementwise(i, d, _FUNCTIONS[i.name], i.type())


@instruction("copysign")
def copysign(i: Instruction, d: Decoder) -> Action:
    return elementwise(i, d, lambda sign, magnitude: np.copysign(magnitude, sign), i.type())


_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "equ": lambda a, b: (a == b) | np.isnan(a) | np.isnan(b),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}


@instruction("setp")
def compare(i: Instruction, d: Decoder) -> Action:
    i.allow("ftz and or xor", *_COMPARISONS)
    kind = i.type()
    compared = _COMPARISONS[i.parts[1]]
    if kind.floating and i.parts[1] == "ne":  # the ordered form; numpy's is true for NaN
        compared = lambda a, b: (a < b) | (a > b)  # noqa: E731
    a, b = (d.read(operand, kind) for operand in i.operands[1:3])
    join = next((_LOGIC[part] for part in i.parts[2:] if part in _LOGIC), None)
    also = d.predicate(i.operands[3]) if join else None
    names = i.operands[0].split("|")
    write = d.write_predicate(names[0])
    complement = d.write_predicate(names[1]) if len(names) > 1 else None

    def run(block, mask):
        value = compared(a(block), b(block))
        if complement is not None:
            complement(block, join(~value, also(block)) if join else ~value, mask)
        write(block, join(value, also(block)) if join else value, mask)

    return run


@instruction("selp")
def select(i: Instruction, d: Decoder) -> Action:
    kind = i.type()
    raw = PtxType(f"b{8 * kind.bytes}", kind.bytes, kind.raw)
    a, b = (d.read(operand, raw) for operand in i.operands[1:3])
    choose, write = d.predicate(i.operands[3]), d.write(i.operands[0], raw)
    return lambda block, mask: write(block, np.where(choose(block), a(block), b(block)), mask)
