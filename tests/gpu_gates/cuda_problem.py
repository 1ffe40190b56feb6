"""The reference CUDA kernel, compiled once for each architecture and launched on a `Problem`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from problem import Problem
from simulator import GlobalMemory, compile_ptx, launch

SHARED_BYTES = 2 * 3 * 64 * 64  # two panels, three stages, 64 rows of 64 bytes
THREADS = 128


@cache
def ptx_of(arch: str) -> str:
    return compile_ptx(Path(__file__).with_name("reference_kernel.cu"), arch)


def run_row_sums(problem: Problem, ptx: str, shared_bytes: int = SHARED_BYTES):
    """(partial sums, (column tiles, rows); what was counted)."""
    memory = GlobalMemory()
    rows, columns = problem.images, problem.columns
    sums = np.full((-(-columns // 64), rows), np.nan, np.float32)
    g, c = (x.view(torch.int16).numpy() for x in (problem.g, problem.c))
    args = [memory.add(g, "g"), memory.add(c, "c"), memory.add(sums, "sums")]
    args += [rows, columns, problem.channels, problem.locations]
    counts = launch(ptx, (-(-rows // 64), sums.shape[0]), args, memory, shared_bytes=shared_bytes)
    return torch.from_numpy(sums), counts
