"""The float64 oracle: MATHS.md §2 written down a second time, on the naive pair tensor, with autograd.

Shares no formula with the package. Owns the problems that tests draw, how they are run, and the
error budget |ours - f64| <= |eager in the same dtype - f64| + small that they are held to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from hypothesis import strategies as st

import dimkern
from dimkern import ops, plan
from dimkern.native import WHY_NOT_LOADED
from dimkern.plan import Plan, Problem, describe, make_plan
from dimkern.validate import as_locals, as_summaries

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F64, F32, BF16, F16)
BACKENDS = ["streaming"] + (["cpu"] if WHY_NOT_LOADED is None else [])  # held to one error budget


def sp(z):
    return torch.logaddexp(z, torch.zeros_like(z))


DIVERGENCES = {  # f on positives, h on negatives; the loss is E_neg[h] - E_pos[f]
    "jsd": (lambda s: math.log(2) - sp(-s), lambda s: sp(s) - math.log(2)),
    "gan": (lambda s: -sp(-s), sp),
    "kl": (lambda s: s, lambda s: (s - 1).exp()),
    "rkl": (lambda s: -(-s).exp(), lambda s: s - 1),
    "h2": (lambda s: 1 - (-s).exp(), lambda s: s.exp() - 1),
    "x2": (lambda s: s, lambda s: s**2 / 4 + s),
    "w1": (lambda s: s, lambda s: s),
}


def split(s):
    """The pair tensor (N, P, N, L) as positives (N, P, L) and negatives (N, P, (N-1)·L)."""
    N = len(s)
    positives = torch.stack([s[i, :, i] for i in range(N)])
    return positives, torch.stack([torch.cat([s[i, :, :i], s[i, :, i + 1 :]], 1).flatten(1) for i in range(N)])


def items(estimator, s, self_mask):
    """Item losses whose mean is the loss: (N, L, P) for InfoNCE, (N, P) for divergences, () for DV."""
    positives, negatives = split(s)
    if estimator == "infonce":
        if self_mask == "official":
            negatives = torch.cat([negatives, torch.full_like(positives, -10.0)], -1)
        # -log softmax of the positive, whose weight is not 1 - a rounded probability
        return sp(negatives.logsumexp(-1, keepdim=True) - positives).transpose(1, 2)
    if estimator == "dv":
        return negatives.flatten().logsumexp(0) - math.log(negatives.numel()) - positives.mean()
    f, h = DIVERGENCES[estimator]
    return h(negatives).mean(-1) - f(positives).mean(-1)


def parts(estimator, s, self_mask):
    """(e_pos, e_neg, mi) of MATHS.md §2, detached."""
    s = s.detach()
    positives, negatives = split(s)
    loss = items(estimator, s, self_mask).mean()
    nan = torch.full_like(loss, math.nan)
    if estimator == "infonce":
        e_pos = positives.mean()
        return e_pos, loss + e_pos, math.log(1 + negatives.shape[-1]) - loss
    if estimator == "dv":
        return positives.mean(), negatives.flatten().logsumexp(0) - math.log(negatives.numel()), -loss
    f, h = DIVERGENCES[estimator]
    ratio = 1 + positives / 2
    mi = {
        "kl": -loss,
        "h2": 2 * positives.mean(),
        "x2": ratio.log().mean() if bool((ratio > 0).all()) else nan,
        "w1": nan,
    }.get(estimator, positives.mean())
    return f(positives).mean(), h(negatives).mean(), mi


def pair_scores(l, m, scale, clip, dtype):
    """The pair tensor (N, P, N, L): s = scale·<G, C>, softly clipped."""
    c, g = l.to(dtype).flatten(2), m.to(dtype).reshape(len(m), m.shape[1], -1)
    s = scale.to(dtype) * torch.einsum("ikp,jkl->ipjl", g, c)
    return s if clip is None else clip * (s / clip).tanh()


def _square(x):
    """(N, K, L) as (N, K, H, W)."""
    L = x.shape[2]
    H = max(h for h in range(1, math.isqrt(L) + 1) if L % h == 0)
    return x.unflatten(2, (H, L // H))


def _strided(x, shape, index):
    """x's values in a larger buffer's `index`, so that its strides are not a fresh tensor's."""
    view = x.new_full(shape, 7.0)[index]
    return view.copy_(x)


