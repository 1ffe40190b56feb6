"""The public losses: validate, choose, compute, reduce."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import distributed, grouped, one_negative, ops, pair_ops, reference
from .critics import PairMLPCritic, check_critic
from .estimators import OFFICIAL_SELF_SCORE, REGISTRY, Scores, item_losses, parts
from .one_negative import NEGATIVES
from .plan import choose_backend
from .validate import (
    as_locals,
    as_summaries,
    check_choice,
    check_clip,
    check_generator,
    check_measure,
    check_pair,
    check_reduction,
    check_scale,
    refuse_transforms,
)

if TYPE_CHECKING:  # a build of torch may lack it
    from torch.distributed import ProcessGroup


class LossParts(NamedTuple):
    """A loss and what it is made of, in nats; all but `loss` are detached scalars."""

    loss: Tensor
    e_pos: Tensor  # mean of the positive term
    e_neg: Tensor  # mean of the negative term (InfoNCE: of logaddexp(D, s))
    mi: Tensor  # the estimate of the mutual information that the critic implies


def infonce_loss(
    l: Tensor,
    m: Tensor,
    *,
    self_mask: str = "official",
    scale: float | Tensor | None = None,
    clip: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    return_parts: bool = False,
    critic: PairMLPCritic | None = None,
    negatives: str = "all",
    generator: torch.Generator | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | LossParts:
    """InfoNCE between summaries and local features, in nats (Hjelm et al. 2019, eq. 5).

    Every summary vector is scored against every location of every image of the batch; the locations of
    its own image are its positives and share the other images' locations as negatives.

    Args:
        l: local features, (N, K, L) or (N, K, H, W), any strides, float64, float32, bfloat16 or float16.
        m: summary vectors, (N, K), (N, K, P) or (N, K, 1, 1).
        self_mask: "official" counts L phantom negatives with a score of -10 in each denominator, as
            cortex_DIM does; "exclude" has none.
        scale: multiplies every score: a number, or a 0-d tensor that may need a gradient. Default 1.
        clip: soft clip of the scores, t·tanh(s/t) (AMDIM uses 20). Default none.
        reduction: "mean" over summaries and positives, "sum", or "none".
        backend: "auto", or one of `dimkern.BACKENDS`.
        return_parts: return (loss, e_pos, e_neg, mi); mi = log(1 + (N-1)·L) - loss is capped by
            construction and not a certified lower bound, as an image's negatives are correlated.
        critic: what scores a pair: None for the dot product, or a `PairMLPCritic`, for which l and m may differ in
            channels. `scale` and `clip` then apply to its scores.
        negatives: "all" scores every summary against every location of the batch; "permute" and "roll" score each
            image's locations against the summaries of one other image, as the first release of DIM did: of
            a random one, such that every image is met once, or of the next one. A summary's negatives
            are then the L locations it meets, mi = log(1 + L) - loss, and `backend` does not matter: it is ordinary
            PyTorch on 2·N·P·L pairs.
        generator: what "permute" draws from; torch's own by default, which `torch.manual_seed` makes reproducible.
        group: the process group whose processes share the batch, such as `torch.distributed.group.WORLD`; each gives
            its own images, one or more. None: this process alone. Every process gets the loss of the whole batch
            ("none": the items of its own images) and, as gradients of its inputs, W times those of that
            loss, W the number of processes. DDP and FSDP, which average over them, then arrive at the gradient of one
            process with the whole batch; where gradients are summed instead, divide the loss by W. With
            "none" the gradients are those of the sum of what all processes make of their items, and the
            backward communicates too: every process has to run it.

    Returns:
        Scalar, float32 for half-precision inputs; (N, L, P) with reduction="none".

    Raises:
        ValueError: fewer than two images, shapes that disagree, an unknown choice, clip <= 0, or a
            memory budget that is too small; the message names the argument and what came.
        TypeError: inputs that are no floating-point tensors.
        GroupError: another process of the group raised, or its inputs or settings do not go with this one's.
    """
    options = _Options(self_mask, scale, clip, reduction, backend, return_parts, critic, negatives, generator)
    return _loss(None, l, m, options, group)


def fenchel_dual_loss(
    l: Tensor,
    m: Tensor,
    measure: str = "JSD",
    *,
    scale: float | Tensor | None = None,
    clip: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    return_parts: bool = False,
    critic: PairMLPCritic | None = None,
    negatives: str = "all",
    generator: torch.Generator | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | LossParts:
    """E_negatives - E_positives of an f-divergence's dual, in nats (Nowozin et al. 2016; Hjelm et al. 2019, eq. 4).

    It estimates the *negative* of a divergence, so it is negative once the critic has learnt something.

    Args:
        l: local features, (N, K, L) or (N, K, H, W), any strides, float64, float32, bfloat16 or float16.
        m: summary vectors, (N, K), (N, K, P) or (N, K, 1, 1).
        measure: "GAN", "JSD", "X2" (Pearson, s and s²/4 + s; cortex_DIM's is unbounded below), "KL" (NWJ),
            "RKL", "H2", "W1", or "DV", which is `donsker_varadhan_loss`; in either case.
        scale, clip, backend, critic, negatives, generator, group: as for `infonce_loss`.
        reduction: "mean", or "none" for each summary's share, whose mean is the loss.
        return_parts: return (loss, e_pos, e_neg, mi); mi is the bound itself for KL and DV, else the
            plug-in estimate from the positives' scores; NaN for W1.

    Returns:
        Scalar, float32 for half-precision inputs; (N, P) with reduction="none".

    Raises:
        ValueError, TypeError, GroupError: as for `infonce_loss`.
    """
    options = _Options("exclude", scale, clip, reduction, backend, return_parts, critic, negatives, generator)
    return _loss(measure, l, m, options, group)


def donsker_varadhan_loss(
    l: Tensor,
    m: Tensor,
    *,
    scale: float | Tensor | None = None,
    clip: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    return_parts: bool = False,
    critic: PairMLPCritic | None = None,
    negatives: str = "all",
    generator: torch.Generator | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | LossParts:
    """The Donsker-Varadhan bound, negated, in nats: log E_negatives[e^s] - E_positives[s] (Hjelm et al. 2019, eq. 2).

    Args:
        l: local features, (N, K, L) or (N, K, H, W), any strides, float64, float32, bfloat16 or float16.
        m: summary vectors, (N, K), (N, K, P) or (N, K, 1, 1).
        scale, clip, backend, critic, negatives, generator, group: as for `infonce_loss`.
        reduction: "mean"; one logarithm joins all negatives, so there is nothing to reduce.
        return_parts: return (loss, e_pos, e_neg, mi), mi = -loss.

    Returns:
        Scalar, float32 for half-precision inputs.

    Raises:
        ValueError, TypeError, GroupError: as for `infonce_loss`.
    """
    return fenchel_dual_loss(
        l, m, "DV", scale=scale, clip=clip, reduction=reduction, backend=backend, return_parts=return_parts,
        critic=critic, negatives=negatives, generator=generator, group=group,
    )  # fmt: skip


class _Options(NamedTuple):
    """The keywords of a loss, as they came."""

    self_mask: str
    scale: float | Tensor | None
    clip: float | None
    reduction: str
    backend: str
    return_parts: bool
    critic: PairMLPCritic | None
    negatives: str
    generator: torch.Generator | None


class _Inputs(NamedTuple):
    """What a loss is computed from, checked."""

    estimator: str
    c: Tensor  # (N, L, K) or (N, H, W, K)
    g: Tensor  # (N, P, K)
    scale: Tensor  # 0-d
    kappa: float
    clip: float | None


def _checked(measure: str | None, l: Tensor, m: Tensor, options: _Options, least_images: int) -> _Inputs:
    """`measure` as for `fenchel_dual_loss`; None: InfoNCE."""
    estimator = "infonce" if measure is None else check_measure(measure)
    check_choice("self_mask", options.self_mask, ("official", "exclude"))
    check_reduction(estimator, options.reduction)
    critic = options.critic
    c, g = as_locals(l), as_summaries(m)
    check_critic(critic, c.device)
    check_pair(l, m, c, g, None if critic is None else critic.channels, least_images)
    check_choice("negatives", options.negatives, NEGATIVES)
    check_generator(options.generator, options.negatives)
    clip, factor = check_clip(options.clip), check_scale(options.scale, c, g)
    kappa = c.shape[1:-1].numel() * math.exp(OFFICIAL_SELF_SCORE) if options.self_mask == "official" else 0.0
    if options.backend != "auto":  # which the ops choose by; here only a bad name, or one that cannot serve
        choose_backend(options.backend, c.device, "dot" if critic is None else "pair_mlp")
    if options.backend != "reference" and options.negatives == "all" and critic is None:
        refuse_transforms(l, m, factor)
    return _Inputs(estimator, c, g, factor, kappa, clip)


def _loss(
    measure: str | None, l: Tensor, m: Tensor, options: _Options, group: ProcessGroup | None
) -> Tensor | LossParts:
    others = distributed.members(group)
    if others is not None:
        shared: Tensor | LossParts = _loss_over(others, measure, l, m, options)
        return shared
    estimator, c, g, factor, kappa, clip = _checked(measure, l, m, options, least_images=2)
    reduction, backend, critic, negatives = options.reduction, options.backend, options.critic, options.negatives
    row = REGISTRY[estimator]
    mean: Tensor | None = None
    if negatives != "all":
        partner = one_negative.partners(negatives, len(c), c.device, options.generator)
        scores = one_negative.scores(c, g, factor, critic, estimator, kappa, clip, partner)
    elif backend == "reference":
        scores = reference.scores(c, g, factor, critic, estimator, kappa, clip)
    elif critic is None:
        if reduction == "none":
            scores = Scores(*ops.scores(c, g, factor, estimator, kappa, clip, backend)[:2])
        else:
            grad_c, grad_g = _needed(c, g, factor)
            mean, scores = ops.mean_loss(c, g, factor, estimator, kappa, clip, grad_c, grad_g, backend)
    else:
        with torch.autocast(c.device.type, enabled=False):
            layers = critic.first_layer(c, g, factor)
        refuse_transforms(*layers)
        if reduction == "none":
            scores = Scores(*pair_ops.scores(*layers, estimator, kappa, clip, backend)[:2])
        else:
            needed = pair_ops.needed(layers)
            mean, *statistics = pair_ops.mean_loss(*layers, estimator, kappa, clip, *needed, backend)
            scores = Scores(*statistics[:2])
    if mean is None:
        items = item_losses(row, *scores)
        mean = items.mean()
    loss = _of_items(items) if reduction == "none" else mean
    if reduction == "sum":
        loss = loss * scores.positives.numel()
    if not options.return_parts:
        return loss
    met = (c.shape[0] - 1 if negatives == "all" else 1) * c.shape[1:-1].numel()
    positives, of_negatives, mean = (x.detach() for x in (*scores, mean))
    return LossParts(loss, *parts(row, positives, of_negatives, mean, candidates=1 + met))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _loss_over(group: ProcessGroup, measure: str | None, l: Tensor, m: Tensor, options: _Options) -> Tensor | LossParts:
    """The loss of a batch that the processes of a group share."""
    critic, reduction = options.critic, options.reduction
    with distributed.announcing(group):
        estimator, c, g, factor, kappa, clip = _checked(measure, l, m, options, least_images=1)
        if options.negatives != "all":
            raise ValueError(f"negatives is {options.negatives!r}; over a group accepted is 'all'")
        keywords: dict[str, Any] = {
            "scale": options.scale, "clip": clip, "kappa": kappa, "reduction": reduction, "backend": options.backend,
        }  # fmt: skip
        if critic is None:
            terms = grouped.terms(estimator, c, g, needed=(*_needed(c, g, factor), False), **keywords)
        else:
            grouped.check_critic_reduction(reduction)
            with torch.autocast(c.device.type, enabled=False):
                layers = critic.first_layer(c, g, factor)
            needed = pair_ops.needed(layers)
            terms = grouped.terms(estimator, *layers[:2], needed=needed, critic="pair_mlp", **keywords)
    call = grouped.agree(group, terms)
    if reduction == "none":
        items, means = grouped.items(call, c, g, factor)
        loss = _of_items(items)
    else:
        means = grouped.mean_loss(call, c, g, factor) if critic is None else grouped.pair_mlp_mean_loss(call, layers)
        p = call.plan.problem
        loss = means.loss * (p.rows * p.L) if reduction == "sum" else means.loss
    return LossParts(loss, *means[1:]) if options.return_parts else loss


def _needed(c: Tensor, g: Tensor, scale: Tensor) -> tuple[bool, bool]:
    """Whether the gradients by the local features, and by the scaled summaries, are needed."""
    grad = torch.is_grad_enabled()
    return grad and c.requires_grad, grad and (g.requires_grad or scale.requires_grad)


def _of_items(items: Tensor) -> Tensor:
    """Item losses as a user sees them: (N, L, P), or (N, P)."""
    return items.transpose(1, 2) if items.ndim == 3 else items
