"""A loss whose batch spans the processes of a group (MATHS.md §3, "Several processes").

Every process gives the local features and summaries of its own images. Summaries are gathered; each process scores
all of them against its own locations, whose gradient therefore stays; the summaries' gradient is summed and scattered.
Owns the order of these steps, their autograd, and what the processes must agree on.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops, pair_ops, streaming
from .config import memory_budget
from .critics import PairMLP
from .distributed import MESSAGE_BYTES, Collectives, GroupError, Term, exchange
from .estimators import Scores, item_losses, parts
from .gpu import Chip, chip_of
from .gpu_plan import precision
from .plan import Plan, Problem, choose_backend, describe, plan_for, why_not

SERVES = ("triton", "cpu", "streaming")  # backends whose tiles score all rows against a shard of the columns
# how the tensors of a process lie in memory: the plan is for what any of them needs, or all of them allow
_ANY, _ALL = ("staged", "staged_panels"), ("strided", "aligned", "bf16_products")
_SAME_SCALE = 1e-4  # relative; processes may round an exponential differently


@dataclass(frozen=True)
class Call:
    """What the processes agreed on, and this one's plan."""

    group: dist.ProcessGroup
    counts: tuple[int, ...]  # images of each rank
    plan: Plan
    kappa: float
    grad_c: bool  # this process needs the gradient of its own local features

    def collectives(self) -> Collectives:
        return Collectives(self.group, list(self.counts))

    @property
    def world(self) -> int:
        return len(self.counts)


class Means(NamedTuple):
    """Means over the whole batch: of the item losses, and the parts of the loss; detached but for `loss`."""

    loss: Tensor
    e_pos: Tensor
    e_neg: Tensor
    mi: Tensor


@dataclass(frozen=True)
class Terms:
    """What one process brings to a call: what all must have in common, and what they join."""

    problem: Problem  # of its own images
    kappa: float
    backend: str
    common: dict[str, Term]
    own: dict[str, Term]


def terms(
    estimator: str,
    c: Tensor,  # (n, L, K) or (n, H, W, K); of the pair MLP its first layer (n, L, H)
    g: Tensor,  # (n, P, K), or (n, P, H)
    *,
    scale: float | Tensor | None,
    clip: float | None,
    kappa: float,
    reduction: str,
    needed: tuple[bool, bool, bool],  # gradients by c, by scale * g, by the critic's weights
    backend: str,
    critic: str = "dot",
) -> Terms:
    """The terms of this process.

    Raises:
        ValueError: a backend that does not serve a group.
    """
    grad_c, grad_g, grad_critic = needed
    p = describe(
        estimator, c, g, clip=clip, grad_locals=grad_c, grad_summaries=grad_g, weights_known=reduction == "none",
        critic=critic, grad_critic=grad_critic,
    )  # fmt: skip
    backend = planned_backend(backend, p)
    chosen = next(name for name in SERVES if backend in ("auto", name) and _serves(name, p))
    common: dict[str, Term] = {
        "critic": critic, "the kind of device": p.device.type, "P": p.P, "L": p.L, "K": p.K,
        "the dtype of l": _short(c.dtype), "the dtype of m": _short(g.dtype), "the loss": estimator,
        "reduction": reduction, "self_mask": "official" if kappa else "exclude", "clip": clip,
        "backend": chosen, "the GPU": _gpu(p.device) if chosen == "triton" else None,
    }  # fmt: skip
    own: dict[str, Term] = {
        "images": p.N, "scale": _value(scale), "budget": memory_budget(c.device), "threads": p.threads,
        "grad_c": grad_c, "grad_g": grad_g, "grad_critic": grad_critic,
        **{name: getattr(p, name) for name in (*_ANY, *_ALL)},
    }  # fmt: skip
    return Terms(p, kappa, backend, common, own)


def check_critic_reduction(reduction: str) -> None:
    """Refuse the reduction whose backward, with a critic's weights, no group's collectives are written for."""
    if reduction == "none":
        raise ValueError("reduction is 'none'; with a critic over a group accepted are 'mean', 'sum'")


def planned_backend(backend: str, p: Problem) -> str:
    """The backend to plan for over a group, of the one asked for.

    Raises:
        ValueError: a backend that does not serve a group.
    """
    if backend != "auto" and choose_backend(backend, p.device, p.critic, p.score_dtype) not in SERVES:
        raise ValueError(f"backend is {backend!r}; over a group accepted are 'auto', {', '.join(map(repr, SERVES))}")
    return backend


