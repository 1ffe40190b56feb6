"""The torch.library ops: schemas, implementations, fakes and autograd. The only user of torch.library.

Local features come as (N, L, K) with any strides, or as (N, H, W, K) where no strides of (N, L, K) describe them.
Two ops pose one Problem:

- `mean_loss` returns the mean loss with its gradients already made (three GEMMs); backward multiplies
  them by the upstream scalar. They are in the dtype of the scores, but for that by c which is bfloat16
  on a CPU (`plan.locals_gradient_dtype`).
- `scores` returns the statistics that every other reduction is a small formula of; its backward, given
  their upstream gradients, sweeps the pairs again (`scores_backward`).

Everything a backend may choose by is in the arguments; the memory budget is read when the forward runs
and travels to the backward, which may run on another thread, as a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import streaming
from .backends.cpu import CpuTiles
from .backends.cuda import CudaTiles, chain
from .backends.torch import TorchTiles
from .config import memory_budget
from .estimators import Scores
from .plan import Plan, describe, locals_gradient_dtype, plan_for, score_dtype_of, why_not
from .validate import is_watched, refuse_tangents

_library = torch.library.Library("dimkern", "DEF")
_library.define(
    "mean_loss(Tensor c, Tensor g, Tensor scale, str estimator, float kappa, float? clip, bool grad_c, bool grad_g,"
    " str backend='streaming') -> (Tensor loss, Tensor positives, Tensor negatives, Tensor grad_c, Tensor grad_h)"
)
_library.define(
    "scores(Tensor c, Tensor g, Tensor scale, str estimator, float kappa, float? clip, str backend='streaming')"
    " -> (Tensor positives, Tensor negatives, Tensor budget)"
)
_library.define(
    "scores_backward(Tensor c, Tensor g, Tensor scale, Tensor negatives, Tensor d_positives, Tensor d_negatives,"
    " Tensor budget, str estimator, float? clip, bool grad_c, bool grad_g, str backend='streaming')"
    " -> (Tensor grad_c, Tensor grad_h)"
)

_mean_loss_op = torch.ops.dimkern.mean_loss.default
scores = torch.ops.dimkern.scores.default
_scores_backward = torch.ops.dimkern.scores_backward.default

_SECOND_DERIVATIVE = (
    "dimkern's losses cannot be differentiated twice: their gradient is made in the forward pass, without "
    "the pair tensor that a second derivative needs; use backend='reference' for that"
)


def _gradients(
    c: Tensor, g: Tensor, grad_c: bool, grad_g: bool, c_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Buffers for the gradients by c (in `c_dtype`, or the scores') and by scale * g; empty where nobody needs one."""
    dtype = score_dtype_of(c.dtype, g.dtype)
    return (
        c.new_empty(c.shape if grad_c else (0,), dtype=c_dtype or dtype),
        g.new_empty(g.shape if grad_g else (0,), dtype=dtype),
    )


def _triton_tiles() -> Callable[..., streaming.Tiles]:
    from .backends.triton.flash_tiles import FlashTiles  # which imports Triton: only where there is a chip for it
    from .backends.triton.tiles import TritonTiles

    return lambda plan, *tensors: (FlashTiles if plan.gpu.flash else TritonTiles)(plan, *tensors)


_TILES: dict[str, Callable[[], Callable[..., streaming.Tiles]]] = {
    "streaming": lambda: TorchTiles,
    "cpu": lambda: CpuTiles,
    "triton": _triton_tiles,
    "cuda": lambda: CudaTiles,
}


def _tiles(
    plan: Plan, c: Tensor, g: Tensor, scale: Tensor, grad_c: Tensor | None = None, grad_h: Tensor | None = None
) -> streaming.Tiles:
    backend = _TILES[plan.backend]()
    d_c = grad_c.flatten(1, -2) if grad_c is not None and grad_c.numel() else None
    d_h = grad_h if grad_h is not None and grad_h.numel() else None
    return backend(plan, c, g, scale, d_c, d_h)


