"""Losses and gradients in float64, a block of images at a time: what every contender is held to.

Independent of dimkern: MATHS.md §2 written down once more, differentiated by autograd.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_BYTES = 128 * 2**20

# The budget of an error: so many times closed-form eager's in the same dtype, plus so many roundings of that dtype.
# A dropped factor or a lost pair costs percents and more; a sum in another order a few roundings.
SLACK = 2.0
ROUNDINGS = {torch.float32: 16.0, torch.bfloat16: 0.5}
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # eager's own error must stay below this


class Truth(NamedTuple):
    loss: float
    dl: Tensor  # (N, K, L) float64
    dm: Tensor  # (N, K, P) float64


class Errors(NamedTuple):
    """Of the loss relative to max(1, |loss|), of a gradient as a norm relative to the true one's."""

    loss: float
    dl: float
    dm: float

    @property
    def worst(self) -> float:
        return max(self)

    def within(self, budget: float) -> bool:
        return all(error <= budget for error in self)  # not `worst`: max overlooks NaN


def truth(estimator: str, l: Tensor, m: Tensor) -> Truth:
    """The loss and both gradients; InfoNCE with cortex_DIM's phantom negatives (self_mask="official")."""
    c = l.detach().transpose(1, 2).double().contiguous().requires_grad_()  # (N, L, K)
    g = m.detach().transpose(1, 2).double().contiguous().requires_grad_()  # (N, P, K)
    N, L, K = c.shape
    P = g.shape[1]
    images = max(1, min(N, _BLOCK_BYTES // (P * N * L * 8)))
    blocks = [slice(i, min(i + images, N)) for i in range(0, N, images)]

    def score(rows: slice) -> tuple[Tensor, Tensor]:
        """The block's positives (n, P, L), and all its scores (n, P, N, L) with the own-image pairs at -inf."""
        s = (g[rows].reshape(-1, K) @ c.view(-1, K).t()).view(-1, P, N, L)
        own = torch.eye(N, dtype=torch.bool)[rows, None, :, None]
        return torch.einsum("npk,nlk->npl", g[rows], c[rows]), s.masked_fill(own, -torch.inf)

    log_mean_exp = torch.zeros((), dtype=torch.float64)
    if estimator == "dv":  # its one logarithm joins all pairs, so they are seen once before they are weighed
        with torch.no_grad():
            sums = torch.stack([score(rows)[1].flatten().logsumexp(0) for rows in blocks])
            log_mean_exp = sums.logsumexp(0) - math.log(N * P * (N - 1) * L)

    total = 0.0
    for rows in blocks:
        positives, s = score(rows)
        s = s.flatten(2)
        if estimator == "infonce":
            phantom = torch.full_like(s[..., :1], math.log(L) - 10.0)
            negatives = torch.cat([s, phantom], -1).logsumexp(-1, keepdim=True)
            part = F.softplus(negatives - positives).sum() / (N * P * L)
        elif estimator == "jsd":
            negatives = F.softplus(s).sum() / (N * P * (N - 1) * L)  # softplus(-inf) = 0
            part = negatives + F.softplus(-positives).sum() / (N * P * L) - 2 * math.log(2) * len(s) / N
        else:
            weights = (s - log_mean_exp).exp().sum() / (N * P * (N - 1) * L)  # its gradient is that of the logarithm
            part = weights - positives.sum() / (N * P * L)
        part.backward()
        total += part.item()
    if estimator == "dv":
        total += log_mean_exp.item() - 1.0  # the weights sum to one
    assert c.grad is not None
    assert g.grad is not None
    return Truth(total, c.grad.transpose(1, 2), g.grad.transpose(1, 2))


def errors(true: Truth, loss: Tensor, dl: Tensor, dm: Tensor) -> Errors:
    def relative(grad: Tensor, to: Tensor) -> float:
        return (torch.linalg.vector_norm(grad.double() - to) / torch.linalg.vector_norm(to)).item()

    return Errors(abs(loss.item() - true.loss) / max(1.0, abs(true.loss)), relative(dl, true.dl), relative(dm, true.dm))


def budget(dtype: torch.dtype, eager: Errors | None) -> float:
    """What a contender's errors may be, given closed-form eager's on the same inputs (None: it could not run)."""
    if eager is None or not eager.within(LIMIT[dtype]):
        return LIMIT[dtype]
    return min(LIMIT[dtype], SLACK * eager.worst + ROUNDINGS[dtype] * torch.finfo(dtype).eps)
