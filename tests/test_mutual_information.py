"""The estimates of mutual information, of correlated Gaussians whose true one is known: -d/2·log(1 - ρ²)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import dimkern
from dimkern import LossParts


def draw(n: int, d: int, rho: float) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, d)
    return x, rho * x + math.sqrt(1 - rho**2) * torch.randn(n, d)


def known(d: int, rho: float) -> float:
    return -d / 2 * math.log(1 - rho**2)


def quadratic(v: Tensor) -> Tensor:
    """(N, d) -> (N, 2d + 1): of linear maps of these, the dot product can be the true log density ratio."""
    return torch.cat([v, v**2, torch.ones(len(v), 1)], 1)


def parts_of(estimator: str, l: Tensor, m: Tensor) -> LossParts:
    l = l.unsqueeze(2)
    if estimator == "infonce":
        return dimkern.infonce_loss(l, m, self_mask="exclude", return_parts=True)
    return dimkern.fenchel_dual_loss(l, m, estimator, return_parts=True)


@pytest.mark.parametrize(
    ("estimator", "below", "above"),
    [("DV", 0.08, 0.08), ("KL", 0.12, 0.08), ("infonce", 0.1, 0.04), ("JSD", 0.15, 0.15)],
)
def test_a_trained_critic_recovers_the_mutual_information(estimator, below, above):
    """DV, KL and InfoNCE are lower bounds (on average: the margin above is the noise of 20 batches), JSD plugs in."""
    torch.manual_seed(0)
    weights = [(0.1 * torch.randn(5, 8)).requires_grad_() for _ in range(2)]
    adam = torch.optim.Adam(weights, 0.02)
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.05, 400)
    for _ in range(400):
        x, y = draw(256, 2, 0.8)
        adam.zero_grad()
        parts_of(estimator, quadratic(y) @ weights[0], quadratic(x) @ weights[1]).loss.backward()
        adam.step()
        falling.step()
    estimates = []
    with torch.no_grad():
        for _ in range(20):
            x, y = draw(1024, 2, 0.8)
            estimates.append(parts_of(estimator, quadratic(y) @ weights[0], quadratic(x) @ weights[1]).mi)
    mean = float(torch.stack(estimates).mean())
    assert known(2, 0.8) - below < mean < known(2, 0.8) + above


def test_infonces_estimate_ends_at_the_logarithm_of_its_candidates():
    """Of 12.4 nats, 16 images can show log 16; the best critic there is comes near that and no further."""
    torch.manual_seed(0)
    d, rho = 4, 0.999
    x, y = draw(16, d, rho)
    scale = 1 / (1 - rho**2)
    one = torch.ones(16, 1)
    m = torch.cat([rho * scale * x, -(rho**2) * scale / 2 * (x**2).sum(1, keepdim=True), one], 1)
    l = torch.cat([y, one, -(rho**2) * scale / 2 * (y**2).sum(1, keepdim=True)], 1)
    mi = float(parts_of("infonce", l, m).mi)
    assert known(d, rho) > 12
    assert math.log(16) - 0.05 < mi < math.log(16) + 1e-5


def information_in(x: Tensor, y: Tensor, rho: float) -> float:
    """The mean of log p(x, y)/p(x)p(y) over the pairs: what the best critic finds in this very sample."""
    quadratic = (rho**2 * (x**2 + y**2) - 2 * rho * x * y) / (2 * (1 - rho**2))
    return known(x.shape[1], rho) - float(quadratic.double().sum(1).mean())


@pytest.mark.parametrize(
    ("estimator", "negatives", "below", "above"),
    [
        ("infonce", "all", 0.06, 0.02),
        ("DV", "all", 0.06, 0.02),
        ("KL", "all", 0.06, 0.02),
        ("JSD", "permute", 0.1, 0.1),  # one negative each: more noise, and no bound
    ],
)
def test_a_network_of_pairs_recovers_it_from_nothing_but_the_pairs(estimator, negatives, below, above):
    """The concat critic, given x and y as they are, finds what is there: InfoNCE, DV and KL from below."""
    torch.manual_seed(0)
    critic = dimkern.PairMLPCritic(2, hidden=32)

    def parts(x: Tensor, y: Tensor, negatives: str) -> LossParts:
        keywords = {"critic": critic, "negatives": negatives, "return_parts": True}
        if estimator == "infonce":
            return dimkern.infonce_loss(x.unsqueeze(2), y, self_mask="exclude", **keywords)
        return dimkern.fenchel_dual_loss(x.unsqueeze(2), y, estimator, **keywords)

    def gap() -> float:
        with torch.no_grad():
            x, y = draw(2048, 2, 0.8)
            return float(parts(x, y, "all").mi) - information_in(x, y, 0.8)

    assert gap() < -0.8  # untrained
    adam = torch.optim.Adam(critic.parameters(), 5e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 400)
    for _ in range(400):
        adam.zero_grad()
        parts(*draw(64, 2, 0.8), negatives).loss.backward()
        adam.step()
        falling.step()
    assert -below < gap() < above
