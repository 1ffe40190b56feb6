"""Scores of any size come out right, and what is no number never turns into a wrong one."""

import dataclasses
import math

import oracle
import pytest
import torch
from oracle import BACKENDS, DIVERGENCES, F16, F32, F64, loss_of, reductions, watch_plans

import dimkern
from dimkern.estimators import REGISTRY

LOSSES = [(estimator, reduction) for estimator in REGISTRY for reduction in reductions(estimator)]
LOG_SUMS = ["infonce", "dv"]
LINEAR = ["infonce", "dv", "jsd", "gan", "x2", "w1"]  # finite at scores of 1e4
BUDGETS = [3_000, 6_000, 10_000, 10**8]
TILES = {"streaming": 0, "cpu": 1_370_000}  # what the smallest float64 tile takes, staged panels included


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def _features(s_of_rows, N=9, L=4, K=6, dtype=F32, seed=0):
    """l, m whose scores are exactly s_of_rows[i] + small in float32: one channel carries the large part."""
    generator = torch.Generator().manual_seed(seed)
    l = torch.randn(N, K, L, generator=generator)
    m = torch.randn(N, K, generator=generator)
    l[:, 0], m[:, 0] = 1.0, torch.as_tensor(s_of_rows).float()
    return l.to(dtype).requires_grad_(), m.to(dtype).requires_grad_()


def _run(estimator, l, m, compute, upstream=1.7):
    loss = compute(estimator, l, m)
    return loss.detach(), *torch.autograd.grad(loss, (l, m), torch.full_like(loss, upstream))


def _oracle(dtype, self_mask="official", clip=None):
    def compute(estimator, l, m):
        s = oracle.pair_scores(l, m.unsqueeze(-1), torch.ones(()), clip, dtype)
        return oracle.items(estimator, s, self_mask).mean()

    return compute


def _assert_rowwise(estimator, l, m, budget, relative, backend, **keywords):
    """Every row's gradient is right to its own size, not to the largest row's."""
    expected = _run(estimator, *(x.detach().double().requires_grad_() for x in (l, m)), _oracle(F64, **keywords))
    with dimkern.config(memory_budget=budget + TILES[backend]):
        got = _run(estimator, l, m, lambda e, l, m: loss_of(e, l, m, backend=backend, **keywords))
    torch.testing.assert_close(got[0].double(), expected[0], rtol=relative, atol=relative)
    for ours_, theirs in zip(got[1:], expected[1:], strict=True):
        size = theirs.flatten(1).norm(dim=1)
        error = (ours_.double() - theirs).flatten(1).norm(dim=1)
        # what float32 cannot represent at all is not asked for
        assert bool((error <= relative * size + 1e-37).all()), f"{estimator}: {(error / size).tolist()}"
    return got


N = 9
RAMPS = {
    "at 1e4": torch.linspace(-1e4, 1e4, N),
    "one huge row, first block": torch.tensor([500.0] + [0.0] * (N - 1)),
    "one huge row, a middle block": torch.tensor([0.0] * 4 + [500.0] + [0.0] * 4),
    "one huge row, last block": torch.tensor([0.0] * (N - 1) + [500.0]),
    "one tiny row": torch.tensor([0.0] * 3 + [-500.0] + [0.0] * 5),
    "rising": torch.arange(N) * 40.0 - 160,
    "falling": 160 - torch.arange(N) * 40.0,
}


@pytest.mark.parametrize("estimator", ["infonce", "dv", "jsd", "gan", "w1"])
@pytest.mark.parametrize("ramp", RAMPS)
def test_rows_of_very_different_scores(estimator, ramp, backend):
    """Whichever block holds the largest row: float64 to every row's own size, float32 to its scores' rounding."""
    for budget in BUDGETS:
        l, m = _features(RAMPS[ramp])
        _assert_rowwise(
            estimator, *(x.detach().double().requires_grad_() for x in (l, m)), budget + 8_000, 1e-9, backend
        )
        relative = 4 * torch.finfo(F32).eps * float(RAMPS[ramp].abs().max() + 30)
        if estimator != "jsd" or "1e4" not in ramp:
            loss = loss_of(estimator, l, m, backend=backend)
            eager = _oracle(F32)(estimator, l, m)
            exact = _oracle(F64)(estimator, l.double(), m.double())
            assert abs(loss.double() - exact) <= abs(eager.double() - exact) + relative * (1 + abs(exact))


