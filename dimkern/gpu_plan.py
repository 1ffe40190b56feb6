"""The plan on a GPU: which order, blocks and tile take the least time by a model of the chip, within the budget.

Owns the model and the tables of tiles. The model is arithmetic (docs/gpu.md): a kernel takes the longer of its
multiplications and its bytes through the memory, a map adds its instructions to the multiplications before it, and
every launch costs. It chooses between plans; it promises no time.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from .gpu import Chip

if TYPE_CHECKING:
    from .plan import Problem

H100 = Chip("cuda", 90, multiprocessors=132, clock=1.83e9, bandwidth=3.35e12, shared_memory=232448)
A100 = Chip("cuda", 80, multiprocessors=108, clock=1.41e9, bandwidth=2.04e12, shared_memory=166912)

# Dense multiply-adds a clock and multiprocessor, by compute capability: the largest that is not above the chip's.
_MMA = {
    "half": {80: 1024, 86: 512, 90: 2048, 100: 4096, 120: 512},
    "tf32": {80: 512, 86: 256, 90: 1024, 100: 2048, 120: 256},
    "ieee": {80: 64, 86: 128, 90: 128},
}
_LANES = 128  # instructions of one lane that a multiprocessor issues a clock
# Instructions an element, counted in the compiled kernels: those of the functions, and scale, sum, rounding and store.
_MAP_INSTRUCTIONS = 5
_MASK_INSTRUCTIONS = 3  # where every tile is masked
_INSTRUCTIONS = {"exp": 3, "softplus": 15, "sigmoid": 5}  # sigmoid shares softplus' exponential and logarithm
# Bytes of operand tiles from L2, a clock and multiprocessor: what a 128x256 half-precision tile of a Hopper needs to
# keep its tensor cores busy, which well-tuned products of that size are known to come near to.
_L2_BYTES = 48
_HOST_LAUNCH, _DEVICE_LAUNCH = 5e-6, 1.5e-6  # seconds that a launch costs the host, and the chip between two kernels


@dataclass(frozen=True)
class Tile:
    """One program's share of the pairs, and how it is run."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    programs: int  # that a multiprocessor holds at once

    def shared_memory(self, itemsize: int) -> int:
        """Bytes of the pipeline of operand tiles."""
        return (self.BM + self.BN) * self.BK * itemsize * self.stages


_SMALL = 512  # images up to which few launches are always worth a product more: a tenth of the time at most

# From the resource reports (docs/gpu.md): no register spills, the multiplications and the loads in the innermost loop.
_HALF_TMA = (Tile(128, 256, 64, 8, 3, 1), Tile(128, 128, 64, 4, 3, 2), Tile(64, 64, 64, 4, 3, 4))
_HALF = (Tile(128, 128, 64, 4, 3, 2), Tile(64, 64, 64, 4, 3, 4))
_TF32 = (Tile(128, 128, 32, 8, 3, 1), Tile(64, 64, 32, 4, 3, 2))
_IEEE = (Tile(64, 64, 32, 4, 3, 2),)  # without tensor cores a larger one spills on a Hopper

# Of the kernels that keep weights in registers, by the K that fits: items whose gradients a program makes, others that
# it takes at a time.
_FLASH = {64: Tile(64, 64, 64, 4, 3, 2), 128: Tile(128, 64, 128, 8, 2, 1)}
_FLASH_TMA = {64: Tile(64, 128, 64, 4, 3, 2), 128: Tile(64, 128, 128, 4, 2, 2)}
# for the wider K, beside a soft clip, which would spill, or features in two dtypes, which leave room for one program
_FLASH_TMA_NARROW = Tile(64, 64, 128, 4, 2, 2)
FLASH_WEIGHT = torch.bfloat16  # what they round weights to


@dataclass(frozen=True)
class GpuChoice:
    """What a Plan for a GPU holds besides blocks."""

    chip: Chip
    tile: Tile
    seconds: float  # predicted for loss and gradients
    floor: float  # predicted for the three (or fewer) products alone
    few_launches: bool = False  # they are what costs: one product more over the pairs, a third of the launches
    flash: Tile | None = None  # of the kernels that keep weights in registers, where they are what serves


