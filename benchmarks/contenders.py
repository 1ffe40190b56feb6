"""Each way to compute a loss, as a function (l, m) -> loss, and the bare matrix products that bound them all.

A contender says what it cannot do and why; nothing here measures. Half-precision inputs: products are made in
the inputs' dtype and what follows in float32, as autocast would do it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dimkern
from dimkern.plan import choose_backend, why_not

from .cases import Case

Loss = Callable[[Tensor, Tensor], Tensor]  # l (N, K, L), m (N, K, P) -> scalar


class Steps(NamedTuple):
    """What is timed, bound to its inputs."""

    forward: Callable[[], object]  # nothing needs a gradient
    both: Callable[[], tuple[Tensor, ...]]  # loss, gradient by l, gradient by m


@dataclass(frozen=True)
class Contender:
    name: str  # in JSON and tables
    label: str  # in pictures
    losses: dict[str, Loss]  # by estimator
    why_not: Callable[[Case, torch.dtype], str | None] = lambda case, dtype: None
    scratch: Callable[[Case], int] = lambda case: 0  # bytes it will allocate, roughly: what does not fit is not tried
    # what its time grows with, where that soon exceeds anyone's patience
    cost: Callable[[Case], int] | None = None
    compiled: bool = False

    def reason(self, estimator: str, case: Case, dtype: torch.dtype) -> str | None:
        """None if this contender can compute the loss, else why not."""
        if estimator not in self.losses:
            return f"does not compute {estimator}"
        return self.why_not(case, dtype)

    def steps(self, estimator: str, l: Tensor, m: Tensor) -> Steps:
        loss = self.losses[estimator]
        if self.compiled:
            # one compilation for each shape, as in training; without the reset the ninth shape would run eagerly
            torch._dynamo.reset()
            warnings.filterwarnings("ignore", "`torch._prims_common.check`", FutureWarning)  # inductor's own call
            loss = torch.compile(loss, dynamic=False)
        leaf_l, leaf_m = l.detach().requires_grad_(), m.detach().requires_grad_()

        def forward() -> Tensor:
            with torch.no_grad():
                return loss(l, m)

        def both() -> tuple[Tensor, ...]:
            value = loss(leaf_l, leaf_m)
            return value.detach(), *torch.autograd.grad(value, (leaf_l, leaf_m))

        return Steps(forward, both)


class Floor(Contender):
    """The three products done bare: score matrix preallocated, gradients freshly allocated as any autograd op must.

    It computes no loss and is never wrong; its forward is one product. For the contiguous (N, K, L) layout the
    transposed copy that others make is made beforehand and not counted.
    """

    def steps(self, estimator: str, l: Tensor, m: Tensor) -> Steps:
        c, g = _matrices(l, m)
        scores = torch.empty(g.shape[0], c.shape[0], dtype=c.dtype)

        def forward() -> Tensor:
            return torch.mm(g, c.t(), out=scores)

        def both() -> tuple[Tensor, ...]:
            forward()
            return torch.mm(scores, c), torch.mm(scores.t(), g)

        return Steps(forward, both)


def contenders() -> list[Contender]:
    """All of them, the floor first, then ours."""
    pair_tensors = partial(_pair_tensors, copies=4)
    return [
        Floor("floor", "three bare GEMMs", dict.fromkeys(_EAGER, _not_a_loss)),
        *(_ours(name) for name in dimkern.BACKENDS if name != "reference" and why_not(name, _CPU) is None),
        Contender("eager", "closed-form eager", _EAGER, scratch=pair_tensors),
        Contender("compile", "torch.compile of it", _EAGER, _no_compiler, pair_tensors, compiled=True),
        Contender("reference", "reference formula", _REFERENCE, scratch=_logits, cost=_logits),
        Contender("reference-rows", "its softmax over the last axis", _ROWS, scratch=_logits, cost=_logits),
        Contender("linear-ce", "F.linear_cross_entropy", {"infonce": linear_cross_entropy}, _not_linear_ce),
        Contender("keops", "KeOps", {"infonce": keops}, _no_keops, cost=lambda case: case.pairs * case.K),
    ]


def chosen() -> str:
    """The name of the contender that backend="auto" stands for."""
    return f"dimkern-{choose_backend('auto', _CPU)}"


def _ours(backend: str) -> Contender:
    return Contender(
        f"dimkern-{backend}",
        f"dimkern ({backend})",
        {
            "infonce": lambda l, m: dimkern.infonce_loss(l, m, backend=backend),
            "jsd": lambda l, m: dimkern.fenchel_dual_loss(l, m, "JSD", backend=backend),
            "dv": lambda l, m: dimkern.donsker_varadhan_loss(l, m, backend=backend),
        },
    )


def eager_infonce(l: Tensor, m: Tensor) -> Tensor:
    """Log-sum-exp over each row's negatives in the R x N·L matrix: the positives share it, nothing is repeated."""
    positives, s = _scores(l, m)
    L = l.shape[2]
    negatives = s.flatten(2).logsumexp(2)  # (N, P)
    negatives = torch.logaddexp(negatives, torch.full_like(negatives, math.log(L) - 10.0))
    return F.softplus(negatives[..., None] - positives).mean()


def eager_jsd(l: Tensor, m: Tensor) -> Tensor:
    positives, s = _scores(l, m)
    N, L, P = l.shape[0], l.shape[2], m.shape[2]
    return F.softplus(s).sum() / (N * P * (N - 1) * L) + F.softplus(-positives).mean() - 2 * math.log(2)


def eager_dv(l: Tensor, m: Tensor) -> Tensor:
    positives, s = _scores(l, m)
    N, L, P = l.shape[0], l.shape[2], m.shape[2]
    return s.flatten().logsumexp(0) - math.log(N * P * (N - 1) * L) - positives.mean()


