"""Losses with one negative for each image and location, as the first release of DIM had: no pair tensor to avoid.

Every image's locations are scored against its own summaries (positives) and against the summaries of one
other image (negatives): 2·N·P·L pairs, ordinary differentiable PyTorch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .critics import PairMLPCritic
from .estimators import REGISTRY, Estimator, Scores
from .plan import score_dtype_of

NEGATIVES = ("all", "permute", "roll")


def partners(negatives: str, N: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """(N,) the image whose summaries image j's locations are scored against; no image is its own.

    "roll": the next one. "permute": the next one on a random circle through all images, so that no draw has
    to be repeated and each other image is equally likely.
    """
    following = torch.arange(1, N + 1, device=device) % N
    if negatives == "roll":
        return following
    order = torch.randperm(N, generator=generator, device=device if generator is None else generator.device).to(device)
    return torch.empty_like(order).scatter_(0, order, order[following])


def scores(
    c: Tensor,  # (N, ..., K)
    g: Tensor,  # (N, P, K)
    scale: Tensor,
    critic: PairMLPCritic | None,
    estimator: str,
    kappa: float,
    clip: float | None,
    partner: Tensor,  # (N,)
) -> Scores:
    """The statistics of the pairs, differentiable; a summary's negatives are the L locations it is scored against."""
    with torch.autocast(c.device.type, enabled=False):
        if critic is None:
            dtype = score_dtype_of(c.dtype, g.dtype)
            c, g = c.flatten(1, -2).to(dtype), g.to(dtype) * scale.to(dtype)
            positives, others = (x @ c.transpose(1, 2) for x in (g, g[partner]))
        else:
            layers = critic.first_layer(c, g, scale)
            positives, others = (layers.scores(b) for b in (layers.b, layers.b[partner]))
        if clip is not None:
            positives, others = (clip * torch.tanh(s / clip) for s in (positives, others))
        # from the image of the locations to that of the summaries
        return Scores(positives, _negatives(REGISTRY[estimator], others[partner.argsort()], kappa))


def _negatives(row: Estimator, s: Tensor, kappa: float) -> Tensor:
    """Each row's negative term, (N, P), from its scores s (N, P, L)."""
    match row.family:
        case "pointwise":
            return row.psi(s, torch.zeros_like(s)).mean(-1)
        case "row_lse":
            log_sum = s.logsumexp(-1)
            return torch.logaddexp(log_sum, torch.full_like(log_sum, math.log(kappa))) if kappa else log_sum
        case "global_lse":
            return (s.logsumexp((0, 1, 2)) - math.log(s.numel())).expand(s.shape[:2])
