"""Critics with weights of their own. The dot critic has none: it is the losses' default and needs no object.

Owns the parameters and what is computed once for each image; the pairs are the ops' affair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .plan import score_dtype_of
from .validate import as_locals, as_summaries, check_count, check_pair


class PairMLP(NamedTuple):
    """The pair MLP on one batch, its first layer applied: s = w3·relu(W2·relu(a + b) + b2) + b3, in the score dtype."""

    a: Tensor  # (N, L, H) the locations' part of the first layer
    b: Tensor  # (N, P, H) the summaries' part, with the first bias
    w2: Tensor  # (H, H)
    b2: Tensor  # (H,)
    w3: Tensor  # (H,)
    b3: Tensor  # 0-d

    def scores(self, b: Tensor) -> Tensor:
        """Scores (N, P, L) of each image's locations with the summaries b (N, P, H), by ordinary autograd."""
        hidden = F.relu(self.a.unsqueeze(1) + b.unsqueeze(2))  # (N, P, L, H)
        return F.relu(F.linear(hidden, self.w2, self.b2)) @ self.w3 + self.b3


class PairMLPCritic(nn.Module):
    """The concat critic: a network with two hidden layers scores a summary beside a location (Hjelm et al. 2019, §3.2).

    s = w3·relu(W2·relu(Wy·y + Wc·c + b1) + b2) + b3, the paper's concat-and-convolve. Give it to a loss as
    `critic=`; over all pairs no hidden layer is ever held for more than a tile of them. Each pair still costs
    H² multiply-adds, H/K times the dot critic's: at N=256, L=64, H=512 a step is 6.6 TFLOP.

    Args:
        local_channels: channels of the local features.
        summary_channels: channels of the summary vectors; as many as `local_channels` by default.
        hidden: H, units of both hidden layers.
        device, dtype: of the parameters, as for `torch.nn.Linear`.

    Raises:
        ValueError, TypeError: a count that is no positive int.
    """

    def __init__(
        self,
        local_channels: int,
        summary_channels: int | None = None,
        hidden: int = 512,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.local_channels = check_count("local_channels", local_channels)
        given = local_channels if summary_channels is None else summary_channels
        self.summary_channels = check_count("summary_channels", given)
        H = check_count("hidden", hidden)
        self.local = nn.Linear(local_channels, H, bias=False, device=device, dtype=dtype)  # Wc
        self.summary = nn.Linear(self.summary_channels, H, device=device, dtype=dtype)  # Wy, b1
        self.inner = nn.Linear(H, H, device=device, dtype=dtype)  # W2, b2
        self.outer = nn.Linear(H, 1, device=device, dtype=dtype)  # w3, b3
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters as `torch.nn.Linear` would, the first layer as one over both inputs concatenated."""
        self.inner.reset_parameters()
        self.outer.reset_parameters()
        bound = (self.local_channels + self.summary_channels) ** -0.5
        for parameter in (self.local.weight, self.summary.weight, self.summary.bias):
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def hidden(self) -> int:
        """H, units of each hidden layer."""
        return self.inner.in_features

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of the local features and of the summary vectors that it takes."""
        return self.local_channels, self.summary_channels

    def forward(self, l: Tensor, m: Tensor) -> Tensor:
        """Scores (N, L, P) of each image's own pairs.

        Args:
            l: local features, (N, local_channels, L) or (N, local_channels, H, W).
            m: summary vectors, (N, summary_channels), (N, summary_channels, P) or (N, summary_channels, 1, 1).

        Raises:
            ValueError, TypeError: as for the losses.
        """
        c, g = as_locals(l), as_summaries(m)
        check_pair(l, m, c, g, self.channels, least_images=1)
        one = torch.ones((), dtype=score_dtype_of(c.dtype, g.dtype), device=c.device)
        with torch.autocast(c.device.type, enabled=False):
            layers = self.first_layer(c, g, one)
            return layers.scores(layers.b).transpose(1, 2)

    def first_layer(self, c: Tensor, g: Tensor, scale: Tensor) -> PairMLP:
        """What the pairs need of c (N, ..., Kc) and g (N, P, Ky); `scale` multiplies the scores. Not under autocast."""
        dtype = score_dtype_of(c.dtype, g.dtype, self.inner.weight.dtype)
        w_c, w_y, b1, w2, b2, w3, b3, factor = (
            x.to(dtype)
            for x in (
                self.local.weight, self.summary.weight, self.summary.bias, self.inner.weight, self.inner.bias,
                self.outer.weight, self.outer.bias, scale,
            )
        )  # fmt: skip
        a = F.linear(c.to(dtype), w_c).flatten(1, -2)
        b = F.linear(g.to(dtype), w_y, b1)
        return PairMLP(a, b, w2, b2, w3.view(-1) * factor, b3.view(()) * factor)

    def extra_repr(self) -> str:
        return f"local_channels={self.local_channels}, summary_channels={self.summary_channels}, hidden={self.hidden}"


def check_critic(critic: PairMLPCritic | None, device: torch.device | None = None) -> None:
    """A critic of this module, beside the inputs if they are there already."""
    if critic is None:
        return
    if not isinstance(critic, PairMLPCritic):
        raise TypeError(f"critic is a {type(critic).__name__}; accepted are None (the dot critic) or a PairMLPCritic")
    if device is not None and critic.inner.weight.device != device:
        raise ValueError(f"critic is on {critic.inner.weight.device}, l and m are on {device}")
