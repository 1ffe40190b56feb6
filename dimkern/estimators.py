"""The maths of every estimator: one row each.

Owns the scalar functions, their derivatives and the formula each family closes a row with. Knows
nothing of tiles, devices or dtypes. To add an estimator, add a row: the backends, the generated C++
and Triton sources (`kernels/emit.py`) and the tests enumerate REGISTRY.

A row is text that Python, Triton and C++ all read as the same expression in

    s      the score of a pair
    ref    the reference of its row (log-sum-exp families only; any number gives the same loss)

and the names of FUNCTIONS and CONSTANTS. Literals are not allowed: `0.5` is a double in C++, and `1/2` is 0.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Family = Literal["pointwise", "row_lse", "global_lse"]

CONSTANTS = {"one": 1.0, "half": 0.5, "quarter": 0.25, "log2": math.log(2.0)}

# beyond 40 the correction e^-x of softplus is below float64's resolution; torch's default of 20 is not
_SOFTPLUS = {"beta": 1.0, "threshold": 40.0}
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "softplus": lambda x, out=None: torch._C._nn.softplus(x, **_SOFTPLUS, out=out),  # type: ignore[call-arg]
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
}
_OPERATORS: dict[type, Callable[..., Tensor]] = {ast.Add: torch.add, ast.Sub: torch.sub, ast.Mult: torch.mul}


class Term:
    """The function of s (and ref) that a row's text states, on tensors of any shape.

    Called plainly it is differentiable. With `out` every step writes there, so that a tile costs no
    allocation; `out` may be s itself where the text reads s once (`in_place`). For that, no operator
    of a term may have two compound sides.
    """

    def __init__(self, text: str) -> None:
        tree = ast.parse(text, mode="eval").body
        self.in_place = sum(isinstance(n, ast.Name) and n.id == "s" for n in ast.walk(tree)) <= 1
        self._step = _compile(tree, text)

    def __call__(self, s: Tensor, ref: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if not callable(self._step):
            return torch.full_like(s, self._step) if out is None else out.fill_(self._step)
        result = self._step(s, ref, out)
        if result is not s:
            return result
        return s.clone() if out is None else out.copy_(s)


_Step = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]  # (s, ref, out) -> the value of a subterm


def _compile(node: ast.expr, text: str) -> _Step | float:
    """A subterm as a function, or a constant as its value; what the three languages do not share is refused."""
    match node:
        case ast.Name(id="s"):
            return lambda s, ref, out: s
        case ast.Name(id="ref"):
            return lambda s, ref, out: ref  # type: ignore[return-value]
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=argument):
            return _applied(torch.neg, _compile(argument, text), node, text)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS:
            return _applied(FUNCTIONS[name], _compile(argument, text), node, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            if not (isinstance(left, ast.Name) or isinstance(right, ast.Name)):
                raise ValueError(f"estimator term {text!r}: {ast.unparse(node)!r} has two compound sides")
            a, b, operator = _compile(left, text), _compile(right, text), _OPERATORS[type(op)]
            if callable(a) and callable(b):
                return lambda s, ref, out: operator(a(s, ref, out), b(s, ref, out), out=out)
            if callable(a):
                return lambda s, ref, out: operator(a(s, ref, out), b, out=out)
            if callable(b):
                return lambda s, ref, out: operator(torch.full((), a, dtype=s.dtype), b(s, ref, out), out=out)
    raise ValueError(f"estimator term {text!r} may not contain {ast.unparse(node)!r}")


def _applied(function: Callable[..., Tensor], argument: _Step | float, node: ast.expr, text: str) -> _Step:
    if not callable(argument):
        raise ValueError(f"estimator term {text!r} may not contain {ast.unparse(node)!r}, a constant")
    return lambda s, ref, out: function(argument(s, ref, out), out=out)


@dataclass(frozen=True)
class Estimator:
    """One lower bound of the mutual information: loss = E_negatives[...] - E_positives[f]."""

    name: str
    family: Family
    f_text: str  # positive term f(s)
    df_text: str  # f'(s)
    psi_text: str  # what is summed over the negatives: h(s), or e^(s - ref)
    phi_text: str  # the weight of a negative up to its row's alpha: h'(s), or e^(s - ref)
    mi: Literal["bound", "score", "twice_score", "pearson", "none"]  # see `mutual_information`
    source: str
    f: Term = field(init=False, repr=False, compare=False)
    df: Term = field(init=False, repr=False, compare=False)
    psi: Term = field(init=False, repr=False, compare=False)
    phi: Term = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("f", "df", "psi", "phi"):
            object.__setattr__(self, name, Term(getattr(self, f"{name}_text")))

    @cached_property
    def shares_map(self) -> bool:
        """One evaluation serves the sum and the weight."""
        return self.psi_text == self.phi_text

    @property
    def bounded(self) -> bool:
        """phi, relative to the closed row's reference where it has one, and f' are in [0, 1] at any score."""
        weights = [self.df_text] if self.family != "pointwise" else [self.df_text, self.phi_text]
        return all(text == "one" or text.startswith("sigmoid(") for text in weights)


_ROWS = (
    Estimator("infonce", "row_lse", "s", "one", "exp(s - ref)", "exp(s - ref)", "bound",
              "van den Oord et al. 2018, eq. 4; Hjelm et al. 2019, eq. 5"),
    Estimator("dv", "global_lse", "s", "one", "exp(s - ref)", "exp(s - ref)", "bound",
              "Donsker & Varadhan 1983; Belghazi et al. 2018, eq. 10; Hjelm et al. 2019, eq. 2"),
    Estimator("jsd", "pointwise", "log2 - softplus(-s)", "sigmoid(-s)", "softplus(s) - log2", "sigmoid(s)", "score",
              "Nowozin et al. 2016, table 6; Hjelm et al. 2019, eq. 4"),
    Estimator("gan", "pointwise", "-softplus(-s)", "sigmoid(-s)", "softplus(s)", "sigmoid(s)", "score",
              "Goodfellow et al. 2014; Nowozin et al. 2016, table 6"),
    Estimator("kl", "pointwise", "s", "one", "exp(s - one)", "exp(s - one)", "bound",
              "Nguyen, Wainwright & Jordan 2010; Nowozin et al. 2016, table 6"),
    Estimator("rkl", "pointwise", "-exp(-s)", "exp(-s)", "s - one", "one", "score",
              "Nowozin et al. 2016, table 6"),
    Estimator("h2", "pointwise", "one - exp(-s)", "exp(-s)", "exp(s) - one", "exp(s)", "twice_score",
              "Nowozin et al. 2016, table 6 (squared Hellinger)"),
    Estimator("x2", "pointwise", "s", "one", "quarter * s * s + s", "half * s + one", "pearson",
              "Nowozin et al. 2016, table 6 (Pearson)"),
    Estimator("w1", "pointwise", "s", "one", "s", "one", "none",
              "Arjovsky et al. 2017 (the critic's Lipschitz constraint is the caller's)"),
)  # fmt: skip

REGISTRY: dict[str, Estimator] = {row.name: row for row in _ROWS}

# The score that the reference implementation gives an image's own locations instead of dropping them.
OFFICIAL_SELF_SCORE = -10.0


# What closes a row.


class Scores(NamedTuple):
    """All that a loss needs to know of the pairs."""

    positives: Tensor  # (N, P, L) scores of the own-image pairs
    negatives: Tensor  # (N, P) each row's negative term: E[h], D_r, or the one D of all rows


def item_losses(estimator: Estimator, positives: Tensor, negatives: Tensor) -> Tensor:
    """The losses whose mean is the loss: (N, P, L) for row_lse, else each row's share (N, P)."""
    if estimator.family == "row_lse":
        return F.softplus(negatives.unsqueeze(-1) - positives, **_SOFTPLUS)
    return negatives - estimator.f(positives).mean(-1)


