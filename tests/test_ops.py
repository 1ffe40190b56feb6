"""The ops under PyTorch's machinery: opcheck, compile, autocast, repeated and threaded backward, modules, config."""

import concurrent.futures
import contextlib
import contextvars
import functools
import io
import shutil
import threading
from typing import ClassVar

import pytest
import torch
from oracle import (
    BACKENDS,
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    Case,
    assert_within_budget,
    least_budget,
    loss_of,
    ours,
    reductions,
    varied,
    watch_plans,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import dimkern
from dimkern import ops
from dimkern.config import memory_budget
from dimkern.estimators import REGISTRY
from dimkern.plan import format_bytes, make_plan

CPU = torch.device("cpu")
LOSSES = [(estimator, reduction) for estimator in REGISTRY for reduction in reductions(estimator)]
ONE_OF_EACH_FAMILY = list({row.family: name for name, row in REGISTRY.items()}.values())


def _arguments(dtype, requires_grad=True, m_dtype=None):
    """c (N, L, K), g (N, P, K), scale as the ops take them."""
    c = torch.randn(4, 3, 5, dtype=F64).to(dtype).requires_grad_(requires_grad)
    g = torch.randn(4, 2, 5, dtype=F64).to(m_dtype or dtype).requires_grad_(requires_grad)
    scale = torch.tensor(0.6, dtype=F64 if dtype == F64 else F32, requires_grad=requires_grad)
    return c, g, scale


OPCHECK = {
    "mean_loss": lambda c, g, scale, name, grad: (c, g, scale, name, 1e-4, 3.0, grad, grad),
    "scores": lambda c, g, scale, name, grad: (c, g, scale, name, 1e-4, None),
    "scores_backward": lambda c, g, scale, name, grad: (
        *(x.detach() for x in (c, g, scale)),
        *(x.detach() for x in ops.scores(c, g, scale, name, 1e-4, None)[1:2]),
        torch.randn(4, 2, 3, dtype=scale.dtype),
        torch.randn(4, 2, dtype=scale.dtype),
        torch.tensor(10**7),
        name,
        None,
        True,
        grad,
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("op", OPCHECK)
@pytest.mark.parametrize("estimator", ONE_OF_EACH_FAMILY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(op, estimator, grad, dtype, backend):
    arguments = OPCHECK[op](*_arguments(dtype, grad), estimator, grad)
    torch.library.opcheck(getattr(torch.ops.dimkern, op).default, (*arguments, backend))


def test_opcheck_mixed_dtypes_and_strides():
    c, g, scale = _arguments(BF16, m_dtype=F64)
    c = c.detach().mT.contiguous().mT.requires_grad_()
    for backend in BACKENDS:
        torch.library.opcheck(ops.scores, (c, g, scale, "infonce", 0.0, None, backend))


@pytest.mark.parametrize(
    ("estimator", "reduction", "dynamic"),
    [*((*loss, True) for loss in LOSSES), *((name, reductions(name)[-1], None) for name in ONE_OF_EACH_FAMILY)],
)
def test_compile(estimator, reduction, dynamic):
    """One graph, forward and backward, sizes dynamic or not, whose numbers are eager's."""
    torch._dynamo.reset()

    def run(l, m, scale):
        return loss_of(estimator, l, m, scale=scale.exp(), clip=3.0, reduction=reduction, return_parts=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for N, L in ((4, 6), (7, 4)):
        leaves = Case(N=N, L=L, P=2, l_dtype=F64, m_dtype=F64).tensors()
        expected = run(*leaves)
        upstream = torch.randn_like(expected.loss)
        gradients = torch.autograd.grad(expected.loss, leaves, upstream)
        got = compiled(*leaves)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(torch.autograd.grad(got.loss, leaves, upstream), gradients, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_compile_with_inductor():
    torch._dynamo.reset()
    leaves = Case(P=2, l_dtype=BF16).tensors()

    def run(l, m, scale):
        none = dimkern.infonce_loss(2 * l, m, scale=scale, reduction="none")
        return none.square().mean() + dimkern.fenchel_dual_loss(l, m.tanh(), scale=scale)

    expected = run(*leaves)
    # the compiler's cache knows an op by its name: it would serve what was compiled for another version of ours
    with torch.compiler.config.patch(force_disable_caches=True):
        got = torch.compile(run, fullgraph=True)(*leaves)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for ours_, theirs in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4 if ours_.dtype == F32 else 0.02, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ONE_OF_EACH_FAMILY)
def test_bfloat16_gradients_are_made_in_bfloat16(estimator, backend):
    """In one block or several; the upstream factor, batched or not, is multiplied in float32, then rounded once."""
    case = Case(N=9, P=2, l_dtype=BF16, m_dtype=BF16)
    for budget in (0.0, 1.0):
        l, m, _ = varied(case, budget=budget).tensors()
        with dimkern.config(memory_budget=varied(case, budget=budget).budget_bytes(estimator, backend)):
            loss = loss_of(estimator, l, m, backend=backend)
        by_c, by_h = loss.grad_fn.saved_tensors[-2:]
        assert (by_c.dtype, by_h.dtype) == (BF16, F32)
        factors = torch.tensor([1.0, 1 / 3, -1.001e-30])
        once = torch.autograd.grad(loss, l, retain_graph=True)[0]
        for factor in factors:
            (got,) = torch.autograd.grad(loss, l, factor, retain_graph=True)
            assert torch.equal(got, (once.float() * factor).to(BF16))
        (batched,) = torch.autograd.grad(loss, l, factors, is_grads_batched=True)
        assert torch.equal(batched, (once.float() * factors.view(-1, 1, 1, 1)).to(BF16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
def test_autocast_rounds_nothing(estimator, reduction, backend):
    """Under autocast the scores are not rounded, nor in a backward within it: equal to the last bit."""
    for dtype in (F32, BF16, F16, F64):
        case = Case(P=2, l_dtype=dtype, m_dtype=dtype, reduction=reduction)
        outside = ours(estimator, case, backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = ours(estimator, case, backend)
            l, m, scale = case.tensors()
            reference = loss_of(estimator, l, m, scale=scale, reduction=reduction, backend="reference")
        torch.testing.assert_close(reference.detach(), outside.loss, rtol=1e-5, atol=1e-5)
        assert_within_budget(estimator, case, inside)
        torch.testing.assert_close((inside.loss, inside.grads), (outside.loss, outside.grads), rtol=0, atol=0)


@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
def test_a_second_derivative_is_refused(estimator, reduction):
    """Whichever first gradient is differentiated again, by whichever input: an error, never a wrong number."""
    for first in range(3):
        for second in range(3):
            leaves = Case(N=3, P=2).tensors()
            loss = loss_of(estimator, *leaves[:2], scale=leaves[2], reduction=reduction).square().sum()
            (gradient,) = torch.autograd.grad(loss, leaves[first], create_graph=True)
            with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*backend='reference'"):
                torch.autograd.grad(gradient.square().sum(), leaves[second])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_derivative_by_the_upstream_factor_is_refused(dtype):
    """It is never left out of a sum: the factor's other path to the loss would hide that."""
    l, m, _ = Case(N=3, l_dtype=dtype, m_dtype=dtype).tensors()
    factor = torch.tensor(2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss_of("jsd", l, m) * factor, l, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(gradient.float().square().sum() + factor**2, factor)


def test_the_reference_backend_has_second_derivatives():
    leaves = Case(N=3, L=2, K=3, l_dtype=F64, m_dtype=F64).tensors()
    for estimator in REGISTRY:
        assert torch.autograd.gradgradcheck(
            lambda l, m, s, e=estimator: loss_of(e, l, m, scale=s, backend="reference"), leaves
        )


@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
def test_backward_twice(estimator, reduction):
    """A retained graph gives the same gradients again, and accumulates them."""
    leaves = Case(P=2).tensors()
    loss = loss_of(estimator, *leaves[:2], scale=leaves[2], reduction=reduction)
    upstream = torch.randn_like(loss)
    once = [x.clone() for x in torch.autograd.grad(loss, leaves, upstream, retain_graph=True)]
    twice = torch.autograd.grad(loss, leaves, 2 * upstream, retain_graph=True)
    torch.testing.assert_close([2 * x for x in once], list(twice), rtol=1e-6, atol=0)
    for _ in range(3):
        loss.backward(upstream, retain_graph=True)
    torch.testing.assert_close([x.grad for x in leaves], [3 * x for x in once], rtol=1e-6, atol=1e-9)


def test_a_leaf_used_twice():
    """The same tensor as l and m, and two losses of one input, add up."""
    x = torch.randn(5, 4, 1, dtype=F64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: dimkern.infonce_loss(x, x) * dimkern.fenchel_dual_loss(x, x[..., 0]), x)
    torch.autograd.gradcheck(lambda x: dimkern.infonce_loss(x, x, reduction="none"), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ONE_OF_EACH_FAMILY)
def test_backward_on_another_thread_keeps_the_forwards_budget(estimator, backend, monkeypatch):
    reduction = reductions(estimator)[-1]
    case = Case(N=9, P=2, reduction=reduction)
    expected = ours(estimator, case, backend)
    plans = watch_plans(monkeypatch)
    budget = least_budget(case.problem(estimator), backend) + 100
    leaves = case.tensors()
    with dimkern.config(memory_budget=budget):
        loss = loss_of(estimator, *leaves[:2], scale=leaves[2], reduction=reduction, backend=backend)
    upstream = torch.randn_like(loss)
    thread = threading.Thread(target=loss.backward, args=(upstream,))
    thread.start()
    thread.join()
    assert {plan.budget for plan in plans} == {budget}
    assert len(plans) == (1 if reduction == "mean" else 2)
    with dimkern.config(memory_budget="1GB"):
        again = case.tensors()
        torch.autograd.backward(loss_of(estimator, *again[:2], scale=again[2], reduction=reduction), upstream)
    torch.testing.assert_close([x.grad for x in leaves], [x.grad for x in again], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.detach(), expected.loss, rtol=1e-5, atol=1e-6)


def test_many_threads_at_once():
    """Losses share no scratch: threads with different budgets give what one thread gives."""
    cases = [Case(N=9, P=2, seed=seed, budget=0.3 * (seed % 4)) for seed in range(24)]
    runs = [(estimator, case, backend) for case in cases for estimator in ONE_OF_EACH_FAMILY for backend in BACKENDS]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda run: ours(*run), runs))
    for run, one in zip(runs, got, strict=True):
        alone = ours(*run)
        torch.testing.assert_close((one.loss, one.grads), (alone.loss, alone.grads), rtol=1e-6, atol=1e-7)


MODULES = {
    "infonce": dimkern.InfoNCELoss,
    "dv": dimkern.DonskerVaradhanLoss,
    **{
        name: lambda name=name, **keywords: dimkern.FenchelDualLoss(name.upper(), **keywords)
        for name, row in REGISTRY.items()
        if row.family == "pointwise"
    },
}


@pytest.mark.parametrize("estimator", REGISTRY)
def test_modules(estimator):
    """A module computes its function; a Parameter scale is trained, saved and restored."""
    l, m, _ = Case(P=2).tensors()
    scale = nn.Parameter(torch.tensor(0.4))
    module = MODULES[estimator](scale=scale, clip=2.0)
    torch.testing.assert_close(module(l, m), loss_of(estimator, l, m, scale=scale, clip=2.0), rtol=0, atol=0)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    before = module(l, m)
    before.backward()
    (expected,) = torch.autograd.grad(loss_of(estimator, l, m, scale=scale, clip=2.0, backend="reference"), scale)
    torch.testing.assert_close(scale.grad, expected, rtol=1e-5, atol=1e-6)
    optimiser.step()
    assert module(l, m) < before

    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    restored = MODULES[estimator](scale=nn.Parameter(torch.tensor(9.0)), clip=2.0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(restored(l, m), module(l, m), rtol=0, atol=0)


def test_modules_pass_on_every_keyword():
    l, m, _ = Case(P=2).tensors()
    buffer = dimkern.InfoNCELoss(scale=torch.tensor(0.4), self_mask="exclude", reduction="none", return_parts=True)
    assert dict(buffer.named_buffers()).keys() == {"scale"}
    expected = dimkern.infonce_loss(l, m, scale=0.4, self_mask="exclude", reduction="none", return_parts=True)
    torch.testing.assert_close(buffer(l, m), expected)
    torch.testing.assert_close(buffer.double()(l, m), expected)
    for module in (dimkern.InfoNCELoss(), dimkern.FenchelDualLoss("KL"), dimkern.DonskerVaradhanLoss()):
        assert not module.state_dict()
        with pytest.raises(ValueError, match="backend is 'cuda'"):
            type(module)(backend="cuda")(l, m)


def test_the_budget_belongs_to_its_context(monkeypatch):
    """Innermost wins, an exception restores, other threads do not see it; then the environment; then 256 MB."""
    monkeypatch.delenv("DIMKERN_MEMORY_BUDGET", raising=False)
    assert memory_budget(CPU) == 256 * 10**6
    elsewhere = contextvars.copy_context()
    with dimkern.config(memory_budget="1MiB"):
        with contextlib.suppress(KeyError), dimkern.config(memory_budget=5000):
            assert memory_budget(CPU) == 5000
            raise KeyError
        assert memory_budget(CPU) == 2**20
        assert elsewhere.run(memory_budget, CPU) == 256 * 10**6
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert pool.submit(memory_budget, CPU).result() == 256 * 10**6
        monkeypatch.setenv("DIMKERN_MEMORY_BUDGET", "2kB")
        assert memory_budget(CPU) == 2**20
    assert memory_budget(CPU) == 2000
    with pytest.raises(ValueError, match="memory_budget is 2 kB"):
        dimkern.infonce_loss(torch.ones(8, 40, 20), torch.ones(8, 40))


def test_explain():
    """The text tells what will run: backend, why no other, order, blocks, products and peak, as the plan has them."""
    case = Case(N=40, P=2, L=9, K=6)
    l, m, _ = case.tensors()
    for estimator, budget in (("infonce", "256MB"), ("infonce", "33kB"), ("JSD", "33kB"), ("dv", "256MB")):
        with dimkern.config(memory_budget=budget):
            text = dimkern.explain(l, m, loss=estimator, backend="streaming")
            plan = make_plan(case.problem(estimator.lower()), memory_budget(CPU))
        rows, cols = len(list(plan.row_blocks())), len(list(plan.col_blocks()))
        for word in (
            "backend: streaming",
            *(f"not {name}: " for name in ("triton", "cuda")),
            f"order: {plan.order}",
            f"{rows} of {plan.row_images * 2} rows x {cols} of {plan.col_images * 9} columns",
            f"{plan.gemms} matrix products",
            "gradients: l, m",
            "N=40",
            "K=6",
            f"pairs: {80 * 360:,}",
            f"gradients {format_bytes(plan.scratch)} of a budget of {format_bytes(plan.budget)}",
        ):
            assert word in text, f"{word!r} is not in\n{text}"
    assert "backend: reference" in dimkern.explain(l, m, backend="reference")
    assert "gradients: none" in dimkern.explain(l.detach(), m.detach())
    assert "copied block by block" in dimkern.explain(l, m, backend="streaming")
    assert "read in place" in dimkern.explain(l.mT.contiguous().mT, m, backend="streaming")


def test_doctor():
    text = dimkern.doctor()
    for word in (f"dimkern {dimkern.__version__}", f"torch {torch.__version__}", "256 MB", "streaming: available"):
        assert word in text
    for name in dimkern.BACKENDS:
        assert f"{name}: " in text


def test_forward_mode_is_refused_not_zero():
    l, m = torch.randn(3, 4, 5), torch.randn(3, 4)

    def forward_mode(l):
        return torch.func.jvp(lambda l: dimkern.fenchel_dual_loss(l, m), (l,), (torch.ones_like(l),))

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        forward_mode(l)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.compile(forward_mode, backend="aot_eager")(l)


def test_gradients_of_torch_func_are_refused():
    l, m = torch.randn(3, 4, 5), torch.randn(3, 4)
    for reduction in ("mean", "none"):

        def loss(l, reduction=reduction, **keywords):
            return dimkern.infonce_loss(l, m, reduction=reduction, **keywords).sum()

        for transformed, given in (
            (torch.func.grad(loss), l),
            (torch.func.vmap(torch.func.grad(loss)), l.expand(2, 3, 4, 5)),
            (torch.func.grad(lambda l: torch.func.vmap(loss)(l).sum()), l.expand(2, 3, 4, 5)),
        ):
            with pytest.raises(RuntimeError, match=r"cannot be differentiated by torch.func.*backend='reference'"):
                transformed(given)
        torch.func.grad(functools.partial(loss, backend="reference"))(l)
        # what the transform does not follow is served
        q, value = torch.tensor(0.7), loss(l)
        for followed in (lambda q: loss(l) * q, lambda q: loss((l * q).detach() / 0.7) * q):
            torch.testing.assert_close(torch.func.grad(followed)(q), value)
    torch.testing.assert_close(torch.func.vmap(loss)(l.expand(2, 3, 4, 5)), loss(l).expand(2))


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(str(operator))
        return operator(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    seen: ClassVar[set] = set()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.add(str(function))
        return super().__torch_function__(function, types, args, kwargs)


def test_whoever_watches_sees_the_op(monkeypatch):
    """Modes, profilers, tracers and subclasses meet dimkern::mean_loss; where nobody does, it is not called."""
    l, m, _ = Case(P=2).tensors()
    name = "dimkern.mean_loss.default"
    with _Seen() as seen:
        dimkern.infonce_loss(l, m)
    assert name in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        dimkern.infonce_loss(l, m)
    assert "dimkern::mean_loss" in {event.name for event in profiler.events()}
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        loss = dimkern.infonce_loss(fake.from_tensor(l), fake.from_tensor(m))
    assert isinstance(loss, FakeTensor)
    assert name in make_fx(lambda l, m: dimkern.infonce_loss(l, m))(l.detach(), m.detach()).code
    dimkern.infonce_loss(l.as_subclass(_Subclass), m)
    assert name in _Subclass.seen
    assert dimkern.infonce_loss(l.to("meta"), m.to("meta")).is_meta
    negated = torch._neg_view(-l.detach())  # its memory holds the opposite of its numbers
    torch.testing.assert_close(dimkern.infonce_loss(negated, m), dimkern.infonce_loss(l, m), rtol=0, atol=0)
    zero = torch._efficientzerotensor(m.shape, dtype=m.dtype)
    torch.testing.assert_close(dimkern.infonce_loss(l, zero), dimkern.infonce_loss(l, torch.zeros_like(m)))
    monkeypatch.setattr(ops, "_mean_loss_op", None)
    dimkern.infonce_loss(l, m).backward()


def test_the_op_and_what_it_does_agree(monkeypatch):
    """Whichever gradients are wanted, to the last bit."""
    for backend in BACKENDS:
        for needs in ("l", "m", "s", "lms"):
            case = Case(P=2, needs=needs)
            runs = []
            for watched in (False, True):
                monkeypatch.setattr(ops, "is_watched", lambda *_, watched=watched: watched)
                runs.append(ours("infonce", case, backend))
            torch.testing.assert_close((runs[0].loss, runs[0].grads), (runs[1].loss, runs[1].grads), rtol=0, atol=0)


def test_a_number_for_scale_is_made_outside_of_inference_mode():
    """It is kept, and a training step that comes after an evaluation saves it for its backward."""
    l, m, _ = Case(P=2).tensors()
    with torch.inference_mode():
        dimkern.infonce_loss(l, m, scale=0.8125)
    dimkern.infonce_loss(l, m, scale=0.8125).backward()
    assert l.grad is not None
    with torch.inference_mode(), torch.enable_grad():
        assert not dimkern.infonce_loss(l, m).requires_grad


def test_batched_upstream_gradients():
    l, m = (x.requires_grad_() for x in (torch.randn(3, 4, 5), torch.randn(3, 4)))
    upstream = torch.randn(6)
    batched = torch.autograd.grad(dimkern.infonce_loss(l, m), l, upstream, is_grads_batched=True)[0]
    single = torch.autograd.grad(dimkern.infonce_loss(l, m), l)[0]
    torch.testing.assert_close(batched, upstream.view(6, 1, 1, 1) * single)


def test_modules_refuse_when_they_are_made_and_say_what_they_are():
    for make in (
        lambda: dimkern.InfoNCELoss(clip=-1.0),
        lambda: dimkern.InfoNCELoss(self_mask="x"),
        lambda: dimkern.FenchelDualLoss("JSD", reduction="sum"),
        lambda: dimkern.FenchelDualLoss("ZZ"),
        lambda: dimkern.DonskerVaradhanLoss(reduction="none"),
        lambda: dimkern.InfoNCELoss(scale=nn.Parameter(torch.ones(())).exp()),
    ):
        with pytest.raises(ValueError, match=r"clip|self_mask|reduction|measure|scale"):
            make()
    assert "measure='KL'" in repr(dimkern.FenchelDualLoss("KL"))
    assert "scale=2.0" in repr(dimkern.InfoNCELoss(scale=2.0))


def test_explain_counts_every_product():
    """reduction="none": a forward of one, a backward of three; nothing where no gradient is wanted."""
    l, m = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3)
    assert "work: 2 matrix products" in dimkern.explain(l, m)
    assert "work: 3 matrix products" in dimkern.explain(l, m, reduction="none")
    assert "work: 3 matrix products" in dimkern.explain(l, m, scale=torch.ones((), requires_grad=True))
    with torch.no_grad():
        assert "work: 1 matrix products" in dimkern.explain(l, m)