def tiles_for(chip: Chip, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles that fit a chip, the largest first."""
    single = _TF32 if precision() == "tf32" else _IEEE
    table: tuple[Tile, ...] = single if dtype.itemsize == 4 else _HALF_TMA if chip.has_tma else _HALF
    fitting = tuple(tile for tile in table if tile.shared_memory(dtype.itemsize) + 2048 <= chip.shared_memory)
    return fitting or table[-1:]


def flash_tile(chip: Chip, p: Problem) -> Tile | None:
    """The tile in which weights stay in registers; None where none fits, or none was looked for (docs/gpu.md)."""
    if chip.maker != "cuda" or not 80 <= chip.arch < 100 or p.operand_dtype.itemsize != 2 or p.K > 128:
        return None
    wide = 64 if p.K <= 64 else 128
    if not chip.has_tma:
        return _FLASH[wide]
    narrow = wide == 128 and (p.clip is not None or p.operand_dtype != FLASH_WEIGHT)
    return _FLASH_TMA_NARROW if narrow else _FLASH_TMA[wide]


def splits(chip: Chip, tile: Tile, outer: int, inner: int) -> tuple[int, int]:
    """Into how many parts the inner items are cut so that the chip is busy, and how many of them a part has."""
    steps = -(-inner // tile.BN)
    wanted = max(1, chip.multiprocessors * tile.programs // -(-outer // tile.BM))
    each = -(-steps // min(wanted, steps))
    return -(-steps // each), each * tile.BN


def uses_tma(chip: Chip, dtype: torch.dtype) -> bool:
    """Whether operand tiles come by TMA. Not in float32 proper: its products have no tensor cores, and would spill."""
    return chip.has_tma and (dtype.itemsize == 2 or precision() == "tf32")


def weight_dtype(p: Problem, kept: bool) -> torch.dtype:
    """What weights are stored in: the operands' dtype, but bfloat16 for weights that float16 has not the range for.

    It has for those of a mean loss that are bounded, and made (not `kept`) with their alpha in them: the largest there
    can be is known. Those in registers are bfloat16.
    """
    narrow = p.operand_dtype == torch.float16
    return torch.bfloat16 if narrow and (kept or p.weights_known or not p.row.bounded) else p.operand_dtype


def largest_weight(p: Problem) -> float:
    """What no pair's weight in the mean loss of a bounded estimator is above, negative or positive."""
    return {"row_lse": 1 / p.rows, "global_lse": 1.0, "pointwise": 1 / (p.rows * p.L)}[p.row.family]


def scratch_bytes(p: Problem, row_images: int, col_images: int, kept: bool) -> int:
    """Bytes beyond inputs, outputs and gradients."""
    rows, cols = row_images * p.P, col_images * p.L
    weight = weight_dtype(p, kept)
    half = weight.itemsize
    weights = rows * (p.held * p.L if kept else cols) * half if p.needs_grad else 0
    partial = rows * -(-cols // 64) * 4 * 2  # sums and references of the narrowest tiles
    staged = 0 if p.in_place else cols * _padded(p.K) * p.operand_dtype.itemsize
    if weight != p.operand_dtype and p.needs_grad:
        staged += cols * _padded(p.K) * half
    products = rows * p.K * (4 + half) if p.needs_grad else 0
    summaries = p.rows * _padded(p.K) * (p.operand_dtype.itemsize + 4)
    statistics = p.rows * p.L * (4 * 4 + 3 * 8) + p.rows * 16 * 8
    return weights + partial + staged + products + summaries + statistics


def flash_scratch_bytes(p: Problem, chip: Chip, tile: Tile, col_images: int) -> int:
    """The same where weights stay in registers: gradients in parts, features that have to be copied."""
    cols, item = col_images * p.L, FLASH_WEIGHT.itemsize
    copies = (not p.in_place) + (p.operand_dtype != FLASH_WEIGHT)
    features = (copies * cols + (copies + 2) * p.rows) * _padded(p.K) * item
    by_rows, by_cols = splits(chip, tile, p.rows, cols)[0], splits(chip, tile, cols, p.rows)[0]
    products = p.grad_summaries * (by_rows + 1) * p.rows * p.K * 4
    products += p.grad_locals * (by_cols > 1) * by_cols * cols * p.K * 4
    measured = p.weights_known or not p.grad_summaries
    partial = p.rows * (-(-cols // 64) if measured else 2 * by_rows) * 4 * 2
    statistics = p.rows * p.L * (4 * 4 + 3 * 8) + p.rows * 16 * 8
    return features + products + partial + statistics


def predict(
    p: Problem, chip: Chip, tile: Tile, row_images: int, col_images: int, kept: bool, few_launches: bool = False,
    flash: Tile | None = None,
) -> tuple[float, float]:  # fmt: skip
    """Seconds for loss and gradients, and those of the chip's own work: all there is where the host is quick enough."""
    rows, cols = row_images * p.P, col_images * p.L
    row_blocks, col_blocks = -(-p.N // row_images), -(-p.held // col_images)
    blocks = row_blocks * col_blocks
    item, stored = p.operand_dtype.itemsize, weight_dtype(p, kept or flash is not None)
    weight = stored.itemsize
    mma = mma_rate(p, chip)
    locals_, summaries, pairs = cols * p.K, rows * p.K, rows * cols
    instruction = pairs / (_LANES * chip.multiprocessors * chip.clock)  # seconds of one for every pair
    masked = flash is not None and not chip.has_tma
    mapped = (map_instructions(p) + masked * _MASK_INSTRUCTIONS) * instruction

    def kernel(busy: float, moved: float) -> float:
        return max(busy, moved / chip.bandwidth)

    def tiles(products: float, loads: float, tile: Tile, outer: int, inner: int) -> float:
        """Seconds of a kernel of ours, of `products` multiply-adds and operand tiles of `loads` bytes a pair."""
        loads /= _L2_BYTES * chip.multiprocessors * chip.clock
        multiplied = pairs * max(products / mma, loads) / _filled(chip, tile, outer, inner)
        # of several programs one multiplies while another maps
        return max(multiplied, mapped) + min(multiplied, mapped) / tile.programs

    def gradient(tile: Tile, outer: int, inner: int) -> float:
        """Seconds of a kernel that scores, maps and accumulates."""
        parts, span = splits(chip, tile, outer, inner)
        loads = p.K * item * (1 + (p.operand_dtype != FLASH_WEIGHT)) / tile.BM
        busy = tiles(2 * tile.BK, loads, replace(tile, BN=span), outer, inner)
        return kernel(busy, read + outer * p.K * 4 * (1 if parts == 1 else 2 * parts + 1))

    score, read = tiles(p.K, p.K * item * (1 / tile.BM + 1 / tile.BN), tile, rows, cols), (locals_ + summaries) * item
    if flash is not None:
        block, launches = kernel(score, read) * (not p.grad_summaries), 20 + blocks * 12
        block += p.grad_summaries * gradient(flash, rows, cols)
        block += p.grad_locals * gradient(flash, cols, rows)
    else:
        block, launches = kernel(score, read + pairs * weight * p.needs_grad), 6
        product, operands = pairs * p.K / mma, (pairs + locals_ + summaries) * weight
        if p.needs_grad and (few_launches or not (kept or p.row.family == "pointwise" or p.weights_known)):
            block, launches = block + kernel(score, read), launches + 6
        if p.grad_summaries:
            block += kernel(product, operands + summaries * (4 if col_blocks == 1 else 12))
        if p.grad_locals:
            block += kernel(product, operands + locals_ * (4 if row_blocks == 1 else 8))
        launches = 8 if few_launches else 20 + blocks * (launches + 3 * (p.grad_summaries + p.grad_locals))

    features = p.held * p.L * p.K
    seconds = blocks * block + features * item / chip.bandwidth  # and once for the own-image pairs
    if not p.in_place:
        copies = row_blocks if col_blocks > 1 else 1
        seconds += copies * features * (p.dtype.itemsize + item) / chip.bandwidth
    # backward reads the float32 gradients and writes them in the inputs' dtype
    outputs = p.grad_locals * features + p.grad_summaries * p.rows * p.K
    seconds += outputs * (4 + p.dtype.itemsize) / chip.bandwidth
    if stored == torch.float16:  # the scale comes into a gradient that is made
        seconds += p.grad_locals * features * 8 / chip.bandwidth
    seconds += launches * _DEVICE_LAUNCH
    return max(seconds, launches * _HOST_LAUNCH), seconds


def floor(p: Problem, chip: Chip) -> float:
    """Seconds of the bare products: one for the loss, one for each gradient."""
    gemms = 1 + p.grad_locals + p.grad_summaries
    return gemms * p.rows * p.held * p.L * p.K / mma_rate(p, chip)


def choices(p: Problem, chip: Chip, budget: int) -> Iterator[tuple[tuple[float, float], int, str, int, int, GpuChoice]]:
    """(predicted seconds, scratch, order, row images, column images, choice) of all blocks that fit."""
    least = floor(p, chip)
    flash = flash_tile(chip, p) if p.needs_grad else None
    if flash is not None:
        # a log-sum-exp row's sum is found with its gradient: what is kept until then are numbers of its own size
        kept = p.row.family != "pointwise" and not p.weights_known
        for col_images in _sizes(p.held):
            scratch = flash_scratch_bytes(p, chip, flash, col_images)
            if scratch > budget or max(p.rows, col_images * p.L) >= 2**30:
                continue
            for tile in tiles_for(chip, p.operand_dtype):
                seconds = predict(p, chip, tile, p.N, col_images, kept, flash=flash)
                choice = GpuChoice(chip, tile, seconds[0], least, flash=flash)
                yield seconds, scratch, "rows outside" if kept else "columns outside", p.N, col_images, choice
    scratch = scratch_bytes(p, p.N, p.N, False)
    alone = p.shard is None and p.row.family != "global_lse"  # a row is closed by one program, which sees all of it
    if alone and p.needs_grad and not p.weights_known and scratch <= budget:
        for tile in tiles_for(chip, p.operand_dtype):
            seconds = predict(p, chip, tile, p.N, p.N, False, few_launches=True)
            yield seconds, scratch, "columns outside", p.N, p.N, GpuChoice(chip, tile, seconds[0], least, True)
        if p.N <= _SMALL:
            return
    orders = ["columns outside"]
    if p.row.family != "pointwise" and p.needs_grad and not p.weights_known:
        orders.append("rows outside")
    for order in orders:
        kept = order == "rows outside"
        for row_images in _sizes(p.N):
            for col_images in _sizes(p.held):
                scratch = scratch_bytes(p, row_images, col_images, kept)
                if scratch > budget or max(row_images * p.P, col_images * p.L) >= 2**30:
                    continue
                for tile in tiles_for(chip, p.operand_dtype):
                    seconds = predict(p, chip, tile, row_images, col_images, kept)
                    yield seconds, scratch, order, row_images, col_images, GpuChoice(chip, tile, seconds[0], least)


def mma_rate(p: Problem, chip: Chip) -> float:
    """Multiply-adds a second of the whole chip in the problem's operand dtype."""
    kind = "half" if p.operand_dtype.itemsize == 2 else precision()
    rates = _MMA[kind]
    arch = chip.arch if chip.maker == "cuda" else 90
    return rates[max(a for a in rates if a <= arch)] * chip.multiprocessors * chip.clock


def precision() -> str:
    """How float32 operands are multiplied: torch's own choice for its matrix products, "ieee" or "tf32"."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@lru_cache
def _calls(text: str) -> tuple[str, ...]:
    return tuple(
        n.func.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    )


def map_instructions(p: Problem) -> int:
    """An element's instructions in the map."""
    texts = {p.row.psi_text, p.row.phi_text} if p.needs_grad else {p.row.psi_text}
    clip = 20 if p.clip is not None else 0
    return _MAP_INSTRUCTIONS + clip + sum(_INSTRUCTIONS[name] for text in texts for name in _calls(text))


def _filled(chip: Chip, tile: Tile, rows: int, cols: int) -> float:
    """The share of the multiprocessors' time that tiles keep busy: the ragged ones and the last wave waste some."""
    tiles = -(-rows // tile.BM) * -(-cols // tile.BN)
    at_once = chip.multiprocessors * tile.programs
    whole = rows * cols / (tiles * tile.BM * tile.BN)
    # a wave that is not full still gives each of its programs the room of those that are missing, up to one for each
    waves = tiles // at_once + min(1.0, -(-(tiles % at_once) // chip.multiprocessors) / tile.programs)
    return whole * tiles / (waves * at_once)


def _sizes(N: int) -> list[int]:
    """Block sizes to try: even blocks, 1, 2, 3, 4, 6, 8, 12, 16, ... of them, and at last single images."""
    counts = {1, *(count for power in range(N.bit_length()) for count in (2**power, 3 * 2**power) if count < N), N}
    return sorted({-(-N // count) for count in counts}, reverse=True)


def _padded(K: int) -> int:
    return -(-K // 16) * 16
