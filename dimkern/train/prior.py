"""Prior matching: an adversary makes the distribution of the codes that of a prior (Hjelm et al. 2019, sec. 3.3).

The discriminator tells draws of the prior from codes; the encoder is trained to be mistaken for the prior. Two separate
losses: the discriminator's sees detached codes, the encoder's leaves the discriminator as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PriorMatching(nn.Module):
    """A discriminator of 1000-200-1 units (the paper's) between a prior and the codes.

    "uniform": sigmoid(Y) against U[0, 1]; "gaussian": Y against N(0, 1), in every component.
    """

    def __init__(self, features: int, prior: str, penalty: float) -> None:
        super().__init__()
        self.prior, self.penalty = prior, penalty
        self.discriminator = nn.Sequential(
            nn.Linear(features, 1000), nn.ReLU(), nn.Linear(1000, 200), nn.ReLU(), nn.Linear(200, 1)
        )

    def code(self, y: Tensor) -> Tensor:
        """Y (N, F) as it is compared with the prior, in float32."""
        return y.float().sigmoid() if self.prior == "uniform" else y.float()

    def draw(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """As many draws of the prior as there are codes in `y` (N, F)."""
        make = torch.rand if self.prior == "uniform" else torch.randn
        return make(y.shape, generator=generator).to(y.device)

    def discriminator_loss(self, y: Tensor, drawn: Tensor) -> Tensor:
        """E[softplus(-D(drawn))] + E[softplus(D(code))] + penalty, in nats; no gradient reaches `y` (N, F)."""
        code = self.code(y.detach())
        told = F.softplus(-self.discriminator(drawn)).mean() + F.softplus(self.discriminator(code)).mean()
        if self.penalty == 0:
            return told
        return told + self.penalty * gradient_penalty(self.discriminator, torch.cat([drawn, code]))

    def encoder_loss(self, y: Tensor) -> Tensor:
        """E[softplus(-D(code))], the non-saturating loss, in nats; its gradient reaches `y` (N, F) only."""
        # a copy: the discriminator may step before this loss goes back
        fixed = {name: weight.detach().clone() for name, weight in self.discriminator.named_parameters()}
        return F.softplus(-torch.func.functional_call(self.discriminator, fixed, self.code(y))).mean()


def gradient_penalty(net: nn.Module, samples: Tensor) -> Tensor:
    """E[|dD(x)/dx|²] over every one of `samples` (n, F), differentiable (Mescheder et al. 2018)."""
    samples = samples.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(net(samples).sum(), samples, create_graph=True)
    return gradient.square().sum(1).mean()
