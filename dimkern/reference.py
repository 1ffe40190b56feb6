"""The naive pair tensor and ordinary autograd: the oracle of the tests, and the honest baseline.

Memory is that of the R x N·L pair tensor several times over. Supports whatever autograd does, second
derivatives included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .estimators import REGISTRY, Estimator, Scores
from .plan import score_dtype_of


def scores(c: Tensor, g: Tensor, scale: Tensor, estimator: str, kappa: float, clip: float | None) -> Scores:
    """The statistics of all pairs of c (N, ..., K) and g (N, P, K), differentiable by both and by scale."""
    dtype = score_dtype_of(c.dtype, g.dtype)
    with torch.autocast(c.device.type, enabled=False):
        s = torch.einsum("ipk,jlk->ipjl", g.to(dtype) * scale.to(dtype), c.flatten(1, -2).to(dtype))
        if clip is not None:
            s = clip * torch.tanh(s / clip)
        return Scores(s.diagonal(dim1=0, dim2=2).permute(2, 0, 1), _negatives(REGISTRY[estimator], s, kappa))


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