@pytest.mark.parametrize("estimator", LOG_SUMS)
@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize("order", ["rows outside", "columns outside"])
def test_rows_of_very_different_scores_in_any_blocks(estimator, ramp, order, backend, monkeypatch):
    """The same whichever rows and columns a block has, rows of one block alone among them."""
    for rows, cols in ((1, 9), (2, 4), (4, 1), (9, 2)):
        forced = {"order": order, "row_images": rows, "col_images": cols}
        with monkeypatch.context() as patch:
            watch_plans(patch, lambda plan, forced=forced: dataclasses.replace(plan, **forced))
            l, m = (x.detach().double().requires_grad_() for x in _features(RAMPS[ramp]))
            _assert_rowwise(estimator, l, m, 10**8, 1e-9, backend)


@pytest.mark.parametrize("estimator", LOG_SUMS)
@pytest.mark.parametrize("gap", [-800.0, -300.0, -100.0, 100.0, 300.0, 800.0])
@pytest.mark.parametrize("self_mask", ["official", "exclude"])
def test_negatives_far_from_the_positives(estimator, gap, self_mask, backend):
    """A row's largest negative hundreds above or below its largest positive."""
    L, K = 3, N
    for dtype in (F64, F32):
        # channel i is image i's own: m_i scores `gap` on others' locations, 0 and a little on its own
        generator = torch.Generator().manual_seed(1)
        m = torch.full((N, K), 1.0, dtype=F64)
        m[range(N), range(N)] = 0.0
        l = torch.zeros(N, K, L, dtype=F64)
        l[range(N), range(N)] = gap
        m, l = m.T.contiguous(), l + torch.randn(N, K, L, dtype=F64, generator=generator) * 0.1
        l, m = l.to(dtype).requires_grad_(), m.to(dtype).requires_grad_()
        positives, negatives = oracle.split(oracle.pair_scores(l, m.unsqueeze(-1), torch.ones(()), None, F64))
        assert (negatives.max() - positives.max()) * math.copysign(1, gap) > 0.9 * abs(gap) - 2
        for budget in (5_000, 8_000, 20_000, 10**8):
            keywords = {"self_mask": self_mask} if estimator == "infonce" else {}
            _assert_rowwise(estimator, l, m, budget + 8_000, 1e-9 if dtype == F64 else 1e-3, backend, **keywords)


@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
@pytest.mark.parametrize("clip", [None, 4.0])
def test_nan_in_nan_out(estimator, reduction, clip, backend):
    """Wherever the naive computation has a NaN, in the loss and in each gradient, so has ours."""
    for where in ("l", "m", "scale"):
        l, m = torch.randn(5, 3, 4, dtype=F64), torch.randn(5, 3, dtype=F64)
        scale = torch.tensor(0.5, dtype=F64)
        {"l": l, "m": m, "scale": scale}[where].view(-1)[-1] = math.nan
        _assert_not_wrong(estimator, reduction, clip, l, m, scale, backend, not_a_number=True)


