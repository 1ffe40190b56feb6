"""The concat critic over all pairs: losses and every weight's gradient equal float64's within the error budget."""

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
from oracle import BF16, F16, F32, F64, _assert_close, items, loss_of, parts, reductions, split
from torch.nn import functional as F

import dimkern
from dimkern.config import parse_bytes
from dimkern.estimators import REGISTRY
from dimkern.plan import choose_backend

LOSSES = [(estimator, reduction) for estimator in REGISTRY for reduction in reductions(estimator)]
ONE_OF_EACH_FAMILY = list({row.family: name for name, row in REGISTRY.items()}.values())
BACKENDS = sorted({"streaming", choose_backend("auto", torch.device("cpu"), "pair_mlp")})


@dataclass(frozen=True)
class MLPCase:
    """One call, but for the estimator. `weight` multiplies the critic's weights: the scores' size."""

    N: int = 5
    P: int = 2
    L: int = 3
    local: int = 4
    summary: int = 6
    H: int = 9
    dtype: torch.dtype = F32
    critic_dtype: torch.dtype = F32
    scale: float = 0.7
    clip: float | None = None
    self_mask: str = "official"
    reduction: str = "mean"
    budget: int = 10**8
    weight: float = 2.0
    seed: int = 0

    @property
    def score_dtype(self):
        return F64 if F64 in (self.dtype, self.critic_dtype) else F32

    def leaves(self, dtype=None):
        """l, m, scale and the critic's parameters by name, in their own dtypes or all in `dtype`."""
        for seed in itertools.count(self.seed):  # until no unit is so near 0 that rounding could switch it
            torch.manual_seed(seed)
            critic = dimkern.PairMLPCritic(self.local, self.summary, self.H)
            leaves = {
                "l": torch.randn(self.N, self.local, self.L, dtype=F64).to(self.dtype),
                "m": torch.randn(self.N, self.summary, self.P, dtype=F64).to(self.dtype),
                "scale": torch.tensor(self.scale, dtype=self.score_dtype),
                **{name: (self.weight * x.detach()).to(self.critic_dtype) for name, x in critic.named_parameters()},
            }
            exact = {name: x.to(F64) for name, x in leaves.items()}
            if min(float(z.abs().min()) for z in pair_layers(exact)[:2]) > 1e-6:
                break
        return {name: x.to(dtype or x.dtype).requires_grad_() for name, x in leaves.items()}

    def critic(self, leaves):
        critic = dimkern.PairMLPCritic(self.local, self.summary, self.H)
        for name in dict(critic.named_parameters()):
            layer, _, kind = name.partition(".")
            setattr(getattr(critic, layer), kind, torch.nn.Parameter(leaves[name].detach()))
        return critic


def pair_layers(x):
    """Of every pair: both layers before their relu, (N, P, N, L, H), and the score."""
    l, m = x["l"].mT, x["m"].mT  # (N, L, Kc), (N, P, Ky)
    (N, L, _), P = l.shape, m.shape[1]
    pairs = torch.cat(
        [m.view(N, P, 1, 1, -1).expand(N, P, N, L, -1), l.view(1, 1, N, L, -1).expand(N, P, N, L, -1)], -1
    )
    first = pairs @ torch.cat([x["summary.weight"], x["local.weight"]], 1).mT + x["summary.bias"]
    second = F.relu(first) @ x["inner.weight"].mT + x["inner.bias"]
    return first, second, (F.relu(second) @ x["outer.weight"].mT + x["outer.bias"]).squeeze(-1)


def _reduced(estimator, case, s):
    losses = items(estimator, s, case.self_mask)
    return {"mean": losses.mean, "sum": losses.sum, "none": lambda: losses}[case.reduction]()


def _clipped(case, s):
    return s if case.clip is None else case.clip * (s / case.clip).tanh()


def gradients_of(case, loss, leaves):
    generator = torch.Generator().manual_seed(case.seed + 1)
    upstream = torch.randn(loss.shape, dtype=F64, generator=generator) + 0.3  # never ones: a dropped factor would pass
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream.to(loss.dtype))
    return loss.detach(), dict(zip(leaves, grads, strict=True))


def naive(estimator, case, dtype=F64):
    leaves = case.leaves(dtype)
    return gradients_of(
        case, _reduced(estimator, case, _clipped(case, leaves["scale"] * pair_layers(leaves)[2])), leaves
    )


def ours(estimator, case, backend="auto", **keywords):
    leaves = case.leaves()
    critic = case.critic(leaves)
    mine = {**{name: leaves[name] for name in ("l", "m", "scale")}, **dict(critic.named_parameters())}
    with dimkern.config(memory_budget=case.budget):
        loss = loss_of(
            estimator, mine["l"], mine["m"], case.self_mask, scale=mine["scale"], clip=case.clip,
            reduction=case.reduction, backend=backend, critic=critic, **keywords,
        )  # fmt: skip
        return gradients_of(case, loss, mine)