def _serves(backend: str, p: Problem) -> bool:
    return why_not(backend, p.device, p.critic, p.score_dtype) is None


def _gpu(device: torch.device) -> str:
    """What the plan on a GPU is made from besides the problem."""
    chip = chip_of(device)
    assert isinstance(chip, Chip), chip  # or it would not have been chosen
    clock, bandwidth = f"{chip.clock / 1e6:.0f}MHz", f"{chip.bandwidth / 1e9:.0f}GB/s"
    return f"{chip.name} {chip.multiprocessors}x{clock} {bandwidth} {precision()}"


def sent(plan: Plan) -> list[int]:
    """Bytes that a process contributes to each collective of a call and its backward, where all have as many images."""
    p, wide = plan.problem, streaming.wide(plan.problem).itemsize
    numbers = p.P * p.K
    calls = [MESSAGE_BYTES, p.held * numbers * p.summaries_dtype.itemsize, 4 * wide, MESSAGE_BYTES]
    known, one_pass = p.weights_known, plan.order == "columns outside" or not p.needs_grad
    for rows in [slice(0, p.N)] if one_pass or p.row.family != "row_lse" else plan.row_blocks():
        statistic = wide * (1 if p.row.family == "global_lse" else (rows.stop - rows.start) * p.P)
        of_weights = p.row.family == "row_lse" and p.needs_grad and not known
        calls += [statistic] * ((1 if p.row.family == "pointwise" else 2) + of_weights)
    if p.needs_grad and known:  # the backward of reduction="none" sweeps the pairs again
        calls += [p.rows * p.itemsize, MESSAGE_BYTES]
    if p.grad_summaries or (p.needs_grad and known):
        calls.append(p.N * numbers * p.itemsize)
    return calls


def agree(group: dist.ProcessGroup, mine: Terms) -> Call:
    """Exchange terms with the group and plan the call: every process arrives at the same blocks.

    Raises:
        GroupError: the processes disagree, or one of them refused its inputs.
        ValueError: one image in the whole group, or a memory budget that is too small: on every process.
    """
    p, shared = mine.problem, len(mine.common)
    said = exchange(group, [*mine.common.values(), *mine.own.values()])
    for i, (name, value) in enumerate(mine.common.items()):
        _check_same(name, value, [terms[i] for terms in said])
    every: dict[str, Any] = {name: [terms[shared + i] for terms in said] for i, name in enumerate(mine.own)}
    _check_same_scale(every["scale"])
    if p.weights_known:  # reduction="none", whose backward is a collective too
        needs = [a or b for a, b in zip(every["grad_c"], every["grad_g"], strict=True)]
        _check_same("whether a gradient is needed", p.needs_grad, needs)
    counts, rank = every["images"], dist.get_rank(group)
    joined: dict[str, Any] = {name: any(every[name]) for name in _ANY} | {name: all(every[name]) for name in _ALL}
    own: dict[str, Any] = {name: getattr(p, name) for name in joined}
    largest = p._replace(
        N=sum(counts), shard=(0, max(counts)), threads=max(every["threads"]),
        grad_locals=any(every["grad_c"]) or p.weights_known, grad_summaries=any(every["grad_g"]) or p.weights_known,
        grad_critic=any(every["grad_critic"]), **joined,
    )  # fmt: skip
    plan = plan_for(largest, min(every["budget"]), mine.backend)
    first = sum(counts[:rank])
    here = largest._replace(shard=(first, first + p.N), **own)
    return Call(group, tuple(counts), replace(plan, problem=here), mine.kappa, p.grad_locals)


def _value(scale: float | Tensor | None) -> Term:
    """The scale as the host knows it; reading an accelerator's would wait for all that is queued there."""
    if isinstance(scale, Tensor):
        return float(scale.detach()) if scale.device.type == "cpu" else None
    return 1.0 if scale is None else float(scale)


def _check_same(name: str, mine: Term, every: Sequence[Term]) -> None:
    for rank, value in enumerate(every):
        if value != mine:
            raise GroupError(f"the processes disagree on {name}: {mine} here, {value} on rank {rank} of the group")