def reference_infonce(l: Tensor, m: Tensor) -> Tensor:
    """cortex_DIM's formula in cortex_DIM's layout: logits (N, L, 1 + N·L, P), log-softmax over the third axis."""
    positives, s = _reference_scores(l, m)  # (N, P, L), (N, P, N·L)
    negatives = s.transpose(1, 2).unsqueeze(1).expand(-1, l.shape[2], -1, -1)  # (N, L, N·L, P)
    logits = torch.cat([positives.transpose(1, 2).unsqueeze(2), negatives], 2)
    return -logits.log_softmax(2)[:, :, 0].mean()


def reference_rows(l: Tensor, m: Tensor) -> Tensor:
    """The same formula with the softmax over the last axis, which torch has a faster CPU kernel for."""
    positives, s = _reference_scores(l, m)
    logits = torch.cat([positives.unsqueeze(3), s.unsqueeze(2).expand(-1, -1, l.shape[2], -1)], 3)
    return -logits.log_softmax(3)[..., 0].mean()


def reference_jsd(l: Tensor, m: Tensor) -> Tensor:
    """cortex_DIM's formula: both terms of every pair, each averaged under a mask."""
    c, g = _matrices(l, m)
    N, L, P = l.shape[0], l.shape[2], m.shape[2]
    s = (g @ c.t()).float().view(N, P, N, L)
    own = torch.eye(N).view(N, 1, N, 1).expand_as(s)
    positive = math.log(2) - F.softplus(-s)
    negative = F.softplus(-s) + s - math.log(2)
    return (negative * (1 - own)).sum() / (1 - own).sum() - (positive * own).sum() / own.sum()


def linear_cross_entropy(l: Tensor, m: Tensor) -> Tensor:
    """At L=1 a summary's only positive is its own class; the phantom negative is a class of zeros with a bias."""
    c, g = _matrices(l, m)
    N, P = l.shape[0], m.shape[2]
    classes = torch.cat([c, c.new_zeros(1, c.shape[1])])
    bias = c.new_zeros(N + 1)
    bias[N] = -10.0
    return F.linear_cross_entropy(
        g, classes, torch.arange(N).repeat_interleave(P), linear_bias=bias, options=torch.nn.LinearCrossEntropyOptions()
    )


def keops(l: Tensor, m: Tensor) -> Tensor:
    from pykeops.torch import LazyTensor

    c, g = _matrices(l, m)
    N, L, P = l.shape[0], l.shape[2], m.shape[2]
    image = torch.arange(N, dtype=c.dtype)
    row = LazyTensor(image.repeat_interleave(P).view(-1, 1, 1))
    column = LazyTensor(image.repeat_interleave(L).view(1, -1, 1))
    own = (0.5 - (row - column).abs()).step()
    s = (LazyTensor(g.unsqueeze(1)) * LazyTensor(c.unsqueeze(0))).sum(-1) - 1e4 * own
    negatives = s.logsumexp(1).view(N, P)
    negatives = torch.logaddexp(negatives, torch.full_like(negatives, math.log(L) - 10.0))
    positives = torch.einsum("nkp,nkl->npl", m, l)
    return F.softplus(negatives[..., None] - positives).mean()


_CPU = torch.device("cpu")
_EAGER: dict[str, Loss] = {"infonce": eager_infonce, "jsd": eager_jsd, "dv": eager_dv}
_REFERENCE: dict[str, Loss] = {"infonce": reference_infonce, "jsd": reference_jsd}  # its DV raises
_ROWS: dict[str, Loss] = {"infonce": reference_rows}


def _matrices(l: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """C (N·L, K) and G (R, K); views where the layout allows."""
    return l.transpose(1, 2).flatten(0, 1), m.transpose(1, 2).flatten(0, 1)


def _scores(l: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Positives (N, P, L), and all scores (N, P, N, L) with the own-image pairs at -inf."""
    c, g = _matrices(l, m)
    N, L, P = l.shape[0], l.shape[2], m.shape[2]
    s = (g @ c.t()).float().view(N, P, N, L)
    positives = s.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return positives, s.masked_fill(torch.eye(N, dtype=torch.bool).view(N, 1, N, 1), -torch.inf)


def _reference_scores(l: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Positives (N, P, L), and all scores (N, P, N·L) with the own-image pairs replaced by -10."""
    c, g = _matrices(l, m)
    N, L, P = l.shape[0], l.shape[2], m.shape[2]
    s = (g @ c.t()).float().view(N, P, N, L)
    s = s.masked_fill(torch.eye(N, dtype=torch.bool).view(N, 1, N, 1), -10.0)
    return torch.einsum("nkp,nkl->npl", m, l).float(), s.view(N, P, N * L)


def _pair_tensors(case: Case, copies: int) -> int:
    return copies * case.pairs * 4


def _logits(case: Case) -> int:
    """The logits' size, of which log-softmax and its gradient hold three at once (measured)."""
    return 3 * case.rows * case.L * (1 + case.N * case.L) * 4


def _not_linear_ce(case: Case, dtype: torch.dtype) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"not in torch {torch.__version__}"
    if case.L > 1:
        return "L > 1: it has no mask, so an image's other positives would count as negatives"
    return None


def _no_keops(case: Case, dtype: torch.dtype) -> str | None:
    if find_spec("pykeops") is None:
        return "pykeops is not installed"
    if dtype is torch.bfloat16:
        return "no bfloat16"
    return None


def _no_compiler(case: Case, dtype: torch.dtype) -> str | None:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        return f"inductor finds no C++ compiler ({type(error).__name__})"
    return None


def _not_a_loss(l: Tensor, m: Tensor) -> Tensor:
    raise NotImplementedError("the floor is no loss")
