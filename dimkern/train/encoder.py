"""The encoder and the heads of Deep InfoMax (Hjelm et al. 2019), and the two objectives built on them.

Knows nothing of estimators: `DeepInfoMax` gives the pairs (l, m) which every loss of dimkern takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
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
        self.local_channels, self.conv_channels, self.summary_features = channels // 2, channels, summary
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
    """Encoder and heads: images to the pairs (l, m), the two sides of the mutual information, of every term.

    Term "local", DIM(L): l holds a vector of each location of the local map, (N, K, M, M).
    Term "global", DIM(G): l holds one vector of the last map as a whole, (N, K, 1).
    Multi-global: m also holds a vector of each location of the last map, (N, K, P) with P = 1 + M'·M', Y's the first.
    Without heads l and m are the encoder's own features, for critics that take them as they are.

    In training, batch-norm statistics are counted over `norm_batch` images at a time, 0 for all that come.
    """

    def __init__(
        self,
        encoder: Encoder,
        terms: Iterable[str],
        units: int,
        *,
        multi_global: bool = False,
        heads: bool = True,
        norm_batch: int = 0,
    ) -> None:
        super().__init__()
        self.encoder, self.norm_batch = encoder, norm_batch
        self.feature_heads, self.summary_heads, self.map_heads = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for term in terms:
            features = encoder.local_channels if term == "local" else encoder.conv_features
            self.feature_heads[term] = Head(features, units, normalise=True) if heads else nn.Identity()
            self.summary_heads[term] = (
                Head(encoder.summary_features, units, normalise=False) if heads else nn.Identity()
            )
            if multi_global:
                self.map_heads[term] = Head(encoder.conv_channels, units, normalise=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) floats -> "code": Y (N, F), and l and m of every term as "local_l", "local_m" and so on."""
        if not (self.training and 0 < self.norm_batch < len(images)):
            return self.pairs(images)
        groups = [self.pairs(group) for group in torch.split(images, self.norm_batch)]
        return {name: torch.cat([group[name] for group in groups]) for name in groups[0]}

    def pairs(self, images: Tensor) -> dict[str, Tensor]:
        seen = self.encoder(images)
        out = {"code": seen.summary}
        for term, head in self.feature_heads.items():
            whole = seen.conv.flatten(1)
            out[f"{term}_l"] = on_map(head, seen.local) if term == "local" else head(whole).unsqueeze(2)
            m = self.summary_heads[term](seen.summary)
            if term in self.map_heads:
                m = torch.cat([m.unsqueeze(2), on_map(self.map_heads[term], seen.conv).flatten(2)], 2)
            out[f"{term}_m"] = m
        return out


def on_map(head: nn.Module, features: Tensor) -> Tensor:
    """A head on every location of a map (N, C, M, M): a channels-last view (N, K, M, M).

    dimkern takes it as it is, and no transposed copy is made on either side.
    """
    n, c, height, width = features.shape
    rows = features.permute(0, 2, 3, 1).reshape(-1, c)
    out: Tensor = head(rows).view(n, height, width, -1).permute(0, 3, 1, 2)
    return out
