"""From the settings to the loss module of dimkern that computes them."""

from __future__ import annotations

from torch import nn

import dimkern

from .config import TrainConfig

# With scores of a fresh network (tens), e^s and e^-s are so large that nothing is learnt at a scale of 1.
EXPONENTIAL = ("kl", "rkl", "h2")


def make_loss(config: TrainConfig) -> nn.Module:
    """A module (l, m) -> (loss, e_pos, e_neg, mi) for `config.estimator`."""
    scale = config.scale or (config.units**-0.5 if config.estimator in EXPONENTIAL else 1.0)
    if config.estimator == "infonce":
        return dimkern.InfoNCELoss(scale=scale, return_parts=True)
    if config.estimator == "dv":
        return dimkern.DonskerVaradhanLoss(scale=scale, return_parts=True)
    return dimkern.FenchelDualLoss(config.estimator.upper(), scale=scale, return_parts=True)
