"""Every loss and gradient equals float64 within the error budget, whatever the layout, dtype and blocks."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import (
    BACKENDS,
    BF16,
    DIVERGENCES,
    DTYPES,
    F16,
    F32,
    F64,
    L_LAYOUTS,
    M_LAYOUTS,
    ONE_SUMMARY,
    Case,
    assert_within_budget,
    loss_of,
    ours,
    pair_scores,
    parts,
    problems,
    reductions,
    slack,
    varied,
    watch_plans,
)
from torch.utils.flop_counter import FlopCounterMode

from dimkern import ops
from dimkern.estimators import REGISTRY
from dimkern.native import WHY_NOT_LOADED

ESTIMATORS = list(REGISTRY)
ONE_OF_EACH_FAMILY = list({row.family: name for name, row in REGISTRY.items()}.values())
LOSSES = [(estimator, reduction) for estimator in REGISTRY for reduction in reductions(estimator)]


def test_the_oracle_knows_every_estimator():
    assert set(REGISTRY) == {"infonce", "dv", *DIVERGENCES}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_ragged_problems(estimator, reduction, backend, data):
    case = data.draw(problems(reduction=reduction))
    assert_within_budget(estimator, case, ours(estimator, case, backend))


@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout(estimator, reduction, dtype):
    for l_layout in L_LAYOUTS:
        for m_layout in M_LAYOUTS if l_layout == "NKL" else ("NK", "NKP"):
            case = Case(
                P=1 if m_layout in ONE_SUMMARY else 2, l_dtype=dtype, m_dtype=dtype, l_layout=l_layout,
                m_layout=m_layout, reduction=reduction, budget=0.3,
            )  # fmt: skip
            assert_within_budget(estimator, case, ours(estimator, case))


@pytest.mark.skipif("cpu" not in BACKENDS, reason=str(WHY_NOT_LOADED))
@pytest.mark.parametrize("estimator", ONE_OF_EACH_FAMILY)
@pytest.mark.parametrize("l_layout", L_LAYOUTS)
def test_every_layout_native(estimator, l_layout):
    """Panels are staged by one code for all estimators, whatever is done with them."""
    for m_layout in M_LAYOUTS:
        for dtype in DTYPES:
            case = Case(P=1 if m_layout in ONE_SUMMARY else 2, l_dtype=dtype, l_layout=l_layout, m_layout=m_layout)
            for reduction in {"mean", reductions(estimator)[-1]}:
                case = varied(case, reduction=reduction, budget=0.3)
                assert_within_budget(estimator, case, ours(estimator, case, "cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("l_dtype", "m_dtype"), [(F32, F64), (F64, F32), (BF16, F32), (F32, F16), (F16, BF16)])
def test_mixed_dtypes(estimator, l_dtype, m_dtype, backend):
    case = Case(l_dtype=l_dtype, m_dtype=m_dtype, P=2)
    assert_within_budget(estimator, case, ours(estimator, case, backend))


FORCED = {  # images in a block of rows and of columns, of 9
    "one block": (9, 9),
    "row blocks": (2, 9),
    "column blocks": (9, 4),
    "both, rows coarser": (4, 1),
    "both, columns coarser": (1, 5),
}


ORDERS = {"pointwise": ["columns outside"], "row_lse": ["columns outside", "rows outside"]}
ORDERS["global_lse"] = ORDERS["row_lse"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("estimator", "order", "blocks"),
    [
        (estimator, order, blocks)
        for estimator, row in REGISTRY.items()
        for order in ORDERS[row.family]
        for blocks in FORCED
    ],
)
def test_blocks_and_orders(estimator, order, blocks, backend, monkeypatch):
    """Any blocks in either loop order give the same loss and gradients."""
    wanted = dict(zip(("row_images", "col_images"), FORCED[blocks], strict=True), order=order)
    ran = watch_plans(monkeypatch, lambda plan: dataclasses.replace(plan, **wanted))
    for changes in ({}, {"clip": 3.0}, {"l_layout": "channels_last", "self_mask": "exclude"}, {"l_dtype": BF16}):
        for reduction in {"mean", reductions(estimator)[-1]}:
            case = Case(
                **{"N": 9, "P": 2, "L": 5, "K": 3, "l_dtype": F64, "m_dtype": F64, "reduction": reduction, **changes}
            )
            assert_within_budget(estimator, case, ours(estimator, case, backend))
    assert len(ran) >= 4
    assert {plan.backend for plan in ran} == {backend}
    assert {(plan.order, plan.row_images, plan.col_images) for plan in ran} == {(order, *FORCED[blocks])}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_plan_uses_both_orders(backend):
    """Room for a block of everything: rows outside, three products. The least budget: columns outside, four."""
    for estimator, row in REGISTRY.items():
        # rows enough that the native library's padding to whole strips does not hide a block's height
        roomy, tight = (Case(N=9, P=40, budget=budget).plan(estimator, backend) for budget in (1.0, 0.0))
        pointwise = row.family == "pointwise"
        assert (roomy.order, roomy.gemms) == ("columns outside" if pointwise else "rows outside", 3)
        assert (tight.order, tight.gemms) == ("columns outside", 3 if pointwise else 4)
        assert (len(list(roomy.row_blocks())), len(list(roomy.col_blocks()))) == (1, 1)
        assert len(list(tight.row_blocks())) == 9


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_scores_at_all(backend):
    """All scores are 0: the loss is the logarithm of a count, merged over column blocks and rounded at each."""
    case = Case(N=7, P=3, L=8, K=1, l_dtype=F64, m_dtype=F64, self_mask="exclude", scale=0.0, budget=0.0)
    run = ours("infonce", case, backend)
    assert_within_budget("infonce", case, run)
    torch.testing.assert_close(run.loss, torch.tensor(49.0, dtype=F64).log(), rtol=1e-15, atol=0)


@pytest.fixture
def plans(monkeypatch):
    """The plans that ran, in order."""
    return watch_plans(monkeypatch)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("needs", ["", "l", "m", "s", "lm"])
def test_only_the_products_that_are_needed(estimator, needs, plans, monkeypatch):
    """One product over all pairs for the loss and one for each gradient, counted; nothing else is multiplied."""
    case = Case(N=9, P=2, needs=needs)
    l, m, scale = case.tensors()
    expected = loss_of(estimator, *(x.detach() for x in (l, m)), scale=scale.detach(), backend="streaming")
    assert loss_of(estimator, l, m, scale=scale, backend="streaming").requires_grad == bool(needs)
    plans.clear()
    monkeypatch.setattr(ops, "is_watched", lambda *_: False)  # the counter does not look into an op
    products = torch.ops.aten.addmm_, torch.ops.aten.baddbmm_
    in_place = dict.fromkeys(products, lambda _, a, b, **keywords: 2 * math.prod(a) * b[-1])
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss = loss_of(estimator, l, m, scale=scale, backend="streaming")
    assert [plan.gemms for plan in plans] == [1 + len(needs)]
    of_pairs, of_positives = (2 * 18 * images * case.L * case.K for images in (9, 1))
    assert counter.get_total_flops() == (1 + len(needs)) * (of_pairs + of_positives)
    torch.testing.assert_close(loss.detach(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_grad_makes_no_gradient(estimator, backend, plans):
    l, m, scale = Case(P=2).tensors()
    with_grad = loss_of(estimator, l, m, scale=scale, backend=backend)
    with torch.no_grad():
        without = loss_of(estimator, l, m, scale=scale, backend=backend)
    with torch.inference_mode():
        inferred = loss_of(estimator, l, m, scale=scale, backend=backend)
    assert [plan.gemms for plan in plans] == [3, 1, 1]
    assert not without.requires_grad
    torch.testing.assert_close(torch.stack([without, inferred]), with_grad.detach().expand(2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
@pytest.mark.parametrize("clip", [None, 1.5])
def test_parts(estimator, reduction, clip, backend):
    """e_pos, e_neg and mi are MATHS.md §2's, detached, whatever the reduction; the loss is as without parts."""
    for self_mask in ("official", "exclude"):
        case = Case(P=3, l_dtype=F64, m_dtype=F64, scale=1.0, clip=clip, self_mask=self_mask, reduction=reduction)
        l, m, scale = case.tensors()
        keywords = {"scale": scale, "clip": clip, "reduction": reduction, "backend": backend}
        got = loss_of(estimator, l, m, self_mask, return_parts=True, **keywords)
        torch.testing.assert_close(got.loss, loss_of(estimator, l, m, self_mask, **keywords), rtol=1e-14, atol=0)
        assert got.loss.requires_grad
        assert not any(x.requires_grad for x in got[1:])
        oracle = torch.stack(parts(estimator, pair_scores(l, m, scale, clip, F64), self_mask))
        torch.testing.assert_close(torch.stack(got[1:]), oracle, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_pearson_information_is_nan_where_it_has_none():
    l = torch.full((3, 1, 2), -3.0)
    assert math.isnan(loss_of("x2", l, torch.ones(3, 1), return_parts=True).mi)
    assert loss_of("x2", -l, torch.ones(3, 1), return_parts=True).mi == pytest.approx(math.log(2.5))


@pytest.mark.parametrize(("estimator", "reduction"), LOSSES)
def test_the_reference_backend_is_held_to_the_same_budget(estimator, reduction):
    for clip, dtype in ((None, F32), (2.0, BF16), (2.0, F64)):
        case = Case(P=2, l_dtype=dtype, m_dtype=dtype, clip=clip, reduction=reduction)
        assert_within_budget(estimator, case, ours(estimator, case, backend="reference"))


def test_the_error_budget_is_tight():
    """Half a percent in one gradient, or a dropped upstream factor, is far outside what is allowed."""
    for estimator in REGISTRY:
        case = Case(N=8, L=4)
        for name in "lms":
            wrong = ours(estimator, case)
            wrong.grads[name] = wrong.grads[name] * 1.005
            with pytest.raises(AssertionError, match=f"gradient by {name}"):
                assert_within_budget(estimator, case, wrong)
        assert slack(estimator, case)[0] < 1e-3
