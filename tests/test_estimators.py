"""The rows of the registry: derivatives are autograd's, a term refuses what C++ reads otherwise, a new row works."""

import math

import oracle
import pytest
import torch
from oracle import BF16, F64, Case, assert_within_budget, ours

from dimkern import estimators, functional, reference
from dimkern.estimators import REGISTRY, Estimator, Term, item_losses, mean_loss_weights

SCORES = torch.cat([torch.linspace(-30, 30, 401, dtype=F64), torch.tensor([0.0, 1e-9, -1e-9], dtype=F64)])


def _derivative(term, s, *rest):
    s = s.clone().requires_grad_()
    (d,) = torch.autograd.grad(term(s, *rest).sum(), s, allow_unused=True, materialize_grads=True)
    return d


@pytest.mark.parametrize("name", REGISTRY)
def test_derivatives_equal_autograd(name):
    row = REGISTRY[name]
    torch.testing.assert_close(row.df(SCORES), _derivative(row.f, SCORES), rtol=1e-12, atol=1e-15)
    ref = torch.full_like(SCORES, 1.7)
    torch.testing.assert_close(row.phi(SCORES, ref), _derivative(row.psi, SCORES, ref), rtol=1e-12, atol=1e-15)
    assert row.shares_map == torch.equal(row.psi(SCORES, ref), row.phi(SCORES, ref))


@pytest.mark.parametrize("name", REGISTRY)
def test_bounded_weights_are_between_0_and_1(name):
    """Of scores of any size; a log-sum-exp row's are relative to a reference that no score is above."""
    row, s = REGISTRY[name], torch.linspace(-1e3, 1e3, 401, dtype=F64)
    weights = torch.stack([row.df(s), row.phi(s, s.max())])
    assert row.bounded == bool(((weights >= 0) & (weights <= 1)).all())


@pytest.mark.parametrize("name", REGISTRY)
def test_terms_write_where_they_are_told(name):
    """With `out` a term gives the same numbers there, in a tile's own place where it says that it can."""
    row = REGISTRY[name]
    s, ref = SCORES[:400].view(20, 20), torch.arange(20, dtype=F64).view(20, 1)
    for term in (row.f, row.df, row.psi, row.phi):
        expected, before = term(s, ref), s.clone()
        buffer = torch.full_like(s, math.nan)
        assert term(s, ref, out=buffer).data_ptr() == buffer.data_ptr()
        torch.testing.assert_close(buffer, expected, rtol=0, atol=0)
        torch.testing.assert_close(s, before, rtol=0, atol=0)
        if term.in_place:
            torch.testing.assert_close(term(before, ref, out=before), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", REGISTRY)
def test_softplus_is_exact_in_the_tails(name):
    """No threshold shows: f and psi keep float64's resolution where softplus meets its asymptotes."""
    s = torch.tensor([15.0, 19.9, 20.1, 25.0, 36.0, 39.9, 40.1], dtype=F64)
    row, ref = REGISTRY[name], torch.zeros(7, dtype=F64)
    if name in oracle.DIVERGENCES:
        for term, formula in zip((row.f, row.psi), oracle.DIVERGENCES[name], strict=True):
            torch.testing.assert_close(term(s, ref), formula(s), rtol=1e-15, atol=0)
            torch.testing.assert_close(term(-s, ref), formula(-s), rtol=1e-15, atol=1e-18)


@pytest.mark.parametrize("name", REGISTRY)
def test_mean_loss_weights_equal_autograd_of_the_mean(name):
    row = REGISTRY[name]
    positives = (3 * torch.randn(5, 2, 4, dtype=F64)).requires_grad_()
    negatives = (3 * torch.randn(5, 2, dtype=F64)).requires_grad_()
    expected = torch.autograd.grad(item_losses(row, positives, negatives).mean(), (positives, negatives))
    got = mean_loss_weights(row, positives.detach(), negatives.detach(), 10)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "text",
    [
        "0.5 * s",  # a double in C++
        "s + 1",
        "s / half",
        "s ** half",
        "half if s else one",
        "s > one",
        "sqrt(s)",
        "exp(s, s)",
        "exp(x=s)",
        "torch.exp(s)",
        "three * s",
        "__import__",
        "~s",
        "not s",
        "(s + one) * (s - one)",  # two compound sides
        "exp(s) + exp(s)",
        "[s]",
        "half - one",  # no tensor
        "exp(one)",
        "-one",
    ],
)
def test_illegal_terms_are_refused(text):
    """At once, with the text: not at the first loss, and not by torch."""
    with pytest.raises(ValueError, match="estimator term") as raised:
        Term(text)
    assert text in str(raised.value)


def test_a_term_must_parse():
    with pytest.raises((SyntaxError, ValueError)):
        Term("exp(s")


NEW_ROWS = {
    # psi reads s twice, so it cannot be evaluated in place
    "squash": ("-exp(-s)", "exp(-s)", "s * softplus(s)", "s + sigmoid(s)"),
    # the same, and psi and phi share one map
    "swish": ("s", "one", "s * exp(s)", "s * exp(s)"),
}


class Antiderivative(torch.autograd.Function):
    """psi whose derivative is phi, for rows whose phi need not be its derivative: the weights are phi."""

    @staticmethod
    def forward(ctx, s, psi, phi):
        ctx.save_for_backward(phi(s))
        return psi(s)

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None, None


FORMULAS = {  # f, psi, phi
    "squash": (lambda s: -(-s).exp(), lambda s: s * oracle.sp(s), lambda s: s + s.sigmoid()),
    "swish": (lambda s: s, lambda s: s * s.exp(), lambda s: s * s.exp()),
}


@pytest.mark.parametrize("name", NEW_ROWS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("clip", [None, 2.0])
def test_a_new_row_works_end_to_end(name, reduction, clip, monkeypatch):
    """One row is all it takes: streaming computes psi's mean and phi's weights, blocks and dtypes included."""
    row = Estimator(name, "pointwise", *NEW_ROWS[name], "score", "a test")
    f, psi, phi = FORMULAS[name]
    monkeypatch.setitem(estimators.REGISTRY, name, row)
    monkeypatch.setitem(oracle.DIVERGENCES, name, (f, lambda s: Antiderivative.apply(s, psi, phi)))
    for changes in ({}, {"budget": 0.0}, {"l_dtype": BF16}, {"l_dtype": F64, "budget": 0.4}):
        case = Case(**{"N": 7, "P": 2, "clip": clip, "reduction": reduction, **changes})
        assert_within_budget(name, case, ours(name, case))


def test_a_new_row_agrees_with_the_reference_backend(monkeypatch):
    """The naive backend reads the same row: statistics and gradients are equal."""
    row = Estimator("sq", "pointwise", "s", "one", "half * s * s", "s", "score", "test")
    monkeypatch.setitem(estimators.REGISTRY, "sq", row)
    l, m, scale = Case(N=7, P=2, l_dtype=F64, m_dtype=F64).tensors()
    c, g = l.mT, m.mT
    streamed = functional.ops.scores(c, g, scale, "sq", 0.0, None)
    naive = reference.scores(c, g, scale, None, "sq", 0.0, None)
    upstream = [torch.randn_like(x) for x in naive]
    for ours_, theirs in zip(
        (*streamed[:2], *torch.autograd.grad(streamed[:2], (l, m, scale), upstream)),
        (*naive, *torch.autograd.grad(naive, (l, m, scale), upstream)),
        strict=True,
    ):
        torch.testing.assert_close(ours_, theirs, rtol=1e-12, atol=1e-13)