def _check_same_scale(scales: list[Any]) -> None:
    known = [(rank, scale) for rank, scale in enumerate(scales) if scale is not None]
    for rank, scale in known:
        nans = math.isnan(scale) and math.isnan(known[0][1])
        if not nans and not math.isclose(scale, known[0][1], rel_tol=_SAME_SCALE):
            raise GroupError(
                f"the processes disagree on scale: {known[0][1]} on rank {known[0][0]} of the group, {scale} on rank "
                f"{rank}; a learnable one belongs in the module that DDP wraps"
            )


def mean_loss(call: Call, c: Tensor, g: Tensor, scale: Tensor) -> Means:
    """The mean loss of the whole batch; gradients of a process's inputs are W times the loss's."""
    return Means(*_MeanLoss.apply(c, g, scale, call))  # type: ignore[no-untyped-call]


def pair_mlp_mean_loss(call: Call, layers: PairMLP) -> Means:
    """The same with the pair MLP, its first layer applied; the gradients of its weights are W times this share's."""
    return Means(*_PairMLPMeanLoss.apply(*layers, call))  # type: ignore[no-untyped-call]


def items(call: Call, c: Tensor, g: Tensor, scale: Tensor) -> tuple[Tensor, Means]:
    """Item losses of this process's rows, and detached means over the whole batch."""
    positives, negatives, *means = _Scores.apply(c, g, scale, call)  # type: ignore[no-untyped-call]
    return item_losses(call.plan.problem.row, positives, negatives), Means(*means)


class _MeanLoss(torch.autograd.Function):
    """The gradients are made in the forward, where all but the scattered one's arrival is waited for."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, g: Tensor, scale: Tensor, call: Call) -> tuple[Tensor, ...]:
        p = call.plan.problem

        def compute(collectives: Collectives, absent: bool) -> Any:
            every = collectives.gather(g)
            d_c, d_h = ops._gradients(c, every, call.grad_c, p.grad_summaries)
            tiles = _Absent(p) if absent else ops._tiles(call.plan, c, every, scale, d_c, d_h)
            scores = streaming.in_blocks(tiles, call.plan, call.kappa, collectives)
            means = _means(call, collectives, _own(call, scores))
            return means, d_c, collectives.pack(d_h) if p.grad_summaries else None

        with ops._no_autocast(c):
            collectives, (means, d_c, packed) = _together(call, compute)
            ctx.arriving = collectives.scatter(*packed) if packed else None
        ctx.mark_non_differentiable(*means[1:])
        ctx.save_for_backward(g, scale, d_c)
        ctx.c_dtype, ctx.world = c.dtype, call.world
        return tuple(means)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        g, scale, d_c = ctx.saved_tensors
        d_h = ctx.arriving.wait() if ctx.arriving else g.new_empty(0)
        factor = d_loss * ctx.world
        return *ops._by_inputs(ctx.needs_input_grad[:3], d_c * factor, d_h * factor, ctx.c_dtype, g, scale), None  # type: ignore[no-untyped-call]


class _PairMLPMeanLoss(torch.autograd.Function):
    """As `_MeanLoss`: the summaries' part of the first layer is gathered; gradients by weights are this share's."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *weights, call = rest
        p = call.plan.problem
        needed = call.grad_c, p.grad_summaries, p.grad_critic

        def compute(collectives: Collectives, absent: bool) -> Any:
            layers = PairMLP(a, collectives.gather(b), *weights)
            gradients = pair_ops._gradients(layers, needed)
            tiles: Any = _Absent(p) if absent else pair_ops._tiles(call.plan, layers, gradients, needed)  # type: ignore[no-untyped-call]
            means = _means(
                call, collectives, _own(call, streaming.in_blocks(tiles, call.plan, call.kappa, collectives))
            )
            if not absent:
                tiles.finish_gradients()
            return means, gradients, collectives.pack(gradients[1]) if p.grad_summaries else None

        with ops._no_autocast(a):
            collectives, (means, gradients, packed) = _together(call, compute)
            ctx.arriving = collectives.scatter(*packed) if packed else None
        ctx.mark_non_differentiable(*means[1:])
        ctx.save_for_backward(gradients[0], *gradients[2:])
        ctx.world = call.world
        return tuple(means)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        by_a, *by_weights = ctx.saved_tensors
        by_b = ctx.arriving.wait() if ctx.arriving else by_a
        each = zip((by_a, by_b, *by_weights), ctx.needs_input_grad[:6], strict=True)
        factor = d_loss * ctx.world
        return *(x * factor if need else None for x, need in each), None