def _mean_loss(
    c: Tensor, g: Tensor, scale: Tensor, estimator: str, kappa: float, clip: float | None, grad_c: bool, grad_g: bool,
    backend: str = "streaming",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss, scores, d_c, d_h = _loss_and_gradients(c, g, scale, estimator, kappa, clip, grad_c, grad_g, backend)
    if d_c is None or d_h is None:  # an op returns tensors
        d_c, d_h = _gradients(c, g, False, False, locals_gradient_dtype(c.device, c.dtype, g.dtype))
    return loss, *scores, d_c, d_h


def _loss_and_gradients(
    c: Tensor, g: Tensor, scale: Tensor, estimator: str, kappa: float, clip: float | None, grad_c: bool, grad_g: bool,
    backend: str,
) -> tuple[Tensor, Scores, Tensor | None, Tensor | None]:  # fmt: skip
    """The mean loss, its statistics and, where either is needed, both gradients as `_gradients` has them."""
    problem = describe(estimator, c, g, clip=clip, grad_locals=grad_c, grad_summaries=grad_g)
    plan = plan_for(problem, memory_budget(c.device), backend)
    d_c, d_h = _gradients(c, g, grad_c, grad_g, plan.summed_dtype) if grad_c or grad_g else (None, None)
    with _no_autocast(c):
        loss, scores = streaming.mean_loss(_tiles(plan, c, g, scale, d_c, d_h), plan, kappa)
    if d_c is not None and plan.summed_dtype != problem.locals_gradient_dtype:
        d_c = d_c.to(problem.locals_gradient_dtype)
    return loss, scores, d_c, d_h


def _scores(
    c: Tensor, g: Tensor, scale: Tensor, estimator: str, kappa: float, clip: float | None, backend: str = "streaming"
) -> tuple[Tensor, Tensor, Tensor]:
    # planned as the backward will be, so that a budget which suffices here suffices there
    problem = describe(estimator, c, g, clip=clip, grad_locals=True, grad_summaries=True, weights_known=True)
    budget = memory_budget(c.device)
    plan = plan_for(problem, budget, backend)
    with _no_autocast(c):
        positives, negatives = streaming.measure(_tiles(plan, c, g, scale), plan, kappa)
    return positives, negatives.to(positives.dtype, copy=True), torch.tensor(budget, dtype=torch.int64)


def _sweep(
    c: Tensor, g: Tensor, scale: Tensor, negatives: Tensor, d_positives: Tensor, d_negatives: Tensor, budget: Tensor,
    estimator: str, clip: float | None, grad_c: bool, grad_g: bool, backend: str = "streaming",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = describe(estimator, c, g, clip=clip, grad_locals=grad_c, grad_summaries=grad_g, weights_known=True)
    plan = plan_for(problem, int(budget), backend)
    d_c, d_h = _gradients(c, g, grad_c, grad_g, plan.summed_dtype)
    with _no_autocast(c):
        tiles = _tiles(plan, c, g, scale, d_c, d_h)
        streaming.differentiate(tiles, plan, negatives, d_positives, d_negatives)
    return d_c.to(problem.locals_gradient_dtype), d_h


def _no_autocast(c: Tensor) -> AbstractContextManager[None]:
    # below the dispatcher autocast still sees our matrix products, and would round the scores
    kind = c.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


_library.impl("mean_loss", _mean_loss, "CompositeExplicitAutograd")
_library.impl("scores", _scores, "CompositeExplicitAutograd")
_library.impl("scores_backward", _sweep, "CompositeExplicitAutograd")


@torch.library.register_fake("dimkern::mean_loss", lib=_library)
def _mean_loss_fake(c, g, scale, estimator, kappa, clip, grad_c, grad_g, backend="streaming"):
    dtype = score_dtype_of(c.dtype, g.dtype)
    (N, P, _), L = g.shape, c.shape[1:-1].numel()
    statistics = c.new_empty((N, P, L), dtype=dtype), c.new_empty((N, P), dtype=dtype)
    by_c = locals_gradient_dtype(c.device, c.dtype, g.dtype)
    return c.new_empty((), dtype=dtype), *statistics, *_gradients(c, g, grad_c, grad_g, by_c)


@torch.library.register_fake("dimkern::scores", lib=_library)
def _scores_fake(c, g, scale, estimator, kappa, clip, backend="streaming"):
    dtype = score_dtype_of(c.dtype, g.dtype)
    (N, P, _), L = g.shape, c.shape[1:-1].numel()
    statistics = c.new_empty((N, P, L), dtype=dtype), c.new_empty((N, P), dtype=dtype)
    return *statistics, torch.empty((), dtype=torch.int64)


@torch.library.register_fake("dimkern::scores_backward", lib=_library)
def _scores_backward_fake(
    c, g, scale, negatives, d_positives, d_negatives, budget, estimator, clip, grad_c, grad_g, backend="streaming"
):  # fmt: skip
    return _gradients(c, g, grad_c, grad_g, locals_gradient_dtype(c.device, c.dtype, g.dtype))


def _by_inputs(needed, d_c, d_h, c_dtype, g, scale):
    """Gradients by c, g and scale, those needed, from those by c and by scale * g (MATHS.md §1)."""
    by_c, by_g, by_scale = needed
    return (
        d_c.to(c_dtype) if by_c else None,
        (d_h if _is_one(scale) else d_h * scale).to(g.dtype) if by_g else None,
        (d_h * g).sum().to(scale.dtype) if by_scale else None,
    )


class _Once(torch.autograd.Function):
    """A gradient as it is; asking for its derivative by the inputs it was made from is an error."""

    @staticmethod
    def forward(ctx, gradient, *made_from):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_SECOND_DERIVATIVE)


class _MeanLoss(torch.autograd.Function):
    """The autograd of `mean_loss`: what torch.library generates from a formula would take longer than a small loss."""

    @staticmethod
    def forward(ctx, c, g, scale, loss, grad_c, grad_h, backend):
        ctx.set_materialize_grads(False)
        # c only where nothing else would tell a second derivative what it is asked for
        ctx.save_for_backward(g, scale, None if any(ctx.needs_input_grad[1:3]) else c, grad_c, grad_h)
        ctx.c_dtype, ctx.backend = c.dtype, backend
        ctx.mark_dirty(loss)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        if d_loss is None:  # a later function that gives no gradient
            return (None,) * 7
        g, scale, c, grad_c, grad_h = ctx.saved_tensors
        close = _in_one_launch(ctx, grad_c, g, d_loss)
        if close is not None:
            by_c, by_g, by_scale = ctx.needs_input_grad[:3]
            d_c, d_g = close(grad_c, grad_h, d_loss, scale, ctx.c_dtype, g.dtype)
            d_scale = ((grad_h * g).sum() * d_loss).to(scale.dtype) if by_scale else None
            return d_c if by_c else None, d_g if by_g else None, d_scale, *[None] * 4
        if not _leaves_as_it_is(d_loss):
            grad_c, grad_h = _times(grad_c, d_loss), grad_h * d_loss
        gradients = _by_inputs(ctx.needs_input_grad[:3], grad_c, grad_h, ctx.c_dtype, g, scale)
        if torch.is_grad_enabled():
            gradients = (None if x is None else _Once.apply(x, c, g, scale) for x in gradients)
        return *gradients, *[None] * 4


def _in_one_launch(ctx, grad_c, g, d_loss):
    """What closes the gradients with a kernel of ours: of real numbers that nothing will differentiate again."""
    plain = type(d_loss) is Tensor and not torch._C._functorch.is_batchedtensor(d_loss)
    if not plain or torch.is_grad_enabled() or grad_c.dtype != torch.float32:
        return None
    if ctx.c_dtype == g.dtype and why_not("cuda", grad_c.device) is None:
        return lambda grad_c, grad_h, d_loss, scale, _, dtype: chain(grad_c, grad_h, d_loss, scale, dtype)
    if ctx.backend in ("auto", "triton") and why_not("triton", grad_c.device) is None:
        from .backends.triton.backward import apply_upstream

        return apply_upstream
    return None


def _mean_loss_autograd(keyset, c, g, scale, *choices):
    refuse_tangents(c, g, scale)  # here too: while torch.compile traces, the public functions cannot see them
    with torch._C._AutoDispatchBelowAutograd():
        output = _mean_loss_op.redispatch(keyset & torch._C._after_autograd_keyset, c, g, scale, *choices)
    if not (torch.is_grad_enabled() and (c.requires_grad or g.requires_grad or scale.requires_grad)):
        return output
    loss, positives, negatives, grad_c, grad_h = output
    return _MeanLoss.apply(c, g, scale, loss, grad_c, grad_h, choices[-1]), positives, negatives, grad_c, grad_h


def mean_loss(
    c: Tensor, g: Tensor, scale: Tensor, estimator: str, kappa: float, clip: float | None, grad_c: bool, grad_g: bool,
    backend: str,
) -> tuple[Tensor, Scores]:  # fmt: skip
    """The mean loss, with the gradients that are needed behind it, and its statistics.

    The op of that name; where nothing would see it pass through the dispatcher, what the op does, as the two ways
    through Python and back are a third of a small batch's loss.
    """
    if is_watched(c, g, scale):
        loss, positives, negatives, _, _ = _mean_loss_op(c, g, scale, estimator, kappa, clip, grad_c, grad_g, backend)
        return loss, Scores(positives, negatives)
    if torch.is_inference_mode_enabled():  # no graph is made, whether gradients are enabled within it or not
        grad_c = grad_g = False
    with torch._C._AutoDispatchBelowAutograd():
        loss, scores, d_c, d_h = _loss_and_gradients(c, g, scale, estimator, kappa, clip, grad_c, grad_g, backend)
    return (loss if d_c is None else _MeanLoss.apply(c, g, scale, loss, d_c, d_h, backend)), scores


def _scaled(gradient, upstream):
    """A saved gradient times the upstream factor."""
    return gradient if _leaves_as_it_is(upstream) else _times(gradient, upstream)


def _times(gradient, upstream):
    """A gradient in its own dtype times the upstream factor, multiplied in the factor's and rounded once."""
    if gradient.dtype == upstream.dtype:
        return gradient * upstream
    factor = None if torch.is_grad_enabled() else _value(upstream)  # a number would hide what the factor depends on
    if factor is None:
        return (gradient.to(upstream.dtype) * upstream).to(gradient.dtype)
    return gradient * factor  # torch multiplies bfloat16 numbers by one number in float32


def _leaves_as_it_is(upstream):
    """Whether saved gradients are what the upstream factor makes of them, and may be handed out."""
    # loss.backward() gives a factor of 1, and a pass over the gradients costs up to a tenth of a whole loss; nobody
    # else holds them unless the graph is kept
    kept = torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph()
    return not kept and _is_one(upstream)


def _is_one(number):
    return _value(number) == 1.0


def _value(number):
    """What a number on the CPU is; None for what only stands for numbers (traced, batched)."""
    if type(number) is not Tensor or number.device.type != "cpu":
        return None
    try:
        return number.item()
    except RuntimeError:  # a batched tensor has no one value
        return None


def _scores_context(ctx, inputs, output):
    c, g, scale, estimator, _, clip, backend = inputs
    _, negatives, budget = output
    ctx.save_for_backward(c, g, scale, negatives, budget)
    ctx.estimator, ctx.clip, ctx.backend = estimator, clip, backend


def _scores_backward_formula(ctx, d_positives, d_negatives, _):
    c, g, scale, negatives, budget = ctx.saved_tensors
    by_c, by_g, by_scale = ctx.needs_input_grad[:3]
    by_h = by_g or by_scale
    d_c, d_h = _scores_backward(
        c, g, scale, negatives, d_positives, d_negatives, budget, ctx.estimator, ctx.clip, by_c, by_h, ctx.backend
    )
    return *_by_inputs((by_c, by_g, by_scale), d_c, d_h, c.dtype, g, scale), *[None] * 4


def _refuse(ctx, *_):
    raise RuntimeError(_SECOND_DERIVATIVE)


_library.impl("mean_loss", _mean_loss_autograd, "Autograd", with_keyset=True)
torch.library.register_autograd(
    "dimkern::scores", _scores_backward_formula, setup_context=_scores_context, lib=_library
)
torch.library.register_autograd("dimkern::scores_backward", _refuse, lib=_library)
