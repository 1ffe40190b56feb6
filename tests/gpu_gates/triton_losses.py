"""The public losses on the simulated GPU: CPU tensors, the driver that Triton is given answers for the device."""

from __future__ import annotations

import dataclasses
from unittest import mock

import torch
from oracle import BF16, F16, F32, Case, assert_within_budget, loss_of, upstream_of, watch_plans
from oracle import Run as OracleRun

from dimkern import ops
from dimkern.gpu_plan import Tile, flash_tile

SMALL = {F32: Tile(64, 64, 32, 4, 3, 2), BF16: Tile(64, 64, 64, 4, 3, 4)}
# weights and alpha times summaries are rounded to bfloat16, float16 features too for the product with the weights;
# where weights are float16 they alone are rounded
ROUNDING = {F32: 0.0, BF16: 3 * 2.0**-9, F16: 2.0**-11}
PLANS = {
    "few launches": {"order": "columns outside", "few_launches": True},
    "rows outside": {"order": "rows outside"},
    "rows outside, blocked": {"order": "rows outside", "row_images": 4, "col_images": 3},
    "columns outside, blocked": {"order": "columns outside", "row_images": 3, "col_images": 4},
    "flash": {"flash": True},
    "flash, blocked": {"flash": True, "col_images": 3},
}

_cublas = torch.library.Library("aten", "IMPL")  # what it computes for a GPU's tensors, for CPU ones
_cublas.impl(
    "baddbmm.dtype_out",
    lambda x, a, b, dtype, *, beta=1, alpha=1, out: torch.baddbmm(
        x, a.float(), b.float(), beta=beta, alpha=alpha, out=out
    ),
    "CPU",
)
_cublas.impl("mm.dtype_out", lambda a, b, dtype, *, out: torch.mm(a.float(), b.float(), out=out), "CPU")
_cublas.impl(
    "addmm.dtype_out",
    lambda x, a, b, dtype, *, beta=1, alpha=1, out: torch.addmm(
        x, a.float(), b.float(), beta=beta, alpha=alpha, out=out
    ),
    "CPU",
)


def force(
    monkeypatch, case: Case, tile: Tile | None = None, order=None, few_launches=False, flash: Tile | bool = False,
    **blocks,
):  # fmt: skip
    """Make the plans of this order, in these blocks, with this tile (by default the smallest); the list of them.

    flash is the tile in which weights stay in registers, or True for the one that is shipped.
    """

    def change(plan):
        p = plan.problem
        assert plan.backend == "triton"
        small = SMALL[BF16 if p.operand_dtype.itemsize == 2 else F32]
        in_registers = flash_tile(plan.gpu.chip, p) if flash is True else flash or None
        choice = dataclasses.replace(plan.gpu, tile=tile or small, few_launches=few_launches, flash=in_registers)
        whole = {"row_images": case.N, "col_images": case.N, **blocks} if order or flash else {}
        kept = p.row.family != "pointwise" and not p.weights_known
        found = ("rows outside" if kept else "columns outside") if flash else order or plan.order
        return dataclasses.replace(plan, gpu=choice, order=found, **whole)

    return watch_plans(monkeypatch, change)


def run(estimator: str, case: Case, backend="triton") -> OracleRun:
    l, m, scale = case.tensors()
    plans, choose = [], ops.plan_for
    with mock.patch.object(ops, "plan_for", lambda *arguments: plans.append(choose(*arguments)) or plans[-1]):
        loss = loss_of(
            estimator, l, m, case.self_mask, scale=scale, clip=case.clip, reduction=case.reduction, backend=backend
        )
        needed = [x for x, name in zip((l, m, scale), "lms", strict=True) if name in case.needs]
        grads = torch.autograd.grad(loss, needed, upstream_of(case, loss.shape).to(loss.dtype))
    names = [name for name in "lms" if name in case.needs]
    return OracleRun(loss.detach(), dict(zip(names, grads, strict=True)), ROUNDING[plans[-1].weight_dtype])


def check(estimator: str, case: Case, backend="triton") -> None:
    assert_within_budget(estimator, case, run(estimator, case, backend))
