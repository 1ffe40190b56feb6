"""The objective: alpha·global + beta·local, each a loss of dimkern between the pairs that the model gives.

The third term, gamma·prior, has an optimiser of its own beside it: prior.py, joined in steps.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import dimkern

from .config import TrainConfig
from .encoder import Encoder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# With scores of a fresh network (tens), e^s and e^-s are so large that nothing is learnt at a scale of 1.
EXPONENTIAL = ("kl", "rkl", "h2")


def terms(config: TrainConfig) -> dict[str, float]:
    """The terms of the objective and their weights; of "both", the local one comes first."""
    weights = {"local": config.beta, "global": config.alpha}
    return weights if config.objective == "both" else {config.objective: weights[config.objective]}


class Objective(nn.Module):
    """The weighted sum of the losses of all terms."""

    def __init__(
        self,
        config: TrainConfig,
        encoder: Encoder,
        generator: torch.Generator,
        group: ProcessGroup | None = None,
    ) -> None:
        """`generator` is what negatives="permute" draws from; the processes of `group` share the batch."""
        super().__init__()
        self.weights, self.pool = terms(config), config.pool
        self.losses = nn.ModuleDict()
        for name in self.weights:
            self.losses[name] = make_loss(config, make_critic(config, name, encoder), generator, group)

    def forward(self, pairs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss, and the MI estimate of the local term (of the global one where that is all there is), in nats."""
        total, estimates = [], []
        for name, loss in self.losses.items():
            l, m = pairs[f"{name}_l"], pairs[f"{name}_m"]
            pool = self.pool or len(l)
            parts = [loss(*pair) for pair in zip(torch.split(l, pool), torch.split(m, pool), strict=True)]
            total.append(self.weights[name] * torch.stack([part.loss for part in parts]).mean())
            estimates.append(torch.stack([part.mi for part in parts]).mean())
        return torch.stack(total).sum(), estimates[0]


def make_critic(config: TrainConfig, name: str, encoder: Encoder) -> dimkern.PairMLPCritic | None:
    """The concat critic of a term, on the encoder's own features; None is the dot product of the heads' outputs."""
    if config.critic == "dot":
        return None
    features = encoder.local_channels if name == "local" else encoder.conv_features
    return dimkern.PairMLPCritic(features, encoder.summary_features, hidden=config.units)


def make_loss(
    config: TrainConfig,
    critic: dimkern.PairMLPCritic | None,
    generator: torch.Generator,
    group: ProcessGroup | None = None,
) -> nn.Module:
    """A module (l, m) -> (loss, e_pos, e_neg, mi) for `config.estimator`."""
    exponential = config.estimator in EXPONENTIAL and config.critic == "dot"
    keywords: dict[str, Any] = {
        "scale": config.scale or (config.units**-0.5 if exponential else 1.0),
        "return_parts": True,
        "critic": critic,
        "negatives": config.negatives,
        "generator": generator if config.negatives == "permute" else None,
        "group": group,
    }
    if config.estimator == "infonce":
        return dimkern.InfoNCELoss(**keywords)
    if config.estimator == "dv":
        return dimkern.DonskerVaradhanLoss(**keywords)
    return dimkern.FenchelDualLoss(config.estimator.upper(), **keywords)
