"""cortex_DIM's losses, its formulas as MATHS.md §2 states them, to 1e-12 in float64."""

import math

import pytest
import torch

import dimkern

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}
N, K, L, P = 7, 5, 6, 2


def _features(spread):
    generator = torch.Generator().manual_seed(int(1000 * spread))
    l = (torch.randn(N, K, L, dtype=torch.float64, generator=generator) * spread).requires_grad_()
    m = (torch.randn(N, K, P, dtype=torch.float64, generator=generator) * spread).requires_grad_()
    return l, m


def _own(s):
    """1 at own-image pairs of (N, P, N, L)."""
    return torch.eye(N, dtype=s.dtype)[:, None, :, None].expand_as(s)


def official_infonce(l, m):
    """Own-image negatives are replaced by -10, not dropped; logits are [positive, negatives]; -log_softmax[0]."""
    s = torch.einsum("ikp,jkl->ipjl", m, l)
    own = _own(s)
    negatives = (s * (1 - own) + -10.0 * own).flatten(2)  # (N, P, N·L)
    positives = torch.einsum("ikp,ikl->ipl", m, l)
    logits = torch.cat([positives[..., None], negatives[:, :, None].expand(-1, -1, L, -1)], -1)
    return -logits.log_softmax(-1)[..., 0].mean()


def sp(z):
    return torch.nn.functional.softplus(z, threshold=50)


POSITIVE = {
    "GAN": lambda s: -sp(-s),
    "JSD": lambda s: math.log(2) - sp(-s),
    "KL": lambda s: s,
    "RKL": lambda s: -torch.exp(-s),
    "H2": lambda s: 1 - torch.exp(-s),
    "W1": lambda s: s,
}
NEGATIVE = {
    "GAN": lambda s: sp(-s) + s,
    "JSD": lambda s: sp(-s) + s - math.log(2),
    "KL": lambda s: torch.exp(s - 1),
    "RKL": lambda s: s - 1,
    "H2": lambda s: torch.exp(s) - 1,
    "W1": lambda s: s,
}


def official_divergence(l, m, measure):
    """Means over all pairs, own-image and other, taken with a mask."""
    s = torch.einsum("ikp,jkl->ipjl", m, l)
    own = _own(s)
    e_pos = (POSITIVE[measure](s) * own).sum() / own.sum()
    e_neg = (NEGATIVE[measure](s) * (1 - own)).sum() / (1 - own).sum()
    return e_neg - e_pos


def _assert_equal(ours, theirs, l, m):
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    factor = 1.37
    for got, expected in zip(
        torch.autograd.grad(ours * factor, (l, m)), torch.autograd.grad(theirs * factor, (l, m)), strict=True
    ):
        torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_infonce(spread, backend):
    l, m = _features(spread)
    _assert_equal(dimkern.infonce_loss(l, m, self_mask="official", backend=backend), official_infonce(l, m), l, m)


def test_infonce_where_the_phantoms_dominate():
    """At scores around -20 and below the -10 of its own locations is most of the official denominator."""
    l, m = _features(1.0)
    shifted = torch.cat([l, torch.full((N, 1, L), -5.0, dtype=l.dtype)], 1)
    summary = torch.cat([m, torch.full((N, 1, P), 5.0, dtype=m.dtype)], 1)
    official = dimkern.infonce_loss(shifted, summary)
    _assert_equal(official, official_infonce(shifted, summary), l, m)
    assert official > 3 + dimkern.infonce_loss(shifted, summary, self_mask="exclude")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("measure", sorted(POSITIVE))
@pytest.mark.parametrize("spread", [0.01, 0.8])
def test_divergences(measure, spread, backend):
    l, m = _features(spread)
    _assert_equal(dimkern.fenchel_dual_loss(l, m, measure, backend=backend), official_divergence(l, m, measure), l, m)


def test_the_defaults_are_cortex_dims():
    l, m = _features(1.0)
    torch.testing.assert_close(dimkern.infonce_loss(l, m), official_infonce(l, m), **TOLERANCE)
    torch.testing.assert_close(dimkern.fenchel_dual_loss(l, m), official_divergence(l, m, "JSD"), **TOLERANCE)
    torch.testing.assert_close(dimkern.fenchel_dual_loss(l, m, "kl"), official_divergence(l, m, "KL"), **TOLERANCE)
