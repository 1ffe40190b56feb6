"""Memory: scratch stays within the plan's promise and the budget, and pair counts beyond 2**31 are right."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import BACKENDS, BF16, F64, Case, items, loss_of, pair_scores, reductions, watch_plans
from torch.profiler import ProfilerActivity, profile

import dimkern
from dimkern import ops
from dimkern.estimators import REGISTRY
from dimkern.plan import describe, make_plan
from dimkern.validate import as_locals, as_summaries

ONE_OF_EACH_FAMILY = list({row.family: name for name, row in REGISTRY.items()}.values())
SMALL = 2_000  # bytes of 0-d and per-image statistics that the plan rounds away


def peak_of(run):
    """(the most that was allocated at once while `run` ran, what it returned): every allocation, exactly."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert most > 0
    return most, result


VARIANTS = {
    "contiguous (N, K, L)": {},
    "channels-last": {"l_layout": "channels_last"},
    "bfloat16": {"l_dtype": BF16, "m_dtype": BF16},
    "float64": {"l_dtype": F64, "m_dtype": F64},
    "soft clip": {"clip": 3.0},
    "one location": {"L": 1, "N": 60},
    "wide": {"K": 200, "L": 4},
    "strided": {"l_layout": "image_slice", "m_layout": "strided"},
}
SPACES = [(backend, estimator) for backend in BACKENDS for estimator in REGISTRY]


