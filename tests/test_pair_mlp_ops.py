"""The pair MLP under PyTorch's machinery and at the edges: blocks, opcheck, compile, memory, extremes, errors."""

import dataclasses
import itertools
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from oracle import BF16, F16, F32, F64, loss_of, reductions
from test_memory import SMALL, peak_of
from test_pair_mlp import (
    BACKENDS,
    LOSSES,
    ONE_OF_EACH_FAMILY,
    MLPCase,
    assert_within_budget,
    gradients_of,
    ours,
    pair_layers,
)
from torch import nn

import dimkern
from dimkern import PairMLPCritic, pair_ops
from dimkern.critics import PairMLP
from dimkern.estimators import REGISTRY
from dimkern.plan import make_plan

FORCED = {  # images in a block of rows and of columns, of 7
    "one block": (7, 7),
    "row blocks": (2, 7),
    "column blocks": (7, 3),
    "both, rows coarser": (4, 1),
    "both, columns coarser": (1, 5),
}


@pytest.fixture
def plans(monkeypatch):
    """The plans that ran, in order; `change` replaces what was chosen."""
    ran, choose = [], pair_ops.plan_for
    ran_with = {"change": lambda plan: plan}
    monkeypatch.setattr(pair_ops, "plan_for", lambda *a: ran.append(ran_with["change"](choose(*a))) or ran[-1])
    ran_with["ran"] = ran
    return ran_with


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("blocks", FORCED)
@pytest.mark.parametrize("order", ["columns outside", "rows outside"])
@pytest.mark.parametrize("estimator", REGISTRY)
def test_blocks_and_orders(estimator, order, blocks, backend, plans):
    """Any blocks in either loop order give the same loss and gradients."""
    if order == "rows outside" and REGISTRY[estimator].family == "pointwise":
        return  # whose weights never wait
    wanted = dict(zip(("row_images", "col_images"), FORCED[blocks], strict=True), order=order)
    plans["change"] = lambda plan: dataclasses.replace(plan, **wanted)
    for changes in ({}, {"clip": 1.0, "self_mask": "exclude"}, {"reduction": reductions(estimator)[-1]}):
        case = MLPCase(**{"N": 7, "L": 3, "H": 8, **changes})
        assert_within_budget(estimator, case, ours(estimator, case, backend))
    assert {(plan.order, plan.row_images, plan.col_images) for plan in plans["ran"]} == {(order, *FORCED[blocks])}


