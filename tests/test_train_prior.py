"""Prior matching moves a distribution to the prior, by gradients that go where they should."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dimkern.train import TrainConfig
from dimkern.train.encoder import DeepInfoMax, Encoder
from dimkern.train.prior import PriorMatching, gradient_penalty
from dimkern.train.steps import Steps


@pytest.mark.parametrize(
    ("prior", "updates"), [("uniform", "alternating"), ("gaussian", "alternating"), ("uniform", "one-step")]
)
def test_codes_of_a_toy_encoder_take_the_priors_distribution(prior, updates):
    """Inputs far from the prior; all that the encoder is told is what the discriminator thinks of its codes."""
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    config = TrainConfig(gamma=1.0, prior=prior, prior_updates=updates, width=4, fc=8, units=8, lr=1e-3)
    steps = Steps(DeepInfoMax(Encoder(1, 8, width=4, fc=8), ["local"], 8), config, torch.device("cpu"))
    steps.prior = PriorMatching(2, prior, config.penalty)
    steps.prior_adam = torch.optim.Adam(steps.prior.parameters(), 1e-3)
    adam = torch.optim.Adam(encoder.parameters(), 1e-3)
    inputs = 3 + torch.randn(2000, 2)

    def distance() -> float:
        """Kolmogorov's, the largest gap between the codes' distribution and the prior's, over components."""
        with torch.no_grad():
            code = steps.prior.code(encoder(inputs))
        level = code if prior == "uniform" else torch.special.ndtr(code)
        return float((level.sort(0).values - torch.linspace(0, 1, len(level))[:, None]).abs().max())

    seen = [distance()]
    for i in range(400):
        _, loss = steps.match(steps.prior, encoder(inputs[torch.randint(2000, (64,), generator=steps.noise)]))
        adam.zero_grad()
        loss.backward()
        adam.step()
        if i % 50 == 49:
            seen.append(distance())
    assert seen[0] > 0.55
    assert sum(seen[-3:]) / 3 < 0.32  # two players circle around the prior: a mean, not the last


def matching(**settings: Any) -> tuple[PriorMatching, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    prior = PriorMatching(3, settings.get("prior", "uniform"), settings.get("penalty", 0.7)).double()
    prior.code = lambda y: y.sigmoid()  # type: ignore[method-assign]  # in float64
    return prior, torch.randn(5, 3).double().requires_grad_(), torch.rand(5, 3).double()


def test_the_two_losses_are_their_formulas_and_reach_only_their_own_side():
    prior, y, drawn = matching()
    net = prior.discriminator
    told = prior.discriminator_loss(y, drawn)
    real, fake = net(drawn), net(y.sigmoid())
    samples = torch.cat([drawn, y.detach().sigmoid()])
    slopes = torch.stack([torch.autograd.functional.jacobian(net, x)[0] for x in samples])  # (10, 3), one by one
    expected = -F.logsigmoid(real).mean() - F.logsigmoid(-fake).mean() + 0.7 * (slopes**2).sum(1).mean()
    assert torch.allclose(told, expected, rtol=1e-12)
    told.backward()
    assert y.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in list(prior.parameters())[:-1])

    prior.zero_grad()
    mistaken = prior.encoder_loss(y)
    assert torch.allclose(mistaken, -F.logsigmoid(fake).mean(), rtol=1e-12)
    mistaken.backward()
    assert all(p.grad is None for p in prior.parameters())
    (expected,) = torch.autograd.grad(-F.logsigmoid(fake).mean(), y)
    assert torch.allclose(y.grad, expected, rtol=1e-10)


def test_the_penaltys_gradient_is_that_of_its_formula():
    """Of D(x) = wᵀ tanh(Vx), whose slope Vᵀ(w(1 - tanh²)) can be written down and differentiated plainly."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    x = torch.randn(6, 3).double()
    ours = torch.autograd.grad(gradient_penalty(net, x), list(net.parameters())[:3])
    weight = (1 - net[:2](x) ** 2) * net[2].weight  # (6, 4)
    expected = torch.autograd.grad(((weight @ net[0].weight) ** 2).sum(1).mean(), list(net.parameters())[:3])
    assert all(torch.allclose(one, other, rtol=1e-10) for one, other in zip(ours, expected, strict=True))
    assert not x.requires_grad


@pytest.mark.parametrize("updates", ["alternating", "one-step"])
def test_the_encoder_meets_the_discriminator_of_its_turn(updates):
    torch.manual_seed(0)
    config = TrainConfig(gamma=0.5, prior_updates=updates, width=4, fc=8, units=8, lr=0.01)
    steps = Steps(DeepInfoMax(Encoder(1, 8, width=4, fc=8), ["local"], 8), config, torch.device("cpu"))
    y = torch.randn(16, 64)
    assert steps.prior is not None
    before = copy.deepcopy(steps.prior)
    _, loss = steps.match(steps.prior, y)
    turns = {"alternating": steps.prior.encoder_loss(y), "one-step": before.encoder_loss(y)}
    assert torch.equal(loss, turns[updates])
    assert not torch.equal(turns["alternating"], turns["one-step"])
