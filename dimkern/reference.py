"""The naive pair tensor and ordinary autograd: the oracle of the tests, and the honest baseline.

Memory is that of the R x N·L pair tensor several times over. Supports whatever autograd does, second
derivatives included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .critics import PairMLPCritic
from .estimators import REGISTRY, Estimator, Scores
from .plan import score_dtype_of


def scores(
    c: Tensor, g: Tensor, scale: Tensor, critic: PairMLPCritic | None, estimator: str, kappa: float, clip: float | None
) -> Scores:
    """The statistics of all pairs of c (N, ..., Kc) and g (N, P, Ky), differentiable by all that is given."""
    with torch.autocast(c.device.type, enabled=False):
        c = c.flatten(1, -2)
        s = _dot(c, g, scale) if critic is None else _pair_mlp(c, g, critic) * scale
        if clip is not None:
            s = clip * torch.tanh(s / clip)
        positives = s.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return Scores(positives, _negatives(REGISTRY[estimator], s, kappa))


def _dot(c: Tensor, g: Tensor, scale: Tensor) -> Tensor:
    """(N, P, N, L)"""
    dtype = score_dtype_of(c.dtype, g.dtype)
    return torch.einsum("ipk,jlk->ipjl", g.to(dtype) * scale.to(dtype), c.to(dtype))


def _pair_mlp(c: Tensor, g: Tensor, critic: PairMLPCritic) -> Tensor:
    """(N, P, N, L), from every pair's two vectors concatenated: (N, P, N, L, Ky + Kc) and the hidden layers of it."""
    layers = critic.local, critic.summary, critic.inner, critic.outer
    dtype = score_dtype_of(c.dtype, g.dtype, critic.inner.weight.dtype)
    w_c, w_y, w2, w3 = (layer.weight.to(dtype) for layer in layers)
    b1, b2, b3 = (layer.bias.to(dtype) for layer in layers[1:])
    (N, L, _), P = c.shape, g.shape[1]
    y, x = g.to(dtype)[:, :, None, None], c.to(dtype)
    pairs = torch.cat([y.expand(-1, -1, N, L, -1), x.expand(N, P, -1, -1, -1)], -1)
    hidden = F.linear(pairs, torch.cat([w_y, w_c], 1), b1).relu()
    return F.linear(F.linear(hidden, w2, b2).relu(), w3, b3).squeeze(-1)


def _negatives(row: Estimator, s: Tensor, kappa: float) -> Tensor:
    N, P, _, L = s.shape
    others = ~torch.eye(N, dtype=torch.bool, device=s.device)
    negatives = s.transpose(1, 2)[others].view(N, N - 1, P, L).transpose(1, 2).flatten(2)  # (N, P, (N-1)·L)
    match row.family:
        case "pointwise":
            return row.psi(negatives, torch.zeros_like(negatives)).mean(-1)
        case "row_lse":
            phantom = negatives.new_full((N, P, 1), math.log(kappa) if kappa else -math.inf)
            return torch.cat([negatives, phantom], -1).logsumexp(-1)
        case "global_lse":
            return (negatives.logsumexp((0, 1, 2)) - math.log(negatives.numel())).expand(N, P)