def mean_loss_weights(estimator: Estimator, positives: Tensor, negatives: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Derivatives of the mean of `item_losses` over all `rows` rows: by the positives, by the negatives."""
    each = 1.0 / (rows * positives.shape[-1])
    if estimator.family == "row_lse":
        q = torch.sigmoid(negatives.unsqueeze(-1) - positives) * each
        return -q, q.sum(-1)
    return estimator.df(positives) * -each, torch.full_like(negatives, 1.0 / rows)


def parts(
    estimator: Estimator, positives: Tensor, negatives: Tensor, loss: Tensor, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(e_pos, e_neg, mi) of a mean loss: its terms' means, InfoNCE's negative one of logaddexp(D, s)."""
    mi = mutual_information(estimator, positives, loss, candidates)
    if estimator.family == "row_lse":
        negatives = torch.logaddexp(negatives.unsqueeze(-1), positives)
    return estimator.f(positives).mean(), negatives.mean(), mi


def mutual_information(estimator: Estimator, positives: Tensor, loss: Tensor, candidates: int) -> Tensor:
    """The estimate, in nats, that the critic implies (MATHS.md §2).

    InfoNCE is capped at log(candidates) by construction and, because an image's negatives are
    correlated, not a certified lower bound. KL and DV are their bound. The other divergences bound
    themselves, not the mutual information, so theirs is the plug-in E[log p/q]; W1 has none (NaN).
    """
    match estimator.mi:
        case "bound":
            return (math.log(candidates) if estimator.family == "row_lse" else 0.0) - loss
        case "score":
            return positives.mean()
        case "twice_score":
            return positives.mean() * 2.0
        case "pearson":
            ratio = 1.0 + positives * 0.5
            return torch.where(ratio > 0, ratio, torch.nan).log().mean()
        case "none":
            return torch.full_like(loss, torch.nan)