def slack(estimator, case):
    """What rounding of layers, scores and sums may cost to first order: of the loss, and of each gradient."""
    leaves = case.leaves(F64)
    first, second, s = pair_layers(leaves)
    s = (leaves["scale"] * s).detach().requires_grad_()
    losses = _reduced(estimator, case, _clipped(case, s))
    (w,) = torch.autograd.grad(losses, s, torch.ones_like(losses) * 3)
    w = w.abs() + w.abs().mean()
    sizes = {name: x.detach().abs().requires_grad_() for name, x in leaves.items()}
    # the network of magnitudes, units on where they are on
    l, m = sizes["l"].mT, sizes["m"].mT
    hidden = (m @ sizes["summary.weight"].mT)[:, :, None, None] + l @ sizes["local.weight"].mT + sizes["summary.bias"]
    hidden = (hidden * (first > 0)) @ sizes["inner.weight"].mT + sizes["inner.bias"]
    size = sizes["scale"] * ((hidden * (second > 0)) @ sizes["outer.weight"].mT + sizes["outer.bias"]).squeeze(-1)
    grads = torch.autograd.grad((w * size).sum(), list(sizes.values()))
    unit = torch.finfo(case.score_dtype).eps * (16 + 4 * float(size.detach().max()))
    positives, negatives = split(_clipped(case, s.detach()))
    terms = 1 + float(losses.detach().abs().max()) + float(positives.abs().max() + negatives.abs().max())
    count = positives.numel() if case.reduction == "sum" else 1
    return unit * terms * count, {name: unit * x for name, x in zip(sizes, grads, strict=True)}


def assert_within_budget(estimator, case, got):
    """|ours - f64| <= |eager in the same dtype - f64| + what rounding may cost, everywhere."""
    (loss, grads), (exact, exact_grads), (eager, eager_grads) = (
        got, naive(estimator, case), naive(estimator, case, case.score_dtype),
    )  # fmt: skip
    of_loss, of_grads = slack(estimator, case)
    assert loss.dtype == case.score_dtype
    _assert_close("loss", loss, eager, exact, of_loss)
    for name, leaf in case.leaves().items():
        assert grads[name].dtype == leaf.dtype
        rounding = torch.finfo(leaf.dtype)  # one cast at the end
        small = of_grads[name] + rounding.eps * exact_grads[name].abs() + rounding.smallest_normal * rounding.eps
        _assert_close(f"gradient by {name}", grads[name], eager_grads[name], exact_grads[name], small)


SHAPES = {  # N, P, L, local, summary, H
    "ragged": (5, 2, 3, 4, 6, 9),
    "one summary, one location": (7, 1, 1, 3, 3, 16),
    "two images": (2, 3, 11, 1, 5, 33),
    "one unit": (6, 2, 4, 3, 2, 1),
    "many summaries": (3, 13, 2, 5, 4, 8),
}
VARIANTS = {
    "plain": {},
    "float64": {"dtype": F64, "critic_dtype": F64},
    "bfloat16 inputs": {"dtype": BF16},
    "float16 inputs, clip": {"dtype": F16, "clip": 1.5},
    "bfloat16 throughout": {"dtype": BF16, "critic_dtype": BF16, "self_mask": "exclude"},
    "float64 critic": {"critic_dtype": F64, "clip": 3.0},
}


def _case(shape, **fields):
    return MLPCase(**{**dict(zip(("N", "P", "L", "local", "summary", "H"), SHAPES[shape], strict=True)), **fields})


def _least(case, estimator):
    """The case in the smallest memory budget that its error names."""
    with pytest.raises(ValueError, match="memory_budget is 1 B") as e:
        ours(estimator, dataclasses.replace(case, budget=1))
    return dataclasses.replace(case, budget=parse_bytes(str(e.value).partition("at least ")[2].partition(":")[0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
def test_every_loss_and_gradient(estimator, reduction, variant, backend):
    for shape in SHAPES:
        for roomy in (True, False):
            case = _case(shape, reduction=reduction, **VARIANTS[variant])
            case = case if roomy else _least(case, estimator)
            assert_within_budget(estimator, case, ours(estimator, case, backend))


@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
def test_the_reference_backend_is_held_to_the_same_budget(estimator, reduction):
    for variant in VARIANTS.values():
        case = MLPCase(reduction=reduction, **variant)
        assert_within_budget(estimator, case, ours(estimator, case, "reference"))


@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
def test_parts(estimator, reduction):
    case = MLPCase(dtype=F64, critic_dtype=F64, scale=1.0, clip=2.0, reduction=reduction)
    leaves = case.leaves()
    oracle = torch.stack(parts(estimator, _clipped(case, pair_layers(leaves)[2]), "official"))
    for backend in (*BACKENDS, "reference"):
        got = loss_of(
            estimator, leaves["l"], leaves["m"], critic=case.critic(leaves), clip=2.0, reduction=reduction,
            backend=backend, return_parts=True,
        )  # fmt: skip
        assert got.loss.requires_grad
        assert not any(x.requires_grad for x in got[1:])
        torch.testing.assert_close(torch.stack(got[1:]), oracle, rtol=1e-12, atol=1e-12, equal_nan=True)
