"""The encoder and the heads of Deep InfoMax (Hjelm et al. 2019), and the two objectives built on them.

Knows nothing of estimators: `DeepInfoMax` gives the pair (l, m) which every loss of dimkern takes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Features(NamedTuple):
    """What the encoder says about a batch."""

    local: Tensor  # (N, C, M, M)
    conv: Tensor  # (N, C', M', M'), the last map
    fc: Tensor  # (N, F)
    summary: Tensor  # (N, 64)


class Encoder(nn.Module):
    """Convolutions (k4 s2 p1, BN, ReLU) down to a 4x4 map, then fc (BN, ReLU), then the summary.

    The local map is the one before the last. 32x32 gives the paper's encoder: 64-128-256 channels, local features
    128x8x8. Images of 8x8 first pass a k3 s1 convolution and go down to 2x2, so that their local map is 4x4.
    Sides that are no power of two, or below 8, are padded to the next (28 to 32) by repeating the border.
    """

    def __init__(self, channels: int, size: int, width: int = 64, fc: int = 1024, summary: int = 64) -> None:
        super().__init__()
        self.size = max(8, 2 ** math.ceil(math.log2(size)))
        small = self.size == 8
        stages: list[nn.Module] = [conv_block(channels, width, kernel=3, stride=1)] if small else []
        side = self.size
        channels = width if small else channels
        while side > (2 if small else 4):
            wider = width * 2 ** len(stages)
            stages.append(conv_block(channels, wider, kernel=4, stride=2))
            channels, side = wider, side // 2
        self.local_channels = channels // 2
        self.conv_features = channels * side * side
        self.to_local = nn.Sequential(*stages[:-1])
        self.to_conv = stages[-1]
        self.to_fc = nn.Sequential(nn.Linear(self.conv_features, fc, bias=False), nn.BatchNorm1d(fc), nn.ReLU())
        self.to_summary = nn.Linear(fc, summary)

    def forward(self, images: Tensor) -> Features:
        """(N, C, H, W) floats, H, W at most `self.size`."""
        down, right = self.size - images.shape[2], self.size - images.shape[3]
        if down or right:
            images = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")
        local = self.to_local(images)
        conv = self.to_conv(local)
        fc = self.to_fc(conv.flatten(1))
        return Features(local, conv, fc, self.to_summary(fc))


def conv_block(channels: int, out: int, *, kernel: int, stride: int) -> nn.Module:
    # No bias: batch normalisation removes it.
    return nn.Sequential(nn.Conv2d(channels, out, kernel, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class Head(nn.Module):
    """Rows of features into the space where pairs are scored: a residual block of two layers.

    On the rows of a feature map, one per location, its Linear layers are the paper's 1x1 convolutions.
    """

    def __init__(self, features: int, units: int, *, normalise: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Linear(features, units, bias=False), nn.BatchNorm1d(units), nn.ReLU(), nn.Linear(units, units)
        )
        self.shortcut = nn.Linear(features, units)
        self.norm = nn.LayerNorm(units) if normalise else nn.Identity()
        with torch.no_grad():  # near identity: at the start a head passes on what it is given
            self.shortcut.weight.uniform_(-0.01, 0.01).diagonal().fill_(1.0)

    def forward(self, rows: Tensor) -> Tensor:
        """(R, features) -> (R, units)."""
        out: Tensor = self.norm(self.block(rows) + self.shortcut(rows))
        return out


class DeepInfoMax(nn.Module):
    """Encoder and heads: images to (l, m), the two sides of the mutual information.

    objective "local", DIM(L): l holds a vector of each location of the local map, (N, K, M, M).
    objective "global", DIM(G): l holds one vector of the last map as a whole, (N, K, 1).
    """

    def __init__(self, encoder: Encoder, objective: str, units: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.objective = objective
        features = encoder.local_channels if objective == "local" else encoder.conv_features
        self.feature_head = Head(features, units, normalise=True)
        self.summary_head = Head(encoder.to_summary.out_features, units, normalise=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) floats -> l: (N, K, M, M) or (N, K, 1), m: (N, K)."""
        seen = self.encoder(images)
        m = self.summary_head(seen.summary)
        if self.objective == "global":
            return self.feature_head(seen.conv.flatten(1)).unsqueeze(2), m
        n, c, height, width = seen.local.shape
        rows = seen.local.permute(0, 2, 3, 1).reshape(-1, c)
        # A channels-last view: dimkern takes it as it is, and no transposed copy is made on either side.
        return self.feature_head(rows).view(n, height, width, -1).permute(0, 3, 1, 2), m
