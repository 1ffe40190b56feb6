"""The public losses: validate, choose, compute, reduce."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops, reference
from .estimators import OFFICIAL_SELF_SCORE, REGISTRY, item_losses, mutual_information
from .plan import choose_backend
from .validate import (
    as_locals,
    as_summaries,
    check_choice,
    check_clip,
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

    Returns:
        Scalar, float32 for half-precision inputs; (N, L, P) with reduction="none".

    Raises:
        ValueError: fewer than two images, shapes that disagree, an unknown choice, clip <= 0, or a
            memory budget that is too small; the message names the argument and what came.
        TypeError: inputs that are no floating-point tensors.
    """
    check_choice("self_mask", self_mask, ("official", "exclude"))
    check_reduction("infonce", reduction)
    return _loss("infonce", l, m, self_mask, scale, clip, reduction, backend, return_parts)


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
) -> Tensor | LossParts:
    """E_negatives - E_positives of an f-divergence's dual, in nats (Nowozin et al. 2016; Hjelm et al. 2019, eq. 4).

    It estimates the *negative* of a divergence, so it is negative once the critic has learnt something.

    Args:
        l: local features, (N, K, L) or (N, K, H, W), any strides, float64, float32, bfloat16 or float16.
        m: summary vectors, (N, K), (N, K, P) or (N, K, 1, 1).
        measure: "GAN", "JSD", "X2" (Pearson, s and s²/4 + s; cortex_DIM's is unbounded below), "KL" (NWJ),
            "RKL", "H2", "W1", or "DV", which is `donsker_varadhan_loss`; in either case.
        scale, clip, backend: as for `infonce_loss`.
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
    return _loss(estimator, l, m, "exclude", scale, clip, reduction, backend, return_parts)


def donsker_varadhan_loss(
    l: Tensor,
    m: Tensor,
    *,
    scale: float | Tensor | None = None,
    clip: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """The Donsker-Varadhan bound, negated, in nats: log E_negatives[e^s] - E_positives[s] (Hjelm et al. 2019, eq. 2).

    Args:
        l: local features, (N, K, L) or (N, K, H, W), any strides, float64, float32, bfloat16 or float16.
        m: summary vectors, (N, K), (N, K, P) or (N, K, 1, 1).
        scale, clip, backend: as for `infonce_loss`.
        reduction: "mean"; one logarithm joins all negatives, so there is nothing to reduce.
        return_parts: return (loss, e_pos, e_neg, mi), mi = -loss.

    Returns:
        Scalar, float32 for half-precision inputs.

    Raises:
        ValueError, TypeError: as for `infonce_loss`.
    """
    return fenchel_dual_loss(
        l, m, "DV", scale=scale, clip=clip, reduction=reduction, backend=backend, return_parts=return_parts
    )


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
) -> Tensor | LossParts:
    c, g = as_locals(l), as_summaries(m)  # (N, L, K) or (N, H, W, K), (N, P, K)
    check_pair(l, m, c, g)
    clip = check_clip(clip)
    factor = check_scale(scale, c, g)
    N, L = c.shape[0], c.shape[1:-1].numel()
    kappa = L * math.exp(OFFICIAL_SELF_SCORE) if self_mask == "official" else 0.0
    row = REGISTRY[estimator]

    naive = choose_backend(backend, c.device) == "reference"
    if not naive:
        refuse_forward_mode(l, m, factor)
    if not naive and reduction != "none":
        grad = torch.is_grad_enabled()
        grad_c, grad_g = grad and c.requires_grad, grad and (g.requires_grad or factor.requires_grad)
        mean, positives, negatives, *_ = ops.mean_loss(c, g, factor, estimator, kappa, clip, grad_c, grad_g, backend)
        loss: Tensor = mean
    else:
        if naive:
            positives, negatives = reference.scores(c, g, factor, estimator, kappa, clip)
        else:
            positives, negatives, _ = ops.scores(c, g, factor, estimator, kappa, clip, backend)
        items = item_losses(row, positives, negatives)
        mean = items.mean()
        loss = mean if reduction != "none" else items.transpose(1, 2) if items.ndim == 3 else items
    if reduction == "sum":
        loss = loss * positives.numel()
    if not return_parts:
        return loss

    positives, negatives, mean = positives.detach(), negatives.detach(), mean.detach()
    if row.family == "row_lse":
        negatives = torch.logaddexp(negatives.unsqueeze(-1), positives)
    mi = mutual_information(row, positives, mean, candidates=1 + (N - 1) * L)
    return LossParts(loss, row.f(positives).mean(), negatives.mean(), mi)
