"""The public losses on the simulated GPU: CPU tensors, the driver that Triton is given answers for the device."""

from __future__ import annotations

import dataclasses

import torch
from oracle import BF16, F32, Case, assert_within_budget, loss_of, upstream_of, watch_plans
from oracle import Run as OracleRun

from dimkern.gpu_plan import Tile

SMALL = {F32: Tile(64, 64, 32, 4, 3, 2), BF16: Tile(64, 64, 64, 4, 3, 4)}
# weights and alpha times summaries are rounded to bfloat16, float16 features too for the product with the weights
ROUNDING = {F32: 0.0, BF16: 3 * 2.0**-9}
PLANS = {
    "few launches": {"order": "columns outside", "few_launches": True},
    "rows outside": {"order": "rows outside"},
    "rows outside, blocked": {"order": "rows outside", "row_images": 4, "col_images": 3},
    "columns outside, blocked": {"order": "columns outside", "row_images": 3, "col_images": 4},
}

_cublas = torch.library.Library("aten", "IMPL")  # what it computes for a GPU's tensors, for CPU ones
_cublas.impl("mm.dtype_out", lambda a, b, dtype, *, out: torch.mm(a.float(), b.float(), out=out), "CPU")
_cublas.impl(
    "addmm.dtype_out",
    lambda x, a, b, dtype, *, beta=1, alpha=1, out: torch.addmm(
        x, a.float(), b.float(), beta=beta, alpha=alpha, out=out
    ),
    "CPU",
)


def weight_dtype(case: Case) -> torch.dtype:
    return BF16 if case.l_dtype == case.m_dtype and case.l_dtype.itemsize == 2 else F32


def force(monkeypatch, case: Case, tile: Tile | None = None, order=None, few_launches=False, **blocks):
    """Make the plans of this order, in these blocks, with this tile (by default the smallest); the list of them."""

    def change(plan):
        assert plan.backend == "triton"
        choice = dataclasses.replace(plan.gpu, tile=tile or SMALL[weight_dtype(case)], few_launches=few_launches)
        whole = {"row_images": case.N, "col_images": case.N, **blocks} if order else {}
        return dataclasses.replace(plan, gpu=choice, order=order or plan.order, **whole)

    return watch_plans(monkeypatch, change)


def run(estimator: str, case: Case, backend="triton") -> OracleRun:
    l, m, scale = case.tensors()
    loss = loss_of(
        estimator, l, m, case.self_mask, scale=scale, clip=case.clip, reduction=case.reduction, backend=backend
    )
    needed = [x for x, name in zip((l, m, scale), "lms", strict=True) if name in case.needs]
    grads = torch.autograd.grad(loss, needed, upstream_of(case, loss.shape).to(loss.dtype))
    names = [name for name in "lms" if name in case.needs]
    return OracleRun(loss.detach(), dict(zip(names, grads, strict=True)), ROUNDING[weight_dtype(case)])


def check(estimator: str, case: Case, backend="triton") -> None:
    assert_within_budget(estimator, case, run(estimator, case, backend))