@pytest.mark.parametrize(("backend", "estimator"), SPACES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_scratch_is_within_plan_and_budget(backend, estimator, variant, monkeypatch):
    """Forward, and the backward that sweeps again: what is allocated beyond outputs is what the plan said, or less."""
    fields = {"N": 24, "P": 2, "L": 20, "K": 16, **VARIANTS[variant]}
    plans = _run_within_budget(backend, estimator, fields, monkeypatch)
    if backend == "streaming" or "wide" in variant:  # the budgets did change something
        assert len({plan.scratch for plan in plans}) >= (3 if backend == "streaming" else 2)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native CPU library was not built")
@pytest.mark.parametrize("estimator", ONE_OF_EACH_FAMILY)
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("shape", [(40, 14, 13, 70), (5, 1, 999, 700)], ids=str)
def test_every_threads_share_is_in_the_plan(estimator, threads, shape, monkeypatch):
    """Native threads have a tile, panels and partial gradients each, whatever the shape of the pairs."""
    torch.set_num_threads(threads)
    try:
        for variant in ({}, {"l_dtype": BF16}):
            fields = {**dict(zip("NPLK", shape, strict=True)), **variant}
            plans = _run_within_budget("cpu", estimator, fields, monkeypatch, budgets=(0.7, 1.0))
            assert {plan.problem.threads for plan in plans} == {threads}
    finally:
        torch.set_num_threads(1)


def _run_within_budget(backend, estimator, fields, monkeypatch, budgets=(0.0, 0.3, 0.5, 0.7, 1.0)):
    """The plans of a problem at several budgets, each of which held."""
    plans = watch_plans(monkeypatch)
    for budget in budgets:
        for reduction in {"mean", reductions(estimator)[-1]}:
            case = Case(**fields, reduction=reduction, budget=budget)
            l, m, scale = (x.detach() for x in case.tensors())
            c, g = as_locals(l), as_summaries(m)
            fixed = estimator, 1e-4, case.clip

            def forward(c=c, g=g, scale=scale, fixed=fixed, reduction=reduction):
                if reduction == "mean":
                    return ops._mean_loss_op(c, g, scale, *fixed, True, True, backend)
                return ops.scores(c, g, scale, *fixed, backend)

            with dimkern.config(memory_budget=case.budget_bytes(estimator, backend)):
                runs = [peak_of(forward)]
            if reduction == "none":
                positives, negatives, limit = runs[0][1]
                known = negatives, torch.randn_like(positives), torch.randn_like(negatives), limit, estimator, case.clip
                runs.append(peak_of(lambda a=(c, g, scale, *known): ops._scores_backward(*a, True, True, backend)))
            for plan, (peak, outputs) in zip(plans[-len(runs) :], runs, strict=True):
                scratch = peak - sum(x.nbytes for x in outputs)
                if plan.summed_dtype != plan.problem.locals_gradient_dtype:
                    scratch -= c.numel() * plan.summed_dtype.itemsize
                assert plan.scratch <= plan.budget
                assert scratch <= plan.scratch + SMALL, f"{scratch} bytes where {plan} has {plan.scratch}"
    return plans


def test_the_measure_would_see_a_pair_tensor():
    l, m = torch.randn(64, 8, 20), torch.randn(64, 8)
    pairs = 64 * 64 * 20 * 4
    with dimkern.config(memory_budget="100kB"):
        assert peak_of(lambda: loss_of("jsd", l, m, backend="streaming"))[0] < 120_000 < pairs
    assert peak_of(lambda: loss_of("jsd", l, m, backend="reference"))[0] > 2 * pairs


def test_room_for_rounding_is_planned_only_where_something_is_rounded():
    """A bfloat16 gradient by the local features, made by one process: not without it, nor over a group."""
    c, g = torch.randn(300, 2, 65).bfloat16(), torch.randn(300, 1, 65).bfloat16()
    made, unmade = (
        describe("infonce", c, g, clip=None, grad_locals=by_c, grad_summaries=True) for by_c in (True, False)
    )
    assert make_plan(made, 2**28, "cpu").scratch > make_plan(unmade, 2**28, "cpu").scratch
    shared = [make_plan(p._replace(shard=(0, p.N)), 2**28, "cpu") for p in (made, unmade)]
    assert shared[0].scratch == shared[1].scratch
    assert shared[0].summed_dtype == torch.float32


IN_A_FRESH_PROCESS = """
import json, resource, sys, torch, dimkern
torch.set_num_threads(1)
estimator, N, L, K = sys.argv[1], *map(int, sys.argv[2:])
def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
def loss_of(l, m):
    return dimkern.infonce_loss(l, m) if estimator == "infonce" else dimkern.fenchel_dual_loss(l, m, estimator)
warm = torch.randn(8, K, 4, requires_grad=True)
loss_of(warm, torch.randn(8, K, requires_grad=True)).backward()
# few kinds of images: the loss follows from counts
torch.manual_seed(0)
kinds_l, kinds_m = torch.randn(7, K, L) * K**-0.5, torch.randn(7, K)
l, m = (x[torch.arange(N) % 7].contiguous().requires_grad_() for x in (kinds_l, kinds_m))
before = resident()
loss = loss_of(l, m)
loss.backward()
added = resident() - before - l.grad.nbytes - m.grad.nbytes
rows = torch.tensor([0, 1, 6, N // 2, N - 1])
torch.save((kinds_l, kinds_m, loss.detach(), rows, l.grad[rows], m.grad[rows]), sys.stdout.buffer)
print(json.dumps({"added": added}), file=sys.stderr)
"""


def _in_a_fresh_process(estimator, N, L, K):
    """Bytes added beyond inputs and gradients; and kinds of features, loss, and some images' gradients."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS, estimator, str(N), str(L), str(K)],
        capture_output=True, cwd=root, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stderr.splitlines()[-1])["added"], torch.load(io.BytesIO(done.stdout), weights_only=True)


def _assert_as_counted(estimator, N, kinds_l, kinds_m, loss, rows, by_l, by_m):
    """Loss and gradients from the kinds alone, in float64: image i is of kind i % 7."""
    kind = torch.arange(N) % 7
    count = torch.bincount(kind).double()
    l, m = (x.double().requires_grad_() for x in (kinds_l, kinds_m))
    s = torch.einsum("ak,bkl->abl", m, l)
    L = s.shape[2]
    own = s[range(7), range(7)]  # (7, L) positives of each kind
    others = count.expand(7, 7) - torch.eye(7)  # images of kind b that are negatives of one image of kind a
    share = count / N
    if estimator == "infonce":
        total = torch.cat([s.flatten(1) + others.log().repeat_interleave(L, 1), torch.full((7, L), -10.0).double()], 1)
        exact = (torch.logaddexp(total.logsumexp(1, keepdim=True), own) - own).mean(1) @ share
    else:
        exact = ((s.mean(2) * others).sum(1) / (N - 1) - own.mean(1)) @ share
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=2e-6)
    # a kind's gradient is shared by its images
    for got, whole in zip((by_l, by_m), torch.autograd.grad(exact, (l, m)), strict=True):
        each = (whole / count.view(-1, *[1] * (whole.ndim - 1)))[kind[rows]]
        torch.testing.assert_close(got.double(), each, rtol=1e-3, atol=2e-5 * float(each.abs().max()))


@pytest.mark.slow
def test_peak_memory_of_a_large_batch():
    """N=4096, L=64, K=64: less than 400 MB beyond inputs and gradients; the pair tensor alone has 4.3 GB."""
    added, run = _in_a_fresh_process("infonce", 4096, 64, 64)
    assert added < 400e6, f"{added / 1e6:.0f} MB"
    _assert_as_counted("infonce", 4096, *run)


@pytest.mark.slow
def test_more_pairs_than_32_bits_count():
    """N=16384, L=16: 4.3e9 pairs, loss and gradients as counted from the few kinds of images there are."""
    N, L = 16384, 16
    assert N * N * L > 2**31
    added, run = _in_a_fresh_process("infonce", N, L, 4)
    _assert_as_counted("infonce", N, *run)
    assert added < 400e6, f"{added / 1e6:.0f} MB"


def test_the_count_is_the_oracle_at_small_size():
    """The closed form that the large batches are held to is MATHS.md's loss."""
    kinds_l, kinds_m = torch.randn(7, 3, 2), torch.randn(7, 3)
    rows = torch.tensor([0, 5, 22])
    for estimator in ("infonce", "w1"):
        l, m = (x[torch.arange(23) % 7].double().requires_grad_() for x in (kinds_l, kinds_m))
        loss = items(estimator, pair_scores(l, m.unsqueeze(-1), torch.ones(()), None, F64), "official").mean()
        by_l, by_m = torch.autograd.grad(loss, (l, m))
        _assert_as_counted(estimator, 23, kinds_l, kinds_m, loss.detach(), rows, by_l[rows], by_m[rows])