L_LAYOUTS = {
    "NKL": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "NKHW": _square,
    "channels_last": lambda x: _square(x).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "channel_slice": lambda x: _strided(x.mT, (len(x), x.shape[2], x.shape[1] + 3), np.s_[..., 2:-1]).mT,
    "width_slice": lambda x: (lambda y: _strided(y, (*y.shape[:3], 2 * y.shape[3] + 1), np.s_[..., 1::2]))(_square(x)),
    "image_slice": lambda x: _strided(x, (3 * len(x), *x.shape[1:]), np.s_[::3]),
    "expanded": lambda x: x[:, :, :1].expand_as(x),
}
M_LAYOUTS = {
    "NKP": lambda x: x,
    "NPK": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: _strided(x, (2 * len(x), x.shape[1] + 2, x.shape[2] + 1), np.s_[::2, 1:-1, 1:]),
    "expanded": lambda x: x[:, :, :1].expand_as(x),
    "NK": lambda x: x[..., 0],
    "NK11": lambda x: x.unsqueeze(-1),
}
ONE_SUMMARY = ("NK", "NK11")


@dataclass(frozen=True)
class Case:
    """One call of a loss, but for the estimator."""

    N: int = 5
    P: int = 1
    L: int = 6
    K: int = 7
    l_dtype: torch.dtype = F32
    m_dtype: torch.dtype = F32
    l_layout: str = "NKL"
    m_layout: str = "NKP"
    scale: float = 0.7
    clip: float | None = None
    self_mask: str = "official"
    reduction: str = "mean"
    budget: float = 1.0  # of the way from the least the plan accepts to a block of everything
    needs: str = "lms"  # which of l, m, scale need a gradient
    seed: int = 0

    @property
    def score_dtype(self):
        return F64 if F64 in (self.l_dtype, self.m_dtype) else F32

    def tensors(self):
        """Leaves l, m, scale in the case's layout and dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        l = torch.randn(self.N, self.K, self.L, dtype=F64, generator=generator).to(self.l_dtype)
        m = torch.randn(self.N, self.K, self.P, dtype=F64, generator=generator).to(self.m_dtype)
        scale = torch.tensor(self.scale, dtype=self.score_dtype)
        leaves = L_LAYOUTS[self.l_layout](l), M_LAYOUTS[self.m_layout](m), scale
        return [x.detach().requires_grad_(name in self.needs) for x, name in zip(leaves, "lms", strict=True)]

    def problem(self, estimator, weights_known=None) -> Problem:
        l, m, _ = self.tensors()
        known = self.reduction == "none" if weights_known is None else weights_known
        return describe(
            estimator, as_locals(l), as_summaries(m), clip=self.clip, grad_locals="l" in self.needs,
            grad_summaries="m" in self.needs or "s" in self.needs, weights_known=known,
        )  # fmt: skip

    def budget_bytes(self, estimator, backend="streaming") -> int:
        problem = self.problem(estimator)
        least = least_budget(problem, backend)
        roomy = make_plan.__wrapped__(problem, 1 << 40, backend).scratch
        return least + int(self.budget**3 * max(0, roomy - least))

    def plan(self, estimator, backend="streaming") -> Plan:
        return make_plan(self.problem(estimator), self.budget_bytes(estimator, backend), backend)


def least_budget(problem: Problem, backend="streaming") -> int:
    """The smallest budget that the plan accepts, found without knowing how it counts."""
    low, high = 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        try:
            make_plan.__wrapped__(problem, middle, backend)
            high = middle
        except ValueError:
            low = middle
    return high


def reductions(estimator):
    return {"infonce": ("mean", "sum", "none"), "dv": ("mean",)}.get(estimator, ("mean", "none"))


@st.composite
def problems(draw, reduction=None, **fixed):
    """Ragged problems; what is in `fixed` is not drawn."""
    P = draw(st.integers(1, 3))
    drawn = {
        "N": draw(st.integers(2, 7)),
        "P": P,
        "L": draw(st.integers(1, 9)),
        "K": draw(st.integers(1, 11)),
        "l_dtype": draw(st.sampled_from(DTYPES)),
        "m_dtype": draw(st.sampled_from(DTYPES)),
        "l_layout": draw(st.sampled_from(list(L_LAYOUTS))),
        "m_layout": draw(st.sampled_from([x for x in M_LAYOUTS if P == 1 or x not in ONE_SUMMARY])),
        "scale": draw(st.sampled_from([1.0, 0.0, -0.6, 0.25, 1.7])),
        "clip": draw(st.sampled_from([None, 0.8, 5.0])),
        "self_mask": draw(st.sampled_from(["official", "exclude"])),
        "budget": draw(st.sampled_from([0.0, 0.2, 0.4, 0.6, 1.0])),
        "needs": draw(st.sampled_from(["lms", "lms", "l", "m", "s", "lm", "ls"])),
        "seed": draw(st.integers(0, 10**6)),
    }
    return Case(**{**drawn, **fixed})


@dataclass
class Run:
    loss: torch.Tensor
    grads: dict[str, torch.Tensor]
    rounding: float = 0.0  # relative, of the weights and scaled summaries that the gradient products read
    scores_rounding: float | None = None  # of scores and sums; None: the score dtype's


def loss_of(estimator, l, m, self_mask="official", **keywords):
    """The public function that computes an estimator."""
    if estimator == "infonce":
        return dimkern.infonce_loss(l, m, self_mask=self_mask, **keywords)
    return dimkern.fenchel_dual_loss(l, m, estimator.upper(), **keywords)


def upstream_of(case, shape):
    """A random upstream gradient, never ones: a dropped factor would pass."""
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(case.seed + 1)) + 0.3


def _differentiate(case, loss, leaves):
    upstream = upstream_of(case, loss.shape)
    needed = [x for x, name in zip(leaves, "lms", strict=True) if name in case.needs]
    grads = torch.autograd.grad(loss, needed, upstream.to(loss.dtype))
    return Run(loss.detach(), dict(zip([n for n in "lms" if n in case.needs], grads, strict=True)))


def ours(estimator, case, backend="streaming"):
    l, m, scale = case.tensors()
    with dimkern.config(memory_budget=case.budget_bytes(estimator, backend if backend in BACKENDS else "streaming")):
        loss = loss_of(
            estimator, l, m, case.self_mask, scale=scale, clip=case.clip, reduction=case.reduction, backend=backend
        )
        run = _differentiate(case, loss, (l, m, scale))
    run.rounding = bf16_rounding(estimator, case, backend)
    return run


def bf16_rounding(estimator, case, backend):
    """Of the weights and the scaled summaries, half a unit of the last place each, where bfloat16 is multiplied."""
    return 2 * 2.0**-8 if backend == "cpu" and case.problem(estimator).bf16_products else 0.0


def naive(estimator, case, dtype=F64):
    """The pair tensor in `dtype`, gradients by leaves in that dtype."""
    leaves = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in case.tensors()]
    loss = _reduce(items(estimator, pair_scores(*leaves, case.clip, dtype), case.self_mask), case)
    return _differentiate(case, loss, leaves)


def _reduce(losses, case):
    return {"mean": losses.mean, "sum": losses.sum, "none": lambda: losses}[case.reduction]()


def slack(estimator, case, rounding=0.0, scores_rounding=None):
    """What rounding of scores and sums, and of weights, may cost to first order: of the loss, and of each gradient."""
    l, m, scale = (x.detach().double() for x in case.tensors())
    s = pair_scores(l, m, scale, case.clip, F64).requires_grad_()
    losses = _reduce(items(estimator, s, case.self_mask), case)
    (w,) = torch.autograd.grad(losses, s, upstream_of(case, losses.shape))
    w = w.abs() + w.abs().mean()
    c, g = l.flatten(2).abs(), m.reshape(len(m), m.shape[1], -1).abs()
    largest = (scale.abs() * torch.einsum("ikp,jkl->ipjl", g, c)).max()
    unit = (scores_rounding or torch.finfo(case.score_dtype).eps) * (8 + 4 * float(largest))

    positives, negatives = split(s.detach())
    if estimator in DIVERGENCES:
        f, h = DIVERGENCES[estimator]
        positives, negatives = f(positives), h(negatives)
    terms = 1 + positives.abs().max() + negatives.abs().mean(-1).max()
    # a log-sum-exp is rounded as what it is, the logarithm of the count where all scores are small
    logarithm = 0.0 if estimator in DIVERGENCES else 8 * torch.finfo(case.score_dtype).eps * math.log(positives.numel())
    count = positives.numel() if case.reduction == "sum" else 1
    by_g = torch.einsum("ipjl,jkl->ikp", w, c)
    grads = {
        "l": (scale.abs() * torch.einsum("ipjl,ikp->jkl", w, g)).view_as(l),
        "m": (scale.abs() * by_g).reshape(m.shape),
        "s": (by_g * g).sum(),
    }
    return float((unit * terms + logarithm) * count), {name: (unit + rounding) * x for name, x in grads.items()}


def assert_within_budget(estimator, case, got: Run):
    """|ours - f64| <= |eager in the same dtype - f64| + what rounding may cost, everywhere."""
    oracle, eager = naive(estimator, case), naive(estimator, case, case.score_dtype)
    of_loss, of_grads = slack(estimator, case, got.rounding, got.scores_rounding)
    assert got.loss.dtype == case.score_dtype
    _assert_close("loss", got.loss, eager.loss, oracle.loss, of_loss)
    for name, x in zip("lms", case.tensors(), strict=True):
        if name in case.needs:
            assert got.grads[name].dtype == x.dtype
            # half a unit for the cast at the end; bfloat16's has another where it is rounded before the upstream factor
            rounding = torch.finfo(x.dtype)
            small = of_grads[name] + rounding.eps * oracle.grads[name].abs() + rounding.smallest_normal * rounding.eps
            _assert_close(f"gradient by {name}", got.grads[name], eager.grads[name], oracle.grads[name], small)


def _assert_close(what, got, eager, oracle, small):
    assert got.shape == oracle.shape, f"{what}: {tuple(got.shape)} where the oracle has {tuple(oracle.shape)}"
    # a gradient beyond the largest number of its dtype is that dtype's infinity
    oracle = oracle.to(got.dtype).double().where(oracle.abs() >= torch.finfo(got.dtype).max, oracle)
    error, allowed = (got.double() - oracle).abs(), (eager.double() - oracle).abs() + small
    error[got.isinf() & (got == oracle)] = 0.0
    if not bool((error <= allowed).all()):
        worst = float((error / allowed).max())
        raise AssertionError(f"{what}: {worst:.3g} times the error budget\nours {got}\nfloat64 {oracle}")


def varied(case: Case, **changes) -> Case:
    return dataclasses.replace(case, **changes)


def watch_plans(monkeypatch, change=lambda plan: plan) -> list[Plan]:
    """The plans that the ops run from now on, in order; `change` may replace what was chosen."""
    name = "plan_for" if hasattr(ops, "plan_for") else "make_plan"
    ran, choose = [], getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *arguments: ran.append(change(choose(*arguments))) or ran[-1])
    return ran


@contextlib.contextmanager
def gradients_of_a_gpu():
    """Kernels for GPUs are given CPU tensors, on which gradients of bfloat16 features would be rounded early."""
    with contextlib.ExitStack() as stack:
        for module in (ops, plan):
            unrounded = lambda device, *dtypes: plan.score_dtype_of(*dtypes)  # noqa: E731
            stack.enter_context(mock.patch.object(module, "locals_gradient_dtype", unrounded))
        yield
