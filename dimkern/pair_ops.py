"""The torch.library ops of the pair MLP: the same two as `ops`, with weights of the critic among the inputs.

They take the first layer applied (`critics.PairMLP`); what comes before it is ordinary autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import streaming
from .backends.pair_mlp import PairMLPGradients, PairMLPTiles
from .config import memory_budget
from .critics import PairMLP
from .ops import _library, _no_autocast, _Once, _refuse, _scaled
from .plan import Problem, describe, plan_for

_LAYERS = "Tensor a, Tensor b, Tensor w2, Tensor b2, Tensor w3, Tensor b3"
_NEEDED = "bool grad_a, bool grad_b, bool grad_w"
_GRADIENTS = "Tensor grad_a, Tensor grad_b, Tensor grad_w2, Tensor grad_b2, Tensor grad_w3, Tensor grad_b3"
_library.define(
    f"pair_mlp_mean_loss({_LAYERS}, str estimator, float kappa, float? clip, {_NEEDED}, str backend='streaming')"
    f" -> (Tensor loss, Tensor positives, Tensor negatives, {_GRADIENTS})"
)
_library.define(
    f"pair_mlp_scores({_LAYERS}, str estimator, float kappa, float? clip, str backend='streaming')"
    " -> (Tensor positives, Tensor negatives, Tensor budget)"
)
_library.define(
    f"pair_mlp_scores_backward({_LAYERS}, Tensor negatives, Tensor d_positives, Tensor d_negatives, Tensor budget,"
    f" str estimator, float? clip, {_NEEDED}, str backend='streaming') -> ({_GRADIENTS})"
)

mean_loss = torch.ops.dimkern.pair_mlp_mean_loss.default
scores = torch.ops.dimkern.pair_mlp_scores.default
_scores_backward = torch.ops.dimkern.pair_mlp_scores_backward.default


def needed(layers: PairMLP) -> tuple[bool, bool, bool]:
    """Whether gradients are needed: by a, by b, by any of the weights."""
    by = [torch.is_grad_enabled() and x.requires_grad for x in layers]
    return by[0], by[1], any(by[2:])


def problem_of(
    layers: PairMLP, estimator: str, clip: float | None, needed: tuple[bool, bool, bool], weights_known: bool = False
) -> Problem:
    """The Problem; `needed` are the gradients by a, by b and by the weights."""
    by_a, by_b, by_w = needed
    return describe(
        estimator, layers.a, layers.b, clip=clip, grad_locals=by_a, grad_summaries=by_b, weights_known=weights_known,
        critic="pair_mlp", grad_critic=by_w,
    )  # fmt: skip


def _gradients(layers: PairMLP, needed: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
    """Buffers for the gradients; empty ones for those nobody needs."""
    of_each = (*needed, *[needed[2]] * 3)
    return tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip(layers, of_each, strict=True))


def _tiles(plan, layers: PairMLP, gradients: tuple[Tensor, ...], needed: tuple[bool, bool, bool]) -> PairMLPTiles:
    of_each = (*needed, *[needed[2]] * 3)
    buffers = (x if need else None for x, need in zip(gradients, of_each, strict=True))
    return PairMLPTiles(plan, PairMLP(*(x.contiguous() for x in layers)), PairMLPGradients(*buffers))


def _mean_loss(a, b, w2, b2, w3, b3, estimator, kappa, clip, grad_a, grad_b, grad_w, backend="streaming"):
    layers, needed = PairMLP(a, b, w2, b2, w3, b3), (grad_a, grad_b, grad_w)
    problem = problem_of(layers, estimator, clip, needed)
    plan = plan_for(problem, memory_budget(a.device), backend)
    gradients = _gradients(layers, needed)
    with _no_autocast(a):
        tiles = _tiles(plan, layers, gradients, needed)
        loss, scores = streaming.mean_loss(tiles, plan, kappa)
        tiles.finish_gradients()
    return loss, *scores, *gradients


def _scores(a, b, w2, b2, w3, b3, estimator, kappa, clip, backend="streaming"):
    layers, none = PairMLP(a, b, w2, b2, w3, b3), (False, False, False)
    # planned as the backward will be, so that a budget which suffices here suffices there
    budget = memory_budget(a.device)
    plan = plan_for(problem_of(layers, estimator, clip, (True, True, True), weights_known=True), budget, backend)
    with _no_autocast(a):
        tiles = _tiles(plan, layers, _gradients(layers, none), none)
        positives, negatives = streaming.measure(tiles, plan, kappa)
    return positives, negatives.to(positives.dtype, copy=True), torch.tensor(budget, dtype=torch.int64)


def _sweep(
    a, b, w2, b2, w3, b3, negatives, d_positives, d_negatives, budget, estimator, clip, grad_a, grad_b, grad_w,
    backend="streaming",
):  # fmt: skip
    layers, needed = PairMLP(a, b, w2, b2, w3, b3), (grad_a, grad_b, grad_w)
    plan = plan_for(problem_of(layers, estimator, clip, needed, weights_known=True), int(budget), backend)
    gradients = _gradients(layers, needed)
    with _no_autocast(a):
        tiles = _tiles(plan, layers, gradients, needed)
        streaming.differentiate(tiles, plan, negatives, d_positives, d_negatives)
        tiles.finish_gradients()
    return gradients


_library.impl("pair_mlp_mean_loss", _mean_loss, "CompositeExplicitAutograd")
_library.impl("pair_mlp_scores", _scores, "CompositeExplicitAutograd")
_library.impl("pair_mlp_scores_backward", _sweep, "CompositeExplicitAutograd")


def _statistics(a, b):
    (N, P, _), L = b.shape, a.shape[1]
    return a.new_empty((N, P, L)), a.new_empty((N, P))


@torch.library.register_fake("dimkern::pair_mlp_mean_loss", lib=_library)
def _mean_loss_fake(a, b, w2, b2, w3, b3, estimator, kappa, clip, grad_a, grad_b, grad_w, backend="streaming"):
    gradients = _gradients(PairMLP(a, b, w2, b2, w3, b3), (grad_a, grad_b, grad_w))
    return a.new_empty(()), *_statistics(a, b), *gradients


@torch.library.register_fake("dimkern::pair_mlp_scores", lib=_library)
def _scores_fake(a, b, w2, b2, w3, b3, estimator, kappa, clip, backend="streaming"):
    return *_statistics(a, b), torch.empty((), dtype=torch.int64)


@torch.library.register_fake("dimkern::pair_mlp_scores_backward", lib=_library)
def _scores_backward_fake(
    a, b, w2, b2, w3, b3, negatives, d_positives, d_negatives, budget, estimator, clip, grad_a, grad_b, grad_w,
    backend="streaming",
):  # fmt: skip
    return _gradients(PairMLP(a, b, w2, b2, w3, b3), (grad_a, grad_b, grad_w))


def _mean_loss_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    # of the inputs one that needs a gradient, so that a second derivative finds what it is asked for
    made_from = [x for x, need in zip(inputs[:6], ctx.needs_input_grad[:6], strict=True) if need]
    ctx.save_for_backward(*output[3:], made_from[0])


def _mean_loss_backward(ctx, d_loss, *_):
    if d_loss is None:  # a later function that gives no gradient
        return (None,) * 13
    *gradients, made_from = ctx.saved_tensors
    gradients = [
        _scaled(x, d_loss) if need else None for x, need in zip(gradients, ctx.needs_input_grad[:6], strict=True)
    ]
    if torch.is_grad_enabled():
        gradients = [None if x is None else _Once.apply(x, made_from) for x in gradients]
    return *gradients, *[None] * 7


def _scores_context(ctx, inputs, output):
    *layers, ctx.estimator, _, ctx.clip, ctx.backend = inputs
    _, negatives, budget = output
    ctx.save_for_backward(*layers, negatives, budget)


def _scores_backward_formula(ctx, d_positives, d_negatives, _):
    *layers, negatives, budget = ctx.saved_tensors
    of_each = ctx.needs_input_grad[:6]
    needed = of_each[0], of_each[1], any(of_each[2:])
    gradients = _scores_backward(
        *layers, negatives, d_positives, d_negatives, budget, ctx.estimator, ctx.clip, *needed, ctx.backend
    )
    return *(x if need else None for x, need in zip(gradients, of_each, strict=True)), *[None] * 4


torch.library.register_autograd(
    "dimkern::pair_mlp_mean_loss", _mean_loss_backward, setup_context=_mean_loss_context, lib=_library
)
torch.library.register_autograd(
    "dimkern::pair_mlp_scores", _scores_backward_formula, setup_context=_scores_context, lib=_library
)
torch.library.register_autograd("dimkern::pair_mlp_scores_backward", _refuse, lib=_library)
