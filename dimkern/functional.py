"""The public losses: validate, choose, compute, reduce."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import one_negative, ops, pair_ops, reference
from .critics import PairMLPCritic, check_critic
from .estimators import OFFICIAL_SELF_SCORE, REGISTRY, Scores, item_losses, mutual_information
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
    refuse_forward_mode,
)


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

    Returns:
        Scalar, float32 for half-precision inputs; (N, L, P) with reduction="none".

    Raises:
        ValueError: fewer than two images, shapes that disagree, an unknown choice, clip <= 0, or a
            memory budget that is too small; the message names the argument and what came.
        TypeError: inputs that are no floating-point tensors.
    """
    check_choice("self_mask", self_mask, ("official", "exclude"))
    check_reduction("infonce", reduction)
    return _loss(
        "infonce", l, m, self_mask, scale, clip, reduction, backend, return_parts, critic, negatives, generator
    )


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
) -> Tensor | LossParts:
    """E_negatives - E_positives of an f-divergence's dual, in nats (Nowozin et al. 2016; Hjelm et al. 2019, eq. 4).

    It estimates the *negative* of a divergence, so it is negative once the critic has learnt something.

    Args:
        l: local features, (N, K, L) or (N, K, H, W), any strides, float64, float32, bfloat16 or float16.
        m: summary vectors, (N, K), (N, K, P) or (N, K, 1, 1).
        measure: "GAN", "JSD", "X2" (Pearson, s and s²/4 + s; cortex_DIM's is unbounded below), "KL" (NWJ),
            "RKL", "H2", "W1", or "DV", which is `donsker_varadhan_loss`; in either case.
        scale, clip, backend, critic, negatives, generator: as for `infonce_loss`.
        reduction: "mean", or "none" for each summary's share, whose mean is the loss.
        return_parts: return (loss, e_pos, e_neg, mi); mi is the bound itself for KL and DV, else the
            plug-in estimate from the positives' scores; NaN for W1.

    Returns:
        Scalar, float32 for half-precision inputs; (N, P) with reduction="none".

    Raises:
        ValueError, TypeError: as for `infonce_loss`.
    """
    estimator = check_measure(measure)
    check_reduction(estimator, reduction)
    return _loss(
        estimator, l, m, "exclude", scale, clip, reduction, backend, return_parts, critic, negatives, generator
    )


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
) -> Tensor | LossParts:
    """The Donsker-Varadhan bound, negated, in nats: log E_negatives[e^s] - E_positives[s] (Hjelm et al. 2019, eq. 2).

    Args:
        l: local features, (N, K, L) or (N, K, H, W), any strides, float64, float32, bfloat16 or float16.
        m: summary vectors, (N, K), (N, K, P) or (N, K, 1, 1).
        scale, clip, backend, critic, negatives, generator: as for `infonce_loss`.
        reduction: "mean"; one logarithm joins all negatives, so there is nothing to reduce.
        return_parts: return (loss, e_pos, e_neg, mi), mi = -loss.

    Returns:
        Scalar, float32 for half-precision inputs.

    Raises:
        ValueError, TypeError: as for `infonce_loss`.
    """
    return fenchel_dual_loss(
        l, m, "DV", scale=scale, clip=clip, reduction=reduction, backend=backend, return_parts=return_parts,
        critic=critic, negatives=negatives, generator=generator,
    )  # fmt: skip


def _loss(
    estimator: str,
    l: Tensor,
    m: Tensor,
    self_mask: str,
    scale: float | Tensor | None,
    clip: float | None,
    reduction: str,
    backend: str,
    return_parts: bool,
    critic: PairMLPCritic | None,
    negatives: str,
    generator: torch.Generator | None,
) -> Tensor | LossParts:
    c, g = as_locals(l), as_summaries(m)  # (N, L, K) or (N, H, W, K), (N, P, K)
    check_critic(critic, c.device)
    check_pair(l, m, c, g, None if critic is None else critic.channels)
    check_choice("negatives", negatives, NEGATIVES)
    check_generator(generator, negatives)
    clip = check_clip(clip)
    factor = check_scale(scale, c, g)
    N, L = c.shape[0], c.shape[1:-1].numel()
    kappa = L * math.exp(OFFICIAL_SELF_SCORE) if self_mask == "official" else 0.0
    row = REGISTRY[estimator]

    chosen = choose_backend(backend, c.device, "dot" if critic is None else "pair_mlp")
    mean: Tensor | None = None
    if negatives != "all":
        partner = one_negative.partners(negatives, N, c.device, generator)
        scores = one_negative.scores(c, g, factor, critic, estimator, kappa, clip, partner)
    elif chosen == "reference":
        scores = reference.scores(c, g, factor, critic, estimator, kappa, clip)
    elif critic is None:
        refuse_forward_mode(l, m, factor)
        if reduction == "none":
            scores = Scores(*ops.scores(c, g, factor, estimator, kappa, clip, backend)[:2])
        else:
            grad = torch.is_grad_enabled()
            grad_c, grad_g = grad and c.requires_grad, grad and (g.requires_grad or factor.requires_grad)
            mean, *statistics = ops.mean_loss(c, g, factor, estimator, kappa, clip, grad_c, grad_g, backend)
            scores = Scores(*statistics[:2])
    else:
        with torch.autocast(c.device.type, enabled=False):
            layers = critic.first_layer(c, g, factor)
        refuse_forward_mode(*layers)
        if reduction == "none":
            scores = Scores(*pair_ops.scores(*layers, estimator, kappa, clip, backend)[:2])
        else:
            needed = pair_ops.needed(layers)
            mean, *statistics = pair_ops.mean_loss(*layers, estimator, kappa, clip, *needed, backend)
            scores = Scores(*statistics[:2])
    if mean is None:
        items = item_losses(row, *scores)
        mean = items.mean()
    if reduction == "none":
        loss = items.transpose(1, 2) if items.ndim == 3 else items
    else:
        loss = mean if reduction == "mean" else mean * scores.positives.numel()
    if not return_parts:
        return loss

    of_positives, of_negatives, mean = (x.detach() for x in (*scores, mean))
    if row.family == "row_lse":
        of_negatives = torch.logaddexp(of_negatives.unsqueeze(-1), of_positives)
    met = (N - 1) * L if negatives == "all" else L
    mi = mutual_information(row, of_positives, mean, candidates=1 + met)
    return LossParts(loss, row.f(of_positives).mean(), of_negatives.mean(), mi)
