"""What the losses are for: a critic that is trained with them recovers a mutual information that is known."""

import math

import pytest
import torch
from oracle import loss_of

import dimkern

D, RHO = 2, 0.8
STEPS, BATCH = 400, 64
TRUE = -0.5 * D * math.log(1 - RHO**2)  # 1.02 nats


def _draw(n):
    """Pairs of correlated Gaussians as one location and one summary each, (n, D, 1) and (n, D)."""
    y, noise = torch.randn(2, n, D)
    return (RHO * y + math.sqrt(1 - RHO**2) * noise).unsqueeze(2), y


def _information_in(l, m):
    """The mean of log p(c, y)/p(c)p(y) over the pairs: what the best critic finds in this very sample."""
    c, y = l[..., 0].double(), m.double()
    quadratic = (RHO**2 * (c**2 + y**2) - 2 * RHO * c * y) / (2 * (1 - RHO**2))
    return float(TRUE - quadratic.sum(1).mean())


def _trained(estimator, **keywords):
    torch.manual_seed(0)
    critic = dimkern.PairMLPCritic(D, hidden=32)
    optimiser = torch.optim.Adam(critic.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss_of(estimator, *_draw(BATCH), "exclude", critic=critic, **keywords).backward()
        optimiser.step()
        schedule.step()
    return critic


@torch.no_grad()
def _estimated(estimator, critic, n, batches=1):
    """(the estimate, what there was to find) averaged over fresh batches."""
    draws = [_draw(n) for _ in range(batches)]
    found = [float(loss_of(estimator, *x, "exclude", critic=critic, return_parts=True).mi) for x in draws]
    return sum(found) / batches, sum(_information_in(*x) for x in draws) / batches


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["infonce", "dv", "kl"])
def test_known_information_is_recovered(estimator):
    """InfoNCE, DV and KL (NWJ) are lower bounds, tight at their best critic: within 0.06 nats of what is there."""
    critic = _trained(estimator)
    estimate, there = _estimated(estimator, critic, 2048)
    assert there == pytest.approx(TRUE, abs=0.1)
    assert there - 0.06 < estimate < there + 0.02
    if estimator == "infonce":
        # its bias: no batch can tell more than log N apart, so a few images show less of what the critic knows
        few, _ = _estimated(estimator, critic, 3, batches=300)
        assert few < min(math.log(3), estimate - 0.2)
    untrained = dimkern.PairMLPCritic(D, hidden=32)
    assert _estimated(estimator, untrained, 2048)[0] < 0.1


@pytest.mark.slow
def test_one_negative_trains_the_same_critic():
    """Trained against one permuted negative each, JSD's critic is the log ratio all the same."""
    critic = _trained("jsd", negatives="permute")
    estimate, there = _estimated("jsd", critic, 2048)
    assert estimate == pytest.approx(there, abs=0.1)