@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
@pytest.mark.parametrize("clip", [None, 4.0])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_inputs(estimator, reduction, clip, value, backend):
    """An infinite feature or scale: where ours is finite, in loss or gradient, the naive computation is, and equal."""
    for where in ("l", "m", "scale"):
        for positive in (True, False):
            l, m = torch.rand(5, 3, 4, dtype=F64) + 0.1, torch.rand(5, 3, dtype=F64) + 0.1
            l, m = (l, m) if positive else (l - 0.6, m - 0.6)
            scale = torch.tensor(0.5, dtype=F64)
            {"l": l, "m": m, "scale": scale}[where].view(-1)[-1] = value
            if (estimator, where, positive, value) == ("dv", "scale", True, -math.inf):
                continue  # the logarithm of an empty sum: the loss is NaN, its negatives' gradient NaN or 0
            _assert_not_wrong(estimator, reduction, clip, l, m, scale, backend)


def _assert_not_wrong(estimator, reduction, clip, l, m, scale, backend, not_a_number=False):
    leaves = [x.requires_grad_() for x in (l, m, scale)]

    keywords = {"scale": scale, "clip": clip, "reduction": reduction}
    # not the oracle's log-softmax, whose NaN for one infinite logit would ask nothing of the others
    expected = loss_of(estimator, l, m, backend="reference", **keywords)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, leaves, upstream)
    for budget in (4_000, 10**8):
        with dimkern.config(memory_budget=budget + TILES[backend]):
            got = loss_of(estimator, l, m, backend=backend, **keywords)
            runs = (got.detach(), *torch.autograd.grad(got, leaves, upstream))
        for what, ours_, theirs in zip(("loss", *"lms"), runs, (expected.detach(), *gradients), strict=True):
            finite = ours_.isfinite()
            torch.testing.assert_close(ours_[finite], theirs[finite], rtol=1e-9, atol=1e-9)
            if not_a_number:
                assert bool(ours_.isnan()[theirs.isnan()].all()), f"{what}: {ours_} where the naive one has {theirs}"


@pytest.mark.parametrize("estimator", sorted(set(DIVERGENCES) - {"jsd", "gan", "w1"}))
@pytest.mark.parametrize("spread", [90.0, 200.0, 1e20])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_overflow_is_infinite(estimator, spread, dtype, backend):
    """Where float32 overflows the loss is infinite or NaN as eager's, or it is right; never another finite number."""
    l = torch.ones(4, 1, 3, dtype=dtype)
    m = torch.tensor([[-1.0], [1.0], [0.5], [0.0]], dtype=dtype)
    exact = _oracle(F64)(estimator, spread * l.double(), m.double())
    for signed in (spread, -spread):
        exact = _oracle(F64)(estimator, signed * l.double(), m.double())
        loss = loss_of(estimator, l, m, scale=signed, backend=backend)
        eager = _oracle(F32)(estimator, signed * l.float(), m.float())
        assert not loss.isfinite() or math.isclose(loss, exact, rel_tol=1e-4)
        assert loss.isfinite() or not eager.isfinite()


