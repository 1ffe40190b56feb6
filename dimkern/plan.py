"""What to compute and how: a Problem, and the frozen Plan that a backend carries out.

Owns every choice (backend, loop order, block and tile sizes) and the reasons for it. Computes no loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import gpu_plan
from .estimators import REGISTRY, Estimator
from .gpu import Chip, chip_of
from .native import WHY_NOT_LOADED, bf16_inner, warn_once, why_not_cuda

BACKENDS = ("cuda", "triton", "cpu", "streaming", "reference")  # in the order "auto" tries them

# A tile holds scores that are mapped right after they are made: about the last-level cache on a CPU
# (measured: 2 to 8 MB are alike), large enough to fill the chip on an accelerator.
_TILE_BYTES = {"cpu": 4 * 2**20}
_ACCELERATOR_TILE_BYTES = 128 * 2**20
# Row blocks beyond which a fourth GEMM is cheaper than rewriting the locals' gradient once a block.
_MOST_ROW_BLOCKS = 64
# Of the native library, whatever its instruction set: rows of a strip, of a tile at least, columns of a panel at
# least and at most, elements of a thread's tile.
_NATIVE_LANES, _NATIVE_ROWS, _NATIVE_PANELS, _NATIVE_TILE = 32, 256, (120, 288), 165_000
# Of the CUDA library: the largest batch that its small tiles suit, columns of a panel, bytes that rows are padded to.
_MOST_CUDA_IMAGES, _CUDA_PANEL, _CUDA_PADDING = 512, 64, 16
_ROW_STATISTICS = 8  # float64 numbers a row and column block that close the row


class Problem(NamedTuple):  # as quickly made, hashed and compared as small batches need it
    """One call, without its tensors. Letters as in MATHS.md §1."""

    estimator: str
    N: int
    P: int
    L: int
    K: int
    dtype: torch.dtype  # of the local features
    score_dtype: torch.dtype  # of scores, sums and gradient accumulation
    device: torch.device
    staged: bool  # the (N·L, K) matrix of local features is no view in score_dtype: blocks are copied
    weights_known: bool  # alpha is known before the pairs are seen (upstream weights given)
    grad_locals: bool
    grad_summaries: bool
    clip: float | None = None
    threads: int = 1
    strided: bool = True  # the local features are (N, L, K) with strides, not (N, H, W, K)
    critic: str = "dot"  # or "pair_mlp", whose K is H, the units of a hidden layer
    grad_critic: bool = False
    summaries_dtype: torch.dtype = torch.float32
    aligned: bool = False  # the local features are a matrix that a GPU's wide loads can read as it is
    bf16_products: bool = False  # the native library multiplies the inputs' bfloat16 numbers as they are
    staged_panels: bool = False  # the native library copies the local features, a panel at a time
    shard: tuple[int, int] | None = None  # first and last + 1 of the images whose locations are here; None: all N

    @property
    def rows(self) -> int:
        """R, the number of summary vectors."""
        return self.N * self.P

    @property
    def here(self) -> slice:
        """The images whose local features this process scores; the summaries of all N are scored against them."""
        first, stop = self.shard or (0, self.N)
        return slice(first, stop)

    @property
    def held(self) -> int:
        """How many images `here` has."""
        first, stop = self.shard or (0, self.N)
        return stop - first

    @property
    def needs_grad(self) -> bool:
        return self.grad_locals or self.grad_summaries or self.grad_critic

    @property
    def row(self) -> Estimator:
        return REGISTRY[self.estimator]

    @property
    def operand_dtype(self) -> torch.dtype:
        """What a GPU's tensor cores multiply: the inputs' own half precision where they share one."""
        return self.dtype if self.dtype == self.summaries_dtype else self.score_dtype

    @property
    def locals_gradient_dtype(self) -> torch.dtype:
        return locals_gradient_dtype(self.device, self.dtype, self.summaries_dtype)

    @property
    def in_place(self) -> bool:
        """A GPU reads the local features where they are."""
        return self.aligned and self.dtype == self.operand_dtype

    @property
    def itemsize(self) -> int:
        return self.score_dtype.itemsize


def describe(
    estimator: str,
    c: Tensor,  # (N, L, K), or (N, H, W, K) where H and W do not merge
    g: Tensor,  # (N, P, K)
    *,
    clip: float | None,
    grad_locals: bool,
    grad_summaries: bool,
    weights_known: bool = False,
    critic: str = "dot",
    grad_critic: bool = False,
) -> Problem:
    """The Problem that these tensors pose."""
    N, *inner, K = c.shape
    L = math.prod(inner)
    score_dtype = score_dtype_of(c.dtype, g.dtype)
    on_cpu, strided, matrix = c.device.type == "cpu", c.ndim == 3, is_matrix_view(c)
    staged = c.dtype != score_dtype or not matrix
    bf16_products = on_cpu and strided and c.dtype == g.dtype == torch.bfloat16 and bf16_inner() > 0
    staged_panels = not (matrix and K % bf16_inner() == 0) if bf16_products else staged
    return Problem(
        estimator, N, g.shape[1], L, K, c.dtype, score_dtype, c.device, staged, weights_known, grad_locals,
        grad_summaries, clip, torch.get_num_threads() if on_cpu else 1, strided, critic, grad_critic, g.dtype,
        matrix and _rows_aligned(c, N * L, c.stride(1) if L > 1 else c.stride(0)), bf16_products, staged_panels,
    )  # fmt: skip


def score_dtype_of(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if any input is, else float32: half precision is never accumulated in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def locals_gradient_dtype(device: torch.device, dtype: torch.dtype, summaries_dtype: torch.dtype) -> torch.dtype:
    """What the ops return the gradient by the local features in, before the upstream factor.

    The scores' dtype, but for bfloat16 features on a CPU, where writing float32 and casting it took up to a quarter of
    a whole loss. Nothing is out of bfloat16's range; rounded before and after the factor, a gradient is off by 2^-7 of
    itself at most. float16 would lose small gradients before a loss scale reaches them.
    """
    score_dtype = score_dtype_of(dtype, summaries_dtype)
    rounds = device.type == "cpu" and dtype == torch.bfloat16 and score_dtype == torch.float32
    return dtype if rounds else score_dtype


def is_matrix_view(c: Tensor) -> bool:
    """c reads as a row-major (N·L, K) matrix without a copy."""
    if c.ndim == 4:
        return False
    N, L, K = c.shape
    rows_merge = N == 1 or L == 1 or c.stride(0) == L * c.stride(1)
    row_stride = c.stride(1) if L > 1 else c.stride(0)
    return rows_merge and (K == 1 or c.stride(2) == 1) and row_stride >= K


def is_aligned(x: Tensor) -> bool:
    """A matrix (rows, K) begins, and every row of it, at a multiple of 16 elements: wide loads and TMA can read it."""
    return _rows_aligned(x, x.shape[0], x.stride(0))


def _rows_aligned(x: Tensor, rows: int, row_stride: int) -> bool:
    """The same of a tensor (..., K) that reads as such a matrix."""
    K = x.shape[-1]
    return (
        K % 16 == 0
        and x.stride(-1) == 1
        and row_stride % 16 == 0
        and (rows == 1 or row_stride >= K)
        and x.data_ptr() % 16 == 0
    )


@dataclass(frozen=True)
class Plan:
    """How one backend runs one problem. Blocks are whole images, so that own-image pairs form a block diagonal."""

    problem: Problem
    backend: str
    order: str  # "rows outside" (a row block's weights are kept until its alpha is known) | "columns outside"
    row_images: int  # images per block of rows: row_images * P rows
    col_images: int  # images per block of columns: col_images * L columns
    budget: int  # bytes
    scratch: int  # bytes expected beyond inputs, outputs and gradients (in the dtype they are summed in)
    gpu: gpu_plan.GpuChoice | None = None

    def row_blocks(self) -> Iterator[slice]:
        return blocks(self.problem.N, self.row_images)

    def col_blocks(self) -> Iterator[slice]:
        return blocks(self.problem.held, self.col_images, self.problem.here.start)

    @property
    def summed_dtype(self) -> torch.dtype:
        """What the tiles make the gradient by the local features in: rounded at once where no second block adds."""
        rounds = self.backend == "cpu" and _rounds_at_once(self.problem, self.row_images)
        return self.problem.locals_gradient_dtype if rounds else self.problem.score_dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        """What a GPU rounds weights to."""
        in_registers = self.gpu is not None and self.gpu.flash is not None
        return gpu_plan.weight_dtype(self.problem, self.order == "rows outside" or in_registers)

    @property
    def gemms(self) -> int:
        """Matrix products over all pairs."""
        p = self.problem
        gradients = p.grad_locals + p.grad_summaries
        if self.gpu is not None and self.gpu.flash is not None:  # the summaries' kernel makes the sums too
            return 2 * gradients + (not p.grad_summaries)
        if p.critic == "pair_mlp":  # the gradient by the first hidden layer serves both inputs
            gradients = p.grad_critic + (p.grad_locals or p.grad_summaries)
        again = self.order == "columns outside" and p.row.family != "pointwise" and p.needs_grad and not p.weights_known
        return 1 + gradients + again

    @property
    def flops(self) -> int:
        p = self.problem
        return self.gemms * 2 * p.rows * p.held * p.L * p.K * (p.K if p.critic == "pair_mlp" else 1)


def blocks(images: int, block: int, first: int = 0) -> Iterator[slice]:
    """So many images from `first` on in blocks, the last perhaps smaller."""
    for start in range(first, first + images, block):
        yield slice(start, min(start + block, first + images))


def within(images: slice, block: slice) -> slice:
    """Where `images` are among those of `block`."""
    return slice(images.start - block.start, images.stop - block.start)


def why_not(
    backend: str, device: torch.device, critic: str = "dot", score_dtype: torch.dtype = torch.float32
) -> str | None:
    """None if `backend` can serve tensors on `device`, else the reason a user should read."""
    if backend in ("reference", "streaming"):
        return None
    if critic == "pair_mlp" and backend in BACKENDS:
        return f"the {backend} backend has no kernels for the pair MLP critic; the streaming backend serves instead"
    if backend == "cpu":
        if device.type != "cpu":
            return f"the tensors are on {device}, not on the CPU"
        return WHY_NOT_LOADED
    if backend == "triton":
        found = "its kernels have no float64" if score_dtype == torch.float64 else chip_of(device)
        return found + "; the streaming backend serves instead" if isinstance(found, str) else None
    if backend == "cuda":
        reason = why_not_cuda(device)
        return reason and f"{reason}; the streaming backend serves instead"
    raise ValueError(f"backend is {backend!r}; accepted are 'auto', {', '.join(map(repr, sorted(BACKENDS)))}")


def choose_backend(
    backend: str, device: torch.device, critic: str = "dot", score_dtype: torch.dtype = torch.float32
) -> str:
    """The backend to use for the one asked for ("auto": the first that can).

    Raises:
        ValueError: an unknown backend, or one that cannot serve here (the message says why).
    """
    if backend == "auto":
        return next(name for name in BACKENDS if why_not(name, device, critic, score_dtype) is None)
    reason = why_not(backend, device, critic, score_dtype)
    if reason is not None:
        raise ValueError(f"backend is {backend!r}: {reason}")
    return backend


@lru_cache(maxsize=256)
def make_plan(problem: Problem, budget: int, backend: str = "streaming") -> Plan:
    """Loop order and block sizes of a backend within `budget` bytes.

    Raises:
        ValueError: not even one image against one image fits; the message says how much would.
    """
    p = problem
    if p.critic == "pair_mlp":
        return _pair_mlp_plan(p, budget, backend)
    if backend == "cuda":
        return Plan(p, backend, "rows outside", p.N, p.N, budget, _cuda_bytes(p))
    footprint, widest = {"streaming": (_streaming_bytes, _cached_tile), "cpu": (_cpu_bytes, _all_columns)}[backend]

    def plan(order: str, row_images: int, col_images: int) -> Plan:
        kept = order == "rows outside"
        return Plan(p, backend, order, row_images, col_images, budget, footprint(p, row_images, col_images, kept))

    def tiled(order: str, row_images: int) -> Plan:
        """The widest column blocks beside this many rows that the backend wants and the budget admits."""
        col_images = widest(p, row_images)
        while True:
            tried = plan(order, row_images, col_images)
            if tried.scratch <= budget or col_images == 1:
                return tried
            col_images = (col_images + 1) // 2

    def tallest(order: str) -> Plan | None:
        """The plan with the fewest row blocks that fits, blocks of even height."""
        blocks = 1
        while True:
            row_images = -(-p.N // blocks)
            tried = tiled(order, row_images)
            if tried.scratch <= budget:
                return tried
            if row_images == 1:
                return None
            blocks = max(blocks + 1, -(-p.N // (row_images - 1)))

    lean = tallest("columns outside")
    if lean is None:
        raise _too_small(budget, plan("columns outside", 1, 1))
    if p.row.family == "pointwise" or p.weights_known or not p.needs_grad:
        return lean
    fast = tallest("rows outside")
    return lean if fast is None or len(list(fast.row_blocks())) > _MOST_ROW_BLOCKS else fast


def _pair_mlp_plan(p: Problem, budget: int, backend: str) -> Plan:
    """Tiles of pairs whose hidden layers stay in the cache, about as many rows as columns.

    A row block's second hidden layer is kept as one truth value a unit, all that its gradients need, where the
    weights wait for the row's sum.
    """

    def plan(order: str, row_images: int, col_images: int) -> Plan:
        kept = order == "rows outside"
        scratch = _pair_mlp_bytes(p, row_images, col_images, kept)
        return Plan(p, backend, order, row_images, col_images, budget, scratch)

    pairs = _TILE_BYTES.get(p.device.type, _ACCELERATOR_TILE_BYTES) // (p.K * p.itemsize)
    col_images = max(1, min(p.held, int(pairs**0.5) // p.L))
    orders = ["columns outside"]
    if p.row.family != "pointwise" and p.needs_grad and not p.weights_known:
        orders.insert(0, "rows outside")
    for order in orders:
        cols, row_images = col_images, max(1, min(p.N, pairs // (col_images * p.L * p.P)))
        while True:
            tried = plan(order, row_images, cols)
            if tried.scratch <= budget:
                return tried
            if row_images == cols == 1:
                break
            row_images, cols = ((row_images + 1) // 2, cols) if row_images >= cols else (row_images, (cols + 1) // 2)
    raise _too_small(budget, tried)


def _too_small(budget: int, least: Plan) -> ValueError:
    p = least.problem
    width = "H" if p.critic == "pair_mlp" else "K"
    return ValueError(
        f"memory_budget is {format_bytes(budget)}; this problem (N={p.N}, P={p.P}, L={p.L}, {width}={p.K}) needs "
        f"at least {format_bytes(_rounded_up(least.scratch))}: raise it with dimkern.config(memory_budget=...) "
        "or the environment variable DIMKERN_MEMORY_BUDGET"
    )


def plan_on_chip(problem: Problem, budget: int, chip: Chip) -> Plan:
    """The plan that takes the least time on a GPU by the model of `gpu_plan`; the chip need not be there.

    Raises:
        ValueError: not even one image against one image fits; the message says how much would.
    """
    return _plan_on_chip(problem, budget, chip, gpu_plan.precision())


@lru_cache(maxsize=256)
def _plan_on_chip(p: Problem, budget: int, chip: Chip, precision: str) -> Plan:
    found = min(gpu_plan.choices(p, chip, budget), key=lambda choice: choice[:2], default=None)
    if found is None:
        scratch = gpu_plan.scratch_bytes(p, 1, 1, False)
        raise _too_small(budget, Plan(p, "triton", "columns outside", 1, 1, budget, scratch))
    _, scratch, order, row_images, col_images, choice = found
    return Plan(p, "triton", order, row_images, col_images, budget, scratch, choice)


def plan_for(problem: Problem, budget: int, backend: str) -> Plan:
    """The plan of the backend asked for; "auto": of the first one that can serve and whose plan fits."""
    if backend == "auto":
        chosen = next(name for name in BACKENDS if unfit(name, problem, budget) is None)
    else:
        chosen = choose_backend(backend, problem.device, problem.critic, problem.score_dtype)
        if chosen == "cuda" and (reason := cuda_cannot(problem, budget)):
            raise ValueError(f"backend is 'cuda': {reason}")
    if problem.critic != "dot":
        return make_plan(problem, budget, chosen)
    if chosen == "triton":
        chip = chip_of(problem.device)
        assert isinstance(chip, Chip), chip  # or it would not have been chosen
        return plan_on_chip(problem, budget, chip)
    if backend == "auto" and chosen == "streaming" and problem.device.type == "cpu":
        reason = why_not("cpu", problem.device)
        if reason is not None:
            warn_once(reason)
    return make_plan(problem, budget, chosen)


def unfit(backend: str, problem: Problem, budget: int) -> str | None:
    """Why "auto" passes over a backend for this problem; None if it does not."""
    p = problem
    reason = why_not(backend, p.device, p.critic, p.score_dtype)
    if reason is not None or backend not in ("cpu", "cuda", "triton"):
        return reason
    if backend == "cuda" and p.shard is not None:
        return "it does not serve a group"
    if backend == "triton":
        least = gpu_plan.scratch_bytes(p, 1, 1, False)
        room = f"its smallest blocks take {format_bytes(least)}, the memory budget is {format_bytes(budget)}"
        return room if least > budget else None
    if backend == "cpu":
        return too_small_for_cpu(p, budget)
    if p.N > _MOST_CUDA_IMAGES:
        return f"its tiles are for small batches, N up to {_MOST_CUDA_IMAGES}; N is {p.N}"
    if p.weights_known:
        return "its kernels make mean losses; other reductions it would leave to the streaming backend's products"
    return cuda_cannot(p, budget)


def cuda_cannot(problem: Problem, budget: int) -> str | None:
    """Why the CUDA library, where the device is right for it, cannot serve this problem; None if it can."""
    p = problem
    if p.score_dtype == torch.float64:
        return "its kernels have no float64"
    if p.dtype != p.summaries_dtype:
        return f"its kernels take inputs of one dtype; l is {p.dtype}, m is {p.summaries_dtype}"
    if p.dtype == torch.float32 and gpu_plan.precision() != "tf32":
        return "its kernels round products of float32 to tf32, which torch.backends.cuda.matmul rules out"
    least = _cuda_bytes(p)
    if least > budget:
        return f"it takes the batch as a whole: {format_bytes(least)}, the memory budget is {format_bytes(budget)}"
    return None


@lru_cache(maxsize=256)
def too_small_for_cpu(problem: Problem, budget: int) -> str | None:
    """Why "auto" leaves the native backend to streaming, whose tiles can be smaller; None if it does not."""
    least = _cpu_bytes(problem, 1, 1, False)
    if least <= budget:
        return None
    return f"its tiles take {format_bytes(least)}, the memory budget is {format_bytes(budget)}"


def _cached_tile(p: Problem, row_images: int) -> int:
    """Column images that make a tile of the size that maps fastest."""
    tile_bytes = _TILE_BYTES.get(p.device.type, _ACCELERATOR_TILE_BYTES)
    return max(1, min(p.held, tile_bytes // (row_images * p.P * p.L * p.itemsize)))


def _all_columns(p: Problem, row_images: int) -> int:
    """The native library makes its own tiles."""
    return p.held


def _streaming_bytes(p: Problem, row_images: int, col_images: int, kept: bool) -> int:
    rows, cols = row_images * p.P, col_images * p.L
    beside = not (p.row.shares_map and p.row.phi.in_place)  # psi, or what phi is made from
    tiles = 1 + beside + (p.clip is not None)  # the soft clip's slope
    products = rows * p.K * p.itemsize if p.needs_grad else 0  # alpha∘G, then alpha∘(E·C)
    kept_bytes = rows * p.held * p.L * p.itemsize if kept else 0
    tile = rows * cols * tiles * p.itemsize
    return _common_bytes(p, rows, col_images) + tile + products + kept_bytes + _staging_bytes(p, col_images)


def _cpu_bytes(p: Problem, row_images: int, col_images: int, kept: bool) -> int:
    rows = -(-row_images * p.P // _NATIVE_LANES) * _NATIVE_LANES
    given = p.rows * p.K * p.itemsize  # summaries as the kernels take them, where that is a copy
    tiles = p.threads * _NATIVE_TILE * p.itemsize
    packed = (2 + p.threads - 1) * rows * (p.K + _NATIVE_LANES) * p.itemsize  # summaries twice, partial gradients
    blocks = -(-p.held // col_images)
    panels = p.held * p.L // _NATIVE_PANELS[0] + blocks * p.threads  # with a row of references each
    kept_bytes = rows * (p.held * p.L + panels) * p.itemsize if kept else 0
    staging = _staging_bytes(p, own_images(p) if p.strided else col_images)
    staging += p.threads * _NATIVE_PANELS[1] * p.K * p.itemsize if p.staged_panels else 0
    if rows > _NATIVE_ROWS and _rounds_at_once(p, row_images):
        staging += p.threads * _NATIVE_PANELS[1] * (p.K + _NATIVE_LANES) * p.itemsize  # sums that are rounded at last
    own = rows * p.L * p.itemsize if p.shard else 0  # weights of own-image pairs, zeros for those that are elsewhere
    return _common_bytes(p, rows, col_images) + given + tiles + packed + kept_bytes + staging + own


def _pair_mlp_bytes(p: Problem, row_images: int, col_images: int, kept: bool) -> int:
    rows, cols = row_images * p.P, col_images * p.L
    beside = not (p.row.shares_map and p.row.phi.in_place)  # psi, or what phi is made from
    scores = rows * cols * (1 + beside + (p.clip is not None)) * p.itemsize
    layers = rows * cols * p.K * p.itemsize * (2 + (p.grad_locals or p.grad_summaries))
    weights = p.K * (p.K + 4) * p.itemsize if p.needs_grad else 0  # w3∘W2
    kept_bytes = rows * p.held * p.L * (p.K + p.itemsize) if kept else 0
    reduced = (rows + cols) * p.K * p.itemsize if p.needs_grad else 0
    return _common_bytes(p, rows, col_images) + scores + layers + weights + kept_bytes + reduced


def _cuda_bytes(p: Problem) -> int:
    if p.weights_known:
        return _streaming_bytes(p, p.N, p.N, False)
    itemsize, wide = p.dtype.itemsize, _CUDA_PADDING // p.dtype.itemsize
    rows, cols, K = p.rows, p.N * p.L, -(-p.K // wide) * wide
    copies = (cols + 2 * rows) * K * itemsize  # features as wide rows, alpha∘G
    weights = rows * (-(-cols // wide) * wide) * itemsize if p.needs_grad else 0
    statistics = rows * (2 * -(-cols // _CUDA_PANEL) + p.L + 3) * 4
    return copies + weights + statistics


def _rounds_at_once(p: Problem, row_images: int) -> bool:
    """The native kernels round the gradient by the local features as they make it; a group sums it in float32."""
    alone = row_images == p.N and p.shard is None
    return p.grad_locals and alone and p.locals_gradient_dtype != p.score_dtype


def own_images(p: Problem) -> int:
    """Images that the native backend stages at a time where it needs own-image pairs alone."""
    return max(1, min(p.held, _NATIVE_PANELS[1] // p.L))


def _common_bytes(p: Problem, rows: int, col_images: int) -> int:
    """Scaled summaries, positives and their weights, row statistics."""
    positives = p.held * p.P * p.L * (2 * p.itemsize + 3 * 8)
    statistics = (p.rows * _ROW_STATISTICS + rows * 3 * -(-p.held // col_images)) * 8
    return p.rows * p.K * p.itemsize + positives + statistics


def _staging_bytes(p: Problem, col_images: int) -> int:
    """A block of local features copied to a matrix in the score dtype."""
    return col_images * p.L * p.K * p.itemsize if p.staged else 0


def _rounded_up(size: int) -> int:
    """To the three digits that `format_bytes` shows, so that what it shows is enough."""
    step = int(10 ** max(0, len(str(size)) - 3))
    return -(-size // step) * step


def format_bytes(size: float) -> str:
    """Bytes as text in decimal units, as `memory_budget` reads them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