class _Scores(torch.autograd.Function):
    """Statistics of this process's rows; the backward sweeps the pairs again, and is a collective of the group."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, g: Tensor, scale: Tensor, call: Call) -> tuple[Tensor, ...]:
        def compute(collectives: Collectives, absent: bool) -> Any:
            every = collectives.gather(g)
            tiles = _Absent(call.plan.problem) if absent else ops._tiles(call.plan, c, every, scale)
            scores = streaming.measure(tiles, call.plan, call.kappa, collectives)
            return every, scores.negatives, _own(call, scores), _means(call, collectives, _own(call, scores))

        with ops._no_autocast(c):
            _, (every, negatives, own, means) = _together(call, compute)
        ctx.mark_non_differentiable(*means)
        ctx.save_for_backward(c, g, scale, every, negatives)
        ctx.call = call
        return own.positives, own.negatives.to(own.positives.dtype, copy=True), *means

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_positives: Tensor, d_negatives: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        c, g, scale, every, negatives = ctx.saved_tensors
        call: Call = ctx.call
        by_c = ctx.needs_input_grad[0]

        def compute(collectives: Collectives, absent: bool) -> Any:
            weights = collectives.rows(d_negatives, slice(0, collectives.N))
            d_c, d_h = ops._gradients(c, every, by_c, True)
            if not absent:
                tiles = ops._tiles(call.plan, c, every, scale, d_c, d_h)
                streaming.differentiate(tiles, call.plan, negatives, d_positives, weights)
            return d_c, collectives.pack(d_h)

        with ops._no_autocast(c):
            collectives, (d_c, packed) = _together(call, compute)
            d_h = collectives.scatter(*packed).wait()
        return *ops._by_inputs(ctx.needs_input_grad[:3], d_c, d_h, c.dtype, g, scale), None  # type: ignore[no-untyped-call]


def _together(call: Call, compute: Callable[[Collectives, bool], Any]) -> tuple[Collectives, Any]:
    """compute(collectives, absent=False); if it fails, the collectives it did not come to, then an error everywhere."""
    collectives, failure, done = call.collectives(), None, None
    try:
        done = compute(collectives, False)
    except Exception as error:
        collectives.replay(error)
        traceback.clear_frames(error.__traceback__)  # what it allocated is free again
        failure = error
    if failure is not None:
        compute(collectives, True)
    collectives.settle(failure)
    return collectives, done


def _own(call: Call, scores: Scores) -> Scores:
    """The statistics of this process's own rows."""
    return Scores(scores.positives, scores.negatives[call.plan.problem.here])


def _means(call: Call, collectives: Collectives, own: Scores) -> tuple[Tensor, ...]:
    """Means over the batch of what `Means` holds: every process's, by its share of the images."""
    p = call.plan.problem
    positives, negatives = own
    loss = item_losses(p.row, positives, negatives).mean()
    means = loss, *parts(p.row, positives, negatives, loss, candidates=1 + (p.N - 1) * p.L)
    share = torch.stack([x.to(streaming.wide(p)) for x in means]) * (p.held / p.N)
    # a tensor each: autograd refuses in-place arithmetic, such as loss /= 2, on views that a Function returns
    return tuple(x.clone() for x in collectives.total(share).to(p.score_dtype))


class _Absent:
    """Tiles of a process that failed: nothing is scored, and what the driver joins with the group are zeros."""

    def __init__(self, p: Problem) -> None:
        self._p = p

    def positives(self, images: slice) -> Tensor:
        p = self._p
        return torch.zeros(images.stop - images.start, p.P, p.L, dtype=p.score_dtype, device=p.device)

    def measure(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(rows.stop - rows.start, self._p.P, dtype=self._p.score_dtype, device=self._p.device)
        return zeros, zeros

    def weigh(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        return self.measure(rows, cols)

    def accumulate(self, rows: slice, cols: slice, alpha: Tensor, own: Tensor | None) -> None:
        pass

    def sweep(self, rows: slice, cols: slice, ref: Tensor | None, alpha: Tensor, own: Tensor) -> Tensor:
        return self.measure(rows, cols)[1]

    def whole(self, kappa: float) -> tuple[Tensor, Scores] | None:
        return None

    def rescale(self, factor: Tensor) -> None:
        pass

    def accumulate_own(self, own: Tensor) -> None:
        pass


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