@pytest.mark.parametrize("self_mask", ["official", "exclude"])
def test_lone_huge_positive_has_no_loss(self_mask, backend):
    """A pair far above all others: a loss of 0 or its true tiny value, gradients finite."""
    l, m = _features([0.0] * N)
    l = (l.detach() * 0).requires_grad_()
    with torch.no_grad():
        l[torch.arange(N), torch.arange(N) % 6] = 200.0
    loss = dimkern.infonce_loss(l, m, self_mask=self_mask, backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert l.grad.isfinite().all()


@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
def test_float16_under_a_loss_scale(estimator, reduction, backend):
    """A loss scale of 65536 saves what float16 would lose: scaled gradients are right to float16's rounding."""
    count, L = 128, 16
    generator = torch.Generator().manual_seed(3)
    l16 = (torch.randn(count, 8, L, generator=generator) * 0.03).half().requires_grad_()
    m16 = (torch.randn(count, 8, generator=generator) * 0.03).half().requires_grad_()
    loss = loss_of(estimator, l16, m16, reduction=reduction, backend=backend)
    loss = loss.mean() if reduction == "none" else loss / l16[:, 0].numel() if reduction == "sum" else loss
    ours_ = torch.autograd.grad(loss * 65536.0, (l16, m16))
    l, m = (x.detach().double().requires_grad_() for x in (l16, m16))
    exact = torch.autograd.grad(_oracle(F64)(estimator, l, m) * 65536.0, (l, m))
    for got, expected in zip(ours_, exact, strict=True):
        assert got.dtype == F16
        assert bool(((got.double() - expected).abs() <= 2e-3 * expected.abs() + 2e-3 * expected.abs().mean()).all())
    unscaled = torch.autograd.grad(loss_of(estimator, l16, m16, backend=backend), l16)[0].double() * 65536.0
    assert (unscaled - exact[0]).norm() > 3 * (ours_[0].double() - exact[0]).norm()  # the scale is what saves them


@pytest.mark.parametrize("estimator", REGISTRY)
def test_float16_weights_of_a_large_batch(estimator, backend):
    """N=2048: pair weights of 2e-7 are four of float16's smallest steps; under a loss scale none is lost."""
    count = 2048
    l = (torch.arange(count) % 2 * 2.0 - 1.0).view(-1, 1, 1).half().requires_grad_()
    m = (torch.arange(count) % 3 * 0.25 + 0.25).view(-1, 1).half()
    loss = loss_of(estimator, l, m, backend=backend)
    got = torch.autograd.grad(loss * 65536.0, l)[0].double()
    l64 = l.detach().double().requires_grad_()
    exact = torch.autograd.grad(_mean_of_one_location(estimator, m.double() @ l64.view(1, -1)) * 65536.0, l64)[0]
    torch.testing.assert_close(got, exact, rtol=2e-3, atol=0)


def _mean_of_one_location(estimator, s):
    """The oracle's mean at P = L = 1 without its (N, L, N·L) logits; s is (N, N)."""
    others = len(s) * (len(s) - 1)
    own = torch.eye(len(s), dtype=torch.bool)
    if estimator == "infonce":
        logits = s.masked_fill(own, -10.0).logsumexp(1)
        return (torch.logaddexp(logits, s.diagonal()) - s.diagonal()).mean()
    if estimator == "dv":
        return s.masked_fill(own, -math.inf).flatten().logsumexp(0) - math.log(others) - s.diagonal().mean()
    f, h = DIVERGENCES[estimator]
    return h(s).masked_fill(own, 0.0).sum() / others - f(s.diagonal()).mean()


@pytest.mark.parametrize("estimator", REGISTRY)
def test_a_scale_of_zero(estimator, backend):
    """Every score 0: the loss is its constant, and the scale's own gradient is there."""
    l, m = torch.randn(5, 3, 4, dtype=F64), torch.randn(5, 3, dtype=F64)
    scale = torch.zeros((), dtype=F64, requires_grad=True)
    loss = loss_of(estimator, l, m, scale=scale, backend=backend)
    expected = oracle.items(estimator, oracle.pair_scores(l, m.unsqueeze(-1), scale, None, F64), "official").mean()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    (got,), (exact,) = torch.autograd.grad(loss, scale), torch.autograd.grad(expected, scale)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-13)
    assert got != 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("N", "L"), [(64, 64), (5, 49), (241, 1), (2, 300)])
@pytest.mark.parametrize("score", [-1e4, -1000.0, 1e4])
def test_panels_of_own_pairs_alone(N, L, score, backend):
    """A row whose last panel of columns is its own image adds nothing there: every score alike, the loss is known."""
    l, m = torch.full((N, 1, L), score, dtype=F64, requires_grad=True), torch.ones(N, 1, dtype=F64)
    loss = dimkern.infonce_loss(l, m, self_mask="exclude", backend=backend)
    torch.testing.assert_close(loss.item(), math.log(1 + (N - 1) * L), rtol=1e-12, atol=1e-9)
    assert torch.autograd.grad(loss, l)[0].isfinite().all()
    assert abs(dimkern.donsker_varadhan_loss(l, m, backend=backend).item()) < 1e-8
