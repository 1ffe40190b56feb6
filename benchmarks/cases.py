"""The shapes that are timed, and their inputs. Letters as in MATHS.md §1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ESTIMATORS = ("infonce", "jsd", "dv")


@dataclass(frozen=True)
class Case:
    """A batch: N images of L locations and P summaries, K channels.

    `layout` is how the local features lie in memory. "NLK": location by location (a channels-last feature map,
    tokens), so that the (N·L, K) matrix is a view. "NKL": contiguous in cortex_DIM's order, so that whoever
    needs the matrix transposes a copy.
    """

    N: int
    L: int
    K: int
    P: int = 1
    layout: str = "NLK"

    @property
    def name(self) -> str:
        extra = (f" P={self.P}" if self.P > 1 else "") + (f" {self.layout}" if self.layout != "NLK" else "")
        return f"({self.N},{self.L},{self.K}){extra}"

    @property
    def rows(self) -> int:
        return self.N * self.P

    @property
    def pairs(self) -> int:
        return self.rows * self.N * self.L

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
        """l (N, K, L) and m (N, K, P), whose scores have unit variance, as leaves without a gradient."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            # in place and in the dtype asked for: a temporary would hide a contender's peak in ours
            return torch.empty(shape, dtype=dtype).normal_(0.0, self.K**-0.25, generator=generator)

        l = draw(self.N, self.K, self.L) if self.layout == "NKL" else draw(self.N, self.L, self.K).transpose(1, 2)
        return l, draw(self.N, self.P, self.K).transpose(1, 2)


QUICK = (Case(64, 64, 64), Case(128, 64, 512), Case(512, 64, 64), Case(1024, 1, 128))

# From the cheapest to the dearest for the reference formula: `compare` foresees a time from the one before.
FULL = (
    Case(64, 64, 64),
    Case(64, 64, 512),
    Case(64, 64, 2048),
    Case(4096, 1, 128),
    Case(128, 64, 512),
    Case(128, 64, 512, layout="NKL"),
    Case(64, 225, 2048),
    Case(64, 49, 192, P=25),
    Case(256, 64, 64),
    Case(256, 64, 512),
    Case(480, 49, 1536),
    Case(512, 64, 64),
    Case(512, 64, 1024),
    Case(1024, 64, 64),
    Case(1024, 64, 512),
)

README = tuple(Case(N, 64, 512) for N in (16, 32, 64, 128, 256, 512, 1024))

# each product below a tenth of a second
SMALL = (Case(8, 1, 64), Case(16, 64, 512), *(case for case in FULL if case.pairs * case.K < 3e9))

GRIDS = {"quick": QUICK, "full": FULL, "readme": README, "small": SMALL}
