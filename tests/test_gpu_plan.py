"""The plan on a GPU, which needs none: chips are data."""

import dataclasses

import pytest
import torch

from dimkern import gpu, gpu_plan
from dimkern.estimators import REGISTRY
from dimkern.plan import Problem, plan_on_chip, why_not

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CHIPS = [
    gpu_plan.H100,
    gpu_plan.A100,
    dataclasses.replace(gpu_plan.A100, arch=89, shared_memory=101376),
    dataclasses.replace(gpu_plan.H100, arch=120, shared_memory=101376),
]


def problem(estimator="infonce", N=4096, P=1, L=64, K=1024, dtype=BF16, aligned=True, **changes):
    plain = Problem(
        estimator, N, P, L, K, dtype, F32, CUDA, not aligned, False, True, True, summaries_dtype=dtype, aligned=aligned
    )
    return plain._replace(**changes)


@pytest.mark.parametrize(("budget", "within"), [(2.5e9, 1.25), (700e6, 1.5)])
@pytest.mark.parametrize("estimator", ["infonce", "jsd"])
def test_the_shape_it_is_made_for(estimator, budget, within):
    """N=4096, L=64, K=1024 in bfloat16 on an H100, by the model: chosen by the budget alone."""
    plan = plan_on_chip(problem(estimator), int(budget), gpu_plan.H100)
    assert plan.scratch <= budget
    assert plan.gpu.floor == pytest.approx(3 * 2 * 4096 * 4096 * 64 * 1024 / 989e12, rel=0.01)
    assert plan.gpu.seconds <= within * plan.gpu.floor


def test_columns_outside_where_there_is_least_room():
    """The order that keeps only a block of weights serves a small budget, with one product more."""
    plan = plan_on_chip(problem(), 300_000_000, gpu_plan.H100)
    assert (plan.order, plan.gemms) == ("columns outside", 4)
    assert plan.gpu.seconds <= 1.6 * plan.gpu.floor


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: f"sm_{chip.arch}")
@pytest.mark.parametrize("estimator", REGISTRY)
def test_more_room_is_never_slower(estimator, chip):
    for dtype, aligned, N in ((BF16, True, 200), (F16, False, 3), (F32, False, 200)):
        p = problem(estimator, N=N, P=2, L=49, K=72, dtype=dtype, aligned=aligned)
        budgets = [gpu_plan.scratch_bytes(p, 1, 1, False) * 8**i for i in range(6)]
        plans = [plan_on_chip(p, budget, chip) for budget in budgets]
        assert all(plan.scratch <= budget for plan, budget in zip(plans, budgets, strict=True))
        seconds = [plan.gpu.seconds for plan in plans]
        assert seconds == sorted(seconds, reverse=True)
        assert all(plan.gpu.tile.shared_memory(p.operand_dtype.itemsize) < chip.shared_memory for plan in plans)
        with pytest.raises(ValueError, match=r"memory_budget is .* needs at least"):
            plan_on_chip(p, budgets[0] - 1, chip)


def test_small_problems_get_small_tiles():
    """A large tile would leave most of the chip idle."""
    for K in (64, 1024):
        tile = plan_on_chip(problem(N=64, K=K), 10**9, gpu_plan.H100).gpu.tile
        assert tile.BM * tile.BN <= 64 * 64
    assert plan_on_chip(problem(), 3 * 10**9, gpu_plan.H100).gpu.tile.BN == 256


@pytest.mark.parametrize("N", [2, 64, 512])
@pytest.mark.parametrize("estimator", ["infonce", "jsd", "kl"])
def test_small_problems_take_few_launches(estimator, N):
    """Whatever K is; with no room for all weights at once, or a process that has a share of them, there are more."""
    for K in (64, 2048):
        p = problem(estimator, N=N, K=K)
        assert plan_on_chip(p, 10**9, gpu_plan.H100).gpu.few_launches
        assert not plan_on_chip(p._replace(shard=(0, 1)), 10**9, gpu_plan.H100).gpu.few_launches
        tight = gpu_plan.scratch_bytes(p, 1, 1, False)
        assert not plan_on_chip(p, tight, gpu_plan.H100).gpu.few_launches


def test_weights_stay_in_registers_where_that_pays():
    """At small K a pair's weight costs more bytes than its score costs products; and there is no scratch of pairs."""
    for estimator, K, less in (("infonce", 128, 0.75), ("dv", 64, 0.55), ("jsd", 64, 0.95)):
        p = problem(estimator, N=2048, K=K)
        plan = plan_on_chip(p, 20 * 10**9, gpu_plan.H100)
        stored = min(x[0][0] for x in gpu_plan.choices(p, gpu_plan.H100, plan.budget) if x[-1].flash is None)
        assert plan.gpu.flash == gpu_plan.flash_tile(gpu_plan.H100, p)
        assert plan.gpu.seconds < less * stored
        assert plan.scratch < 20 * 10**6
        assert plan.gemms == 4
    locals_alone = plan_on_chip(problem(N=2048, K=64, grad_summaries=False), 10**9, gpu_plan.H100)
    assert (locals_alone.gemms, locals_alone.gpu.flash is None) == (3, False)
    assert plan_on_chip(problem(K=144), 10**10, gpu_plan.H100).gpu.flash is None
    assert plan_on_chip(problem(K=64, dtype=F32), 10**10, gpu_plan.H100).gpu.flash is None
    at_128 = problem(N=2048, K=128)  # an A100 has half the tensor cores for its memory: there room decides
    assert [plan_on_chip(at_128, n * 10**8, gpu_plan.A100).gpu.flash is None for n in (10, 1)] == [True, False]


def test_parts_cover_the_inner_items():
    for chip in (gpu_plan.H100, gpu_plan.A100):
        tile = gpu_plan.flash_tile(chip, problem(K=128))
        for outer in (1, 64, 1000, 131072):
            for inner in (1, 63, 129, 5000, 131072):
                parts, span = gpu_plan.splits(chip, tile, outer, inner)
                assert span % tile.BN == 0
                assert (parts - 1) * span < inner <= parts * span
                assert parts == 1 or parts * -(-outer // tile.BM) <= chip.multiprocessors * tile.programs


def test_the_model_counts_what_is_not_needed():
    whole = plan_on_chip(problem(), 3 * 10**9, gpu_plan.H100).gpu
    for changes, gemms in (({"grad_locals": False}, 2), ({"grad_locals": False, "grad_summaries": False}, 1)):
        less = plan_on_chip(problem(**changes), 3 * 10**9, gpu_plan.H100).gpu
        assert less.floor == pytest.approx(whole.floor * gemms / 3)
        assert less.seconds < whole.seconds * (gemms + 0.5) / 3


def test_reasons(monkeypatch):
    """Why Triton does not serve, in words; every one says what does."""
    assert "no float64" in why_not("triton", CUDA, score_dtype=torch.float64)
    assert "on cpu, not on a GPU" in why_not("triton", CPU)
    monkeypatch.setattr(gpu, "INSTALLED", False)
    assert why_not("triton", CUDA) == "Triton is not installed; the streaming backend serves instead"
