"""negatives="permute" and "roll": each image's locations against the summaries of one other image."""

import math

import pytest
import torch
from oracle import DIVERGENCES, F64, loss_of, reductions, sp

import dimkern
from dimkern import one_negative
from dimkern.estimators import REGISTRY

LOSSES = [(estimator, reduction) for estimator in REGISTRY for reduction in reductions(estimator)]
CRITICS = {"dot": None, "pair_mlp": lambda: dimkern.PairMLPCritic(5, hidden=11).double()}


def _score(critic, y, x):
    """One pair, with no more than the definition."""
    if critic is None:
        return y @ x
    first = critic.summary.weight @ y + critic.local.weight @ x + critic.summary.bias
    second = critic.inner.weight @ first.relu() + critic.inner.bias
    return (critic.outer.weight @ second.relu() + critic.outer.bias)[0]


def _naive(estimator, l, m, critic, scale, clip, self_mask, partner):
    """Item losses, as for the losses over all pairs, and the number of candidates: loops over images."""

    def scores(i, p, j):  # summary p of image i with the locations of image j
        s = scale * torch.stack([_score(critic, m[i, :, p], l[j, :, t]) for t in range(L)])
        return s if clip is None else clip * (s / clip).tanh()

    (N, _, L), P = l.shape, m.shape[2]
    met = {int(partner[j]): j for j in range(N)}  # the image whose locations are i's negatives
    positives = torch.stack([torch.stack([scores(i, p, i) for p in range(P)]) for i in range(N)])
    negatives = torch.stack([torch.stack([scores(i, p, met[i]) for p in range(P)]) for i in range(N)])
    if estimator == "infonce":
        if self_mask == "official":
            negatives = torch.cat([negatives, torch.full_like(negatives, -10.0)], -1)
        return sp(negatives.logsumexp(-1, keepdim=True) - positives).transpose(1, 2)
    if estimator == "dv":
        return negatives.logsumexp((0, 1, 2)) - math.log(N * P * L) - positives.mean()
    f, h = DIVERGENCES[estimator]
    return h(negatives).mean(-1) - f(positives).mean(-1)


@pytest.mark.parametrize("negatives", ["permute", "roll"])
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
def test_the_loss_is_the_loops(estimator, reduction, critic, negatives):
    """Loss and gradients, with and without clip and phantom negatives, are those of loops over images and pairs."""
    torch.manual_seed(0)
    net = CRITICS[critic] and CRITICS[critic]()
    l = torch.randn(5, 5, 3, dtype=F64, requires_grad=True)
    m = torch.randn(5, 5, 2, dtype=F64, requires_grad=True)
    scale = torch.tensor(0.4, dtype=F64, requires_grad=True)
    leaves = [l, m, scale, *(net.parameters() if net else ())]
    for clip, self_mask in ((None, "official"), (1.2, "exclude")):
        draws = [torch.Generator().manual_seed(7) if negatives == "permute" else None for _ in range(2)]
        got = loss_of(
            estimator, l, m, self_mask, scale=scale, clip=clip, reduction=reduction, critic=net, negatives=negatives,
            generator=draws[0],
        )  # fmt: skip
        partner = one_negative.partners(negatives, 5, l.device, draws[1])
        naive = _naive(estimator, l, m, net, scale, clip, self_mask, partner)
        naive = {"mean": naive.mean, "sum": naive.sum, "none": lambda naive=naive: naive}[reduction]()
        torch.testing.assert_close(got, naive, rtol=1e-11, atol=1e-12)
        upstream = torch.randn_like(got)
        for a, b in zip(
            torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(naive, leaves, upstream), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("estimator", REGISTRY)
def test_information_counts_the_candidates_that_were_met(estimator):
    """InfoNCE's estimate is log(1 + L) - loss; a bound is its own; no other estimate depends on the negatives."""
    l, m = torch.randn(6, 5, 4), torch.randn(6, 5)
    got = loss_of(estimator, l, m, negatives="roll", return_parts=True)
    if REGISTRY[estimator].mi == "bound":
        expected = (math.log(5) if estimator == "infonce" else 0.0) - got.loss
    else:
        expected = loss_of(estimator, l, m, return_parts=True).mi
    torch.testing.assert_close(got.mi, expected, equal_nan=True)


@pytest.mark.parametrize("N", [2, 3, 17])
def test_no_image_meets_itself_and_each_is_met_once(N):
    for seed in range(50):
        partner = one_negative.partners("permute", N, torch.device("cpu"), torch.Generator().manual_seed(seed))
        assert sorted(partner.tolist()) == list(range(N))
        assert bool((partner != torch.arange(N)).all())
    assert one_negative.partners("roll", N, torch.device("cpu"), None).tolist() == [*range(1, N), 0]


def test_every_other_image_is_equally_likely():
    N, draws = 5, 4000
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(N, N)
    for _ in range(draws):
        counts[torch.arange(N), one_negative.partners("permute", N, torch.device("cpu"), generator)] += 1
    assert bool((counts.diagonal() == 0).all())
    others = counts[~torch.eye(N, dtype=torch.bool)]
    spread = (draws * 0.25 * 0.75) ** 0.5
    assert float((others - draws / 4).abs().max()) < 5 * spread


def test_draws_are_reproducible_and_differ():
    l, m = torch.randn(16, 3, 2), torch.randn(16, 3)

    def draw(generator=None):
        return float(dimkern.infonce_loss(l, m, negatives="permute", generator=generator))

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert (draw(), draw()) == (first, second)
    assert first != second
    assert draw(torch.Generator().manual_seed(5)) == draw(torch.Generator().manual_seed(5))


@pytest.mark.parametrize("negatives", ["permute", "roll"])
def test_compile(negatives):
    torch._dynamo.reset()
    l, m = torch.randn(6, 3, 2, requires_grad=True), torch.randn(6, 3)

    def run(l, m):
        torch.manual_seed(0)
        return dimkern.fenchel_dual_loss(l, m, negatives=negatives)

    def compiled(l, m):
        return dimkern.fenchel_dual_loss(l, m, negatives=negatives)

    torch.manual_seed(0)
    got = torch.compile(compiled, fullgraph=True, backend="aot_eager")(l, m)
    torch.testing.assert_close(got, run(l, m))


@pytest.mark.parametrize("negatives", ["permute", "roll"])
def test_halves_and_autocast_round_nothing(negatives):
    l, m = torch.randn(6, 3, 2).bfloat16(), torch.randn(6, 3).bfloat16()
    outside = dimkern.infonce_loss(l.float(), m.float(), negatives=negatives, **_generator(negatives))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = dimkern.infonce_loss(l, m, negatives=negatives, **_generator(negatives))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def _generator(negatives):
    return {"generator": torch.Generator().manual_seed(0)} if negatives == "permute" else {}
