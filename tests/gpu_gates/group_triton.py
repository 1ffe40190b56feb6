"""Every process of a group on a simulated GPU of its own: the Triton tiles of its images against all summaries."""

from __future__ import annotations

import dataclasses
from unittest import mock

import torch
import torch.distributed as dist
import triton_losses
from group_cases import equal, shared_loss, unequal
from group_losses import expected_error
from oracle import BF16, F16, F32, Case, Run, assert_within_budget, upstream_of, varied
from simulator import simulated

import dimkern
from dimkern import gpu_plan, grouped

ARCHITECTURES = {2: 90, 3: 80}  # by the number of processes
RAGGED = Case(P=3, L=11, K=40, scale=0.3, l_dtype=BF16, m_dtype=BF16)
ROWS, COLUMNS = "rows outside", "columns outside"


def check(estimator, case, counts, backend="auto", flash=False, **blocks):
    """Loss and gradients by l, m and scale are those of all images, by float64's pair tensor."""
    case, world = varied(case, N=sum(counts)), len(counts)
    plans, choose = [], grouped.plan_for

    def forced(*arguments):
        plan = choose(*arguments)
        tile = gpu_plan.flash_tile(plan.gpu.chip, plan.problem) if flash else None
        plans.append(dataclasses.replace(plan, gpu=dataclasses.replace(plan.gpu, flash=tile), **blocks))
        return plans[-1]

    with simulated(ARCHITECTURES[world]) as gpu, mock.patch.object(grouped, "plan_for", forced):
        loss, leaves = shared_loss(estimator, case, counts, backend)
        grads = torch.autograd.grad(loss, leaves, upstream_of(case, loss.shape).to(loss.dtype))
    assert [plan.backend for plan in plans] == ["triton"]
    assert gpu.launches
    everyone = [None] * world
    dist.all_gather_object(everyone, [(x.double() / world).to(x.dtype) for x in grads])
    of_l, of_m, of_scale = zip(*everyone, strict=True)
    whole = {"l": torch.cat(of_l), "m": torch.cat(of_m), "s": torch.stack(of_scale).sum(0)}
    assert_within_budget(estimator, case, Run(loss.detach(), whole, triton_losses.ROUNDING[plans[0].weight_dtype]))


def case_each_family_in_every_order():
    """Blocks that hold none, some or all of a process's own rows."""
    for estimator in ("infonce", "dv", "jsd"):
        check(estimator, RAGGED, unequal())
        check(estimator, RAGGED, equal(), "triton", order=COLUMNS, row_images=2)
        if estimator != "jsd":
            check(estimator, RAGGED, equal(3), order=ROWS, row_images=2, col_images=2)
            check(estimator, RAGGED, unequal(), order=ROWS, row_images=sum(unequal()), col_images=1)
    check("infonce", varied(RAGGED, clip=1.5, self_mask="exclude"), unequal(), order=COLUMNS, row_images=2)


def case_weights_in_registers():
    """All rows at once, of a process's columns a block at a time."""
    for estimator in ("infonce", "dv", "jsd"):
        whole = {"order": COLUMNS if estimator == "jsd" else ROWS, "row_images": sum(unequal())}
        check(estimator, RAGGED, unequal(), flash=True, **whole)
        check(estimator, varied(RAGGED, clip=1.5), unequal(), flash=True, col_images=1, **whole)


def case_dtypes_and_layouts():
    for dtype, order in ((F32, ROWS), (F16, COLUMNS)):
        case = varied(RAGGED, P=1, K=32, l_dtype=dtype, m_dtype=dtype, l_layout="channels_last", m_layout="NK")
        check("infonce", case, equal(), order=order, row_images=2)


def case_references_that_fail():
    """Rows whose own images are on another process have no positive here to be relative to."""
    for scale in (1e3, -1e3):
        check("infonce", varied(RAGGED, scale=scale), unequal(), order=ROWS, row_images=sum(unequal()))


def case_items():
    """reduction="none": upstream weights of one process's items reach the pairs of every other."""
    counts = unequal()
    case = varied(RAGGED, N=sum(counts), reduction="none", l_dtype=F32, m_dtype=F32)
    runs = []
    for backend in ("triton", "streaming"):
        with simulated(ARCHITECTURES[len(counts)]):
            loss, leaves = shared_loss("infonce", case, counts, backend)
            upstream = torch.linspace(0.5, 2.0, loss.numel()).view_as(loss)
            runs.append((loss.detach(), *torch.autograd.grad(loss, leaves, upstream)))
    torch.testing.assert_close(*runs, rtol=2e-5, atol=2e-5)


def case_forward_only():
    with simulated(ARCHITECTURES[dist.get_world_size()]), torch.no_grad():
        losses = [shared_loss("infonce", varied(RAGGED, N=sum(unequal())), unequal(), b)[0] for b in ("auto", "cpu")]
    torch.testing.assert_close(*losses)


def case_explain():
    l, m, _ = varied(RAGGED, N=2).tensors()
    with simulated(ARCHITECTURES[dist.get_world_size()]):
        said = dimkern.explain(l, m, group=dist.group.WORLD)
    assert "backend: triton" in said, said


def case_different_gpus():
    """Blocks follow from the chip, and collectives from the blocks."""
    with (
        simulated(ARCHITECTURES[dist.get_world_size()], multiprocessors=4 + dist.get_rank()),
        expected_error(dimkern.GroupError, "disagree on the GPU"),
    ):
        shared_loss("infonce", varied(RAGGED, N=sum(equal())), equal())
