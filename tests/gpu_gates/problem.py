"""One small problem: rows of summaries, columns of locations, and what the reference kernels should make of it."""

from __future__ import annotations

from dataclasses import dataclass

import reference_kernels
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

FORMS = {"pointers": reference_kernels.row_sums, "tma": reference_kernels.row_sums_tma,
         "device": reference_kernels.row_sums_descriptor}  # fmt: skip


@dataclass
class Problem:
    images: int
    locations: int
    channels: int
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def __post_init__(self):
        draw = torch.Generator().manual_seed(self.seed)
        size = self.channels**-0.25  # scores of order 1
        self.g = (torch.randn(self.images, self.channels, generator=draw) * size).to(self.dtype)
        self.c = (torch.randn(self.images * self.locations, self.channels, generator=draw) * size).to(self.dtype)

    @property
    def columns(self) -> int:
        return self.images * self.locations

    def weights(self) -> torch.Tensor:
        """(rows, columns) in float64."""
        own = torch.arange(self.columns)[None] // self.locations == torch.arange(self.images)[:, None]
        return (self.g.double() @ self.c.double().T).exp().masked_fill(own, 0.0)


def run_row_sums(problem: Problem, form: str, *, tile=(64, 64, 64), precision="tf32", emit=False, **options):
    """(partial sums, (column tiles, rows); weights or None) as the kernel leaves them; launch inside `simulated`."""
    br, bc, bk = tile
    rows, columns = problem.images, problem.columns
    sums = torch.full((triton.cdiv(columns, bc), rows), torch.nan)
    weights = torch.full((rows, columns), torch.nan, dtype=problem.dtype) if emit else None
    arguments = [problem.g, problem.c]
    if form == "tma":
        arguments = [
            TensorDescriptor.from_tensor(problem.g, [br, bk]),
            TensorDescriptor.from_tensor(problem.c, [bc, bk]),
        ]
    constants = {"BR": br, "BC": bc, "BK": bk, "EMIT": emit}
    if form == "pointers":
        constants["PRECISION"] = precision
    FORMS[form][(triton.cdiv(rows, br), triton.cdiv(columns, bc))](
        *arguments, sums, weights, rows, columns, problem.channels, problem.locations, **constants, **options
    )
    return sums, weights