def _layers(dtype=F32, requires_grad=True, N=4):
    torch.manual_seed(0)
    shapes = (N, 3, 5), (N, 2, 5), (5, 5), (5,), (5,), ()
    return [torch.randn(shape, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


OPCHECK = {
    "mean_loss": lambda layers, name, grad: (*layers, name, 1e-4, 2.0, grad, grad, grad),
    "scores": lambda layers, name, grad: (*layers, name, 1e-4, None),
    "scores_backward": lambda layers, name, grad: (
        *(x.detach() for x in layers), pair_ops.scores(*layers, name, 1e-4, None)[1].detach(),
        torch.randn(4, 2, 3, dtype=layers[0].dtype), torch.randn(4, 2, dtype=layers[0].dtype), torch.tensor(10**7),
        name, None, True, grad, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("op", OPCHECK)
@pytest.mark.parametrize("estimator", ONE_OF_EACH_FAMILY)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_opcheck(op, estimator, grad, dtype, backend):
    arguments = OPCHECK[op](_layers(dtype, grad), estimator, grad)
    torch.library.opcheck(getattr(torch.ops.dimkern, f"pair_mlp_{op}").default, (*arguments, backend))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "reduction"),
    [("infonce", "sum"), ("infonce", "none"), ("dv", "mean"), ("jsd", "mean"), ("kl", "none")],
)
def test_compile(estimator, reduction):
    """One graph, forward and backward, sizes dynamic, whose numbers are eager's."""
    torch._dynamo.reset()
    critic = PairMLPCritic(4, 6, 8)

    def run(l, m, scale):
        keywords = {"scale": scale, "clip": 3.0, "reduction": reduction, "return_parts": True, "critic": critic}
        return loss_of(estimator, l, m, **keywords)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for N, L in ((4, 6), (7, 4)):
        leaves = list(MLPCase(N=N, L=L).leaves().values())[:3]
        needed = [*leaves, *critic.parameters()]
        expected = run(*leaves)
        upstream = torch.randn_like(expected.loss)
        gradients = torch.autograd.grad(expected.loss, needed, upstream)
        got = compiled(*leaves)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(torch.autograd.grad(got.loss, needed, upstream), gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_rounds_nothing(reduction, backend):
    for dtype in (F32, BF16, F16, F64):
        case = MLPCase(dtype=dtype, reduction=reduction)
        outside = ours("infonce", case, backend)
        leaves = case.leaves()
        critic = case.critic(leaves)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # and the backward outside, as PyTorch would have it
            loss = dimkern.infonce_loss(
                leaves["l"], leaves["m"], scale=leaves["scale"], reduction=reduction, backend=backend, critic=critic
            )
        inputs = {name: leaves[name] for name in ("l", "m", "scale")}
        inside = gradients_of(case, loss, {**inputs, **dict(critic.named_parameters())})
        torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@pytest.mark.parametrize("estimator", REGISTRY)
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_the_products_that_are_needed(estimator, needs, plans):
    """One product over all pairs for the loss, one for the weights, one for either input; the numbers stay the same."""
    leaves = MLPCase().leaves()
    critic = MLPCase().critic(leaves).requires_grad_(needs[2])
    l, m = (leaves[name].detach().requires_grad_(need) for name, need in zip("lm", needs[:2], strict=True))
    loss = loss_of(estimator, l, m, critic=critic)
    assert [plan.gemms for plan in plans["ran"]] == [1 + any(needs) + needs[2]]
    assert loss.requires_grad == any(needs)
    wanted = [x for x in (l, m, *critic.parameters()) if x.requires_grad]
    naive = loss_of(estimator, l, m, critic=critic, backend="reference")
    torch.testing.assert_close(loss, naive, rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(
        torch.autograd.grad(loss, wanted) if wanted else (), torch.autograd.grad(naive, wanted) if wanted else (),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not loss_of(estimator, l, m, critic=critic).requires_grad
    assert plans["ran"][-1].gemms == 1


@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
def test_backward_twice_on_another_thread(estimator, reduction):
    case = MLPCase(reduction=reduction)
    leaves = case.leaves()
    critic = case.critic(leaves)
    loss = loss_of(estimator, leaves["l"], leaves["m"], critic=critic, reduction=reduction)
    upstream = torch.randn_like(loss)
    wanted = [leaves["l"], leaves["m"], *critic.parameters()]
    once = [x.clone() for x in torch.autograd.grad(loss, wanted, upstream, retain_graph=True)]
    for _ in range(2):
        thread = threading.Thread(target=lambda: loss.backward(upstream, retain_graph=True))
        thread.start()
        thread.join()
    torch.testing.assert_close([x.grad for x in wanted], [2 * x for x in once], rtol=1e-5, atol=1e-7)


def test_second_derivatives_and_forward_mode_are_refused():
    critic, l, m = PairMLPCritic(3), torch.randn(3, 3, 2, requires_grad=True), torch.randn(3, 3)
    for reduction in ("mean", "none"):
        loss = dimkern.infonce_loss(l, m, critic=critic, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, l, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(gradient.sum(), l)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda l: dimkern.fenchel_dual_loss(l, m, critic=critic), (l,), (torch.ones_like(l),))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
@pytest.mark.parametrize(
    "fields", [{}, {"clip": 2.0, "critic_dtype": F64}, {"N": 20, "P": 1, "L": 40, "H": 24}], ids=str
)
def test_scratch_is_within_plan_and_budget(estimator, reduction, fields, backend, plans):
    case = MLPCase(**{"N": 24, "P": 2, "L": 7, "H": 32, "reduction": reduction, **fields})
    leaves = case.leaves()
    one = torch.ones(())
    layers = case.critic(leaves).first_layer(leaves["l"].mT.detach(), leaves["m"].mT.detach(), one)
    layers = PairMLP(*(x.detach() for x in layers))
    problem = pair_ops.problem_of(layers, estimator, case.clip, (True, True, True), reduction == "none")
    roomy = make_plan(problem, 10**9, backend).scratch
    for budget in (roomy, roomy // 2, roomy // 4, roomy // 8):
        try:
            make_plan(problem, budget, backend)
        except ValueError:
            continue
        with dimkern.config(memory_budget=budget):
            if reduction != "none":
                fixed = estimator, 1e-4, case.clip, True, True, True, backend
                runs = [peak_of(lambda fixed=fixed: pair_ops.mean_loss(*layers, *fixed))]
            else:
                runs = [peak_of(lambda: pair_ops.scores(*layers, estimator, 1e-4, case.clip, backend))]
                positives, negatives, limit = runs[0][1]
                known = negatives, torch.randn_like(positives), torch.randn_like(negatives), limit, estimator, case.clip
                a = *layers, *known, True, True, True, backend
                runs.append(peak_of(lambda a=a: pair_ops._scores_backward(*a)))
        for plan, (peak, outputs) in zip(plans["ran"][-len(runs) :], runs, strict=True):
            scratch = peak - sum(x.nbytes for x in outputs)
            assert plan.scratch <= budget
            assert scratch <= plan.scratch + SMALL, f"{scratch} bytes where {plan} has {plan.scratch}"


IN_A_FRESH_PROCESS = """
import resource, sys, torch, dimkern
torch.set_num_threads(1)
def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
def step(N):
    critic = dimkern.PairMLPCritic(32, 16, 128)
    l, m = torch.randn(N, 32, 16, requires_grad=True), torch.randn(N, 16, requires_grad=True)
    before = resident()
    loss = dimkern.infonce_loss(l, m, critic=critic)
    loss.backward()
    assert all(bool(x.grad.isfinite().all()) for x in (l, m, *critic.parameters()))
    return resident() - before
with dimkern.config(memory_budget="32MB"):
    step(8)
    print(step(128))
"""


@pytest.mark.slow
def test_peak_memory_of_a_process():
    """N=128, L=16, H=128: each hidden layer of all pairs would take 134 MB, the whole step takes under 48."""
    root = Path(__file__).parents[1]
    run = [sys.executable, "-c", IN_A_FRESH_PROCESS]
    done = subprocess.run(run, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 48e6, f"{int(done.stdout) / 1e6:.0f} MB"


@pytest.mark.parametrize("estimator", ["infonce", "dv", "jsd", "gan", "w1", "x2"])
def test_scores_of_ten_thousand(estimator):
    for reduction in {"mean", reductions(estimator)[-1]}:
        for scale in (-3e4, 3e4):
            case = MLPCase(scale=scale, self_mask="exclude", reduction=reduction)
            leaves = case.leaves()
            scores = scale * case.critic(leaves)(leaves["l"], leaves["m"]).detach()
            assert float(scores.abs().max()) > 1e4
            assert_within_budget(estimator, case, ours(estimator, case))


@pytest.mark.parametrize("estimator", REGISTRY)
def test_what_is_no_number_shows(estimator):
    """NaN in one location is NaN in the loss; a unit that is off makes no NaN of an infinite weight."""
    critic = PairMLPCritic(3, hidden=4)
    l, m = torch.randn(5, 3, 2), torch.randn(5, 3)
    l[2, 1, 1] = torch.nan
    assert loss_of(estimator, l, m, critic=critic).isnan()
    with torch.no_grad():
        critic.inner.weight[0] = 0.0
        critic.inner.bias[0] = -1.0  # off for every pair
    l = torch.randn(5, 3, 2)
    loss_of("kl", l, m, critic=critic, scale=1e6).backward()
    assert bool((critic.inner.weight.grad[0] == 0).all())
    assert float(critic.inner.bias.grad[0]) == 0.0


def test_a_gradient_that_is_not_cleared_is_caught(monkeypatch):
    """The poisoned memory of conftest.py reaches the accumulated gradients."""
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: self)
    with pytest.raises(AssertionError, match="times the error budget"):
        assert_within_budget("jsd", MLPCase(), ours("jsd", MLPCase(), "streaming"))


def test_modules_train_their_critic():
    """A critic given to a loss module is among its parameters, in its state, and learns."""
    torch.manual_seed(0)
    critic = PairMLPCritic(4, 6, 16)
    loss = dimkern.FenchelDualLoss(critic=critic, scale=nn.Parameter(torch.tensor(1.0)))
    assert {name for name, _ in loss.named_parameters()} == {
        "scale",
        *(f"critic.{n}" for n, _ in critic.named_parameters()),
    }
    leaves = MLPCase(N=8).leaves()
    l, m = leaves["l"].detach(), leaves["m"].detach()
    optimiser = torch.optim.Adam(loss.parameters(), lr=1e-2)
    before = float(loss(l, m))
    for _ in range(40):
        optimiser.zero_grad()
        loss(l, m).backward()
        optimiser.step()
    assert float(loss(l, m)) < before - 0.3
    restored = dimkern.FenchelDualLoss(critic=PairMLPCritic(4, 6, 16), scale=nn.Parameter(torch.tensor(0.0)))
    restored.load_state_dict(loss.state_dict())
    torch.testing.assert_close(restored(l, m), loss(l, m), rtol=0, atol=0)
    assert "negatives='roll'" in repr(dimkern.InfoNCELoss(critic=critic, negatives="roll"))


def test_a_critic_scores_its_own_pairs():
    """Called with features it gives the positives' scores, one image being enough, as (N, L, P)."""
    case = MLPCase(dtype=F64, critic_dtype=F64)
    leaves = case.leaves()
    critic = case.critic(leaves)
    got = critic(leaves["l"], leaves["m"])
    s = pair_layers(leaves)[2]
    expected = torch.stack([s[i, :, i].mT for i in range(case.N)])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(critic(leaves["l"][:1], leaves["m"][:1]), expected[:1])
    maps = leaves["l"].unflatten(2, (1, 3)).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(critic(maps, leaves["m"]), expected)


def test_the_first_layer_is_drawn_as_one_over_both_inputs():
    torch.manual_seed(0)
    critic = PairMLPCritic(100, 300, 256)
    for parameter in (critic.local.weight, critic.summary.weight, critic.summary.bias):
        assert 0.97 * 400**-0.5 < float(parameter.detach().abs().max()) <= 400**-0.5


def test_explain():
    l, m = torch.randn(40, 6, 9, requires_grad=True), torch.randn(40, 4)
    critic = PairMLPCritic(6, 4, 32)
    text = dimkern.explain(l, m, critic=critic)
    for word in (
        "H=32", "3 matrix products", "gradients: l, m or scale, the critic", "no kernels for the pair MLP",
        "each hidden layer of all pairs would take 1.84 MB", f"{3 * 2 * 40 * 360 * 32 * 32 / 1e9:.3g} GFLOP",
    ):  # fmt: skip
        assert word in text, f"{word!r} is not in\n{text}"
    assert "backend: reference" in dimkern.explain(l, m, critic=critic, backend="reference")


ERRORS = {
    "no critic": ({"critic": nn.Linear(3, 3)}, TypeError, ["critic is a Linear", "PairMLPCritic"]),
    "channels of l": ({"critic": PairMLPCritic(5, 3)}, ValueError, ["l is (4, 3, 2) with 3 channels", "takes 5"]),
    "channels of m": ({"critic": PairMLPCritic(3, 7)}, ValueError, ["m is (4, 3) with 3 channels", "takes 7"]),
    "device": ({"critic": PairMLPCritic(3, device="meta")}, ValueError, ["critic is on meta", "cpu"]),
    "negatives": ({"negatives": "shuffle"}, ValueError, ["negatives is 'shuffle'", "'all'", "'permute'", "'roll'"]),
    "generator": ({"negatives": "permute", "generator": 3}, TypeError, ["generator is a int", "torch.Generator"]),
    "idle generator": ({"generator": torch.Generator()}, ValueError, ["generator is given", "'all'", "'permute'"]),
    "backend": ({"critic": PairMLPCritic(3), "backend": "cuda"}, ValueError, ["backend is 'cuda'", "pair MLP"]),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("loss", [dimkern.infonce_loss, dimkern.fenchel_dual_loss, dimkern.donsker_varadhan_loss])
def test_errors(loss, case):
    keywords, error, words = ERRORS[case]
    with pytest.raises(error) as raised:
        loss(torch.zeros(4, 3, 2), torch.zeros(4, 3), **keywords)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("keywords", [{"critic": PairMLPCritic(3)}, {"negatives": "permute"}, {"negatives": "roll"}])
def test_one_image_has_no_negatives(keywords):
    with pytest.raises(ValueError, match="at least two images"):
        dimkern.infonce_loss(torch.zeros(1, 3, 2), torch.zeros(1, 3), **keywords)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0,), ValueError, "local_channels is 0"),
        ((3, -1), ValueError, "summary_channels is -1"),
        ((3, 3, 2.5), TypeError, "hidden is a float"),
        ((True,), TypeError, "local_channels is a bool"),
    ],
)
def test_critics_that_cannot_be(arguments, error, words):
    with pytest.raises(error, match=words):
        PairMLPCritic(*arguments)
