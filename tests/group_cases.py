"""What every process of a group runs, and how: `group_losses` and `group_training` hold the cases.

Each `case_*` states a property, in float64 unless it says so.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from oracle import F64, Case, loss_of, naive, upstream_of, varied

from dimkern import grouped
from dimkern.estimators import REGISTRY

TIMEOUT = datetime.timedelta(seconds=60)
ONE_OF_EACH_FAMILY = list({row.family: name for name, row in REGISTRY.items()}.values())


def start(rank, world, folder):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # as in conftest: memory that nobody wrote is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", f"file://{folder}/store{world}", TIMEOUT, world, rank)


def run(rank, world, folder, *modules):
    """A process: the cases of these modules one after another in one group, and a file that says what failed.

    Starting processes takes seconds, a case takes milliseconds.
    """
    start(rank, world, folder)
    failed = {}
    for name, case in [item for module in modules for item in vars(importlib.import_module(module)).items()]:
        if name.startswith("case_"):
            try:
                case()
            except BaseException:
                failed[name] = traceback.format_exc()
            dist.barrier()
    Path(folder, f"failed{rank}").write_text(json.dumps(failed))
    dist.destroy_process_group()


def equal(each=2, group=None):
    return [each] * dist.get_world_size(group)


def unequal(group=None):
    return [3, 1, 2, 1][: dist.get_world_size(group)]


def share(x, counts, group=None):
    """This process's images of a batch, as a leaf with the batch's strides."""
    first = sum(counts[: dist.get_rank(group)])
    return x.detach()[first : first + counts[dist.get_rank(group)]].requires_grad_(x.requires_grad)


def shared_loss(estimator, case, counts, backend="auto", group=None, **keywords):
    """The loss over the group, and this process's leaves l, m, scale."""
    l, m, scale = varied(case, N=sum(counts)).tensors()
    leaves = share(l, counts, group), share(m, counts, group), scale
    loss = loss_of(
        estimator, *leaves[:2], case.self_mask, scale=scale, clip=case.clip, reduction=case.reduction, backend=backend,
        group=group or dist.group.WORLD, **keywords,
    )  # fmt: skip
    return loss, leaves


def assert_same_direction_and_size(what, got, expected):
    if expected.norm() < 1e-12:  # terms that cancel, such as W1's by a bias
        assert got.norm() < 1e-12
        return
    ratio = float(got.norm() / expected.norm())
    cosine = float((got.flatten() @ expected.flatten()) / (got.norm() * expected.norm()))
    assert abs(ratio - 1) <= 1e-10, f"{what} is {ratio} times what it should be"
    assert abs(cosine - 1) <= 1e-12, f"{what} has cosine {cosine} with what it should be"


def assert_exact(estimator, case, counts, backend="auto", group=None):
    """Loss, and gradients of l, m and scale, are those of one process on the whole batch, by float64's pair tensor."""
    case = varied(case, N=sum(counts), l_dtype=F64, m_dtype=F64)
    world = dist.get_world_size(group)
    oracle, upstream = naive(estimator, case), upstream_of(case, ())
    loss, leaves = shared_loss(estimator, case, counts, backend, group)
    torch.testing.assert_close(loss.detach(), oracle.loss, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(loss, leaves, upstream)
    for name, got in zip("lm", grads, strict=False):
        expected = share(oracle.grads[name], counts, group)
        assert_same_direction_and_size(f"{estimator}: gradient of {name}", got / world, expected)
    by_scale = grads[2].clone()
    dist.all_reduce(by_scale, group=group)
    assert_same_direction_and_size(f"{estimator}: gradient of scale", by_scale / world, oracle.grads["s"])


def forced(**blocks):
    """Blocks other than what the plan would choose."""
    choose = grouped.plan_for
    change = lambda *arguments: dataclasses.replace(choose(*arguments), **blocks)  # noqa: E731
    return mock.patch.object(grouped, "plan_for", change)


F64_CASE = Case(P=2, L=6, K=7, l_dtype=F64, m_dtype=F64)
