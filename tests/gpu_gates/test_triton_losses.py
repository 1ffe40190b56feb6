"""Loss and both gradients through the public functions equal float64; their kernels are compiled and executed."""

import pytest

pytest.importorskip("triton", reason="needs Triton (its compiler runs without a GPU)")

import torch
from oracle import BF16, F16, F32, F64, L_LAYOUTS, Case, reductions, varied
from simulator import simulated
from torch.utils._python_dispatch import TorchDispatchMode
from triton_losses import PLANS, check, force, run

import dimkern
from dimkern import gpu_plan, ops
from dimkern.estimators import REGISTRY
from dimkern.gpu import chip_of

RAGGED = Case(N=7, P=3, L=11, K=40, scale=0.3, l_dtype=BF16, m_dtype=BF16)
ONE_OF_EACH_FAMILY = list({row.family: name for name, row in REGISTRY.items()}.values())


@pytest.fixture(params=[80, 90], ids=lambda arch: f"sm_{arch}")
def gpu(request):
    with simulated(request.param) as gpu:
        yield gpu


@pytest.mark.parametrize("flash", [False, True], ids=["stored", "flash"])
@pytest.mark.parametrize("estimator", REGISTRY)
def test_every_estimator(gpu, estimator, flash, monkeypatch):
    """Every reduction, with and without the soft clip; a new row of the registry is picked up here."""
    for reduction in ("mean",) if flash and estimator not in ONE_OF_EACH_FAMILY else reductions(estimator):
        case = varied(RAGGED, reduction=reduction, clip=1.5 if reduction == "none" else None)
        force(monkeypatch, case, few_launches=not flash and reduction != "none" and estimator != "dv", flash=flash)
        check(estimator, case)
        monkeypatch.undo()
    assert gpu.launches
    assert all(launch.kernel.metadata.target.arch == gpu.arch for launch in gpu.launches)


@pytest.mark.parametrize(
    ("estimator", "plan"),
    [
        *(("infonce", plan) for plan in PLANS),
        *(("dv", plan) for plan in PLANS if plan != "few launches"),
        *(("jsd", plan) for plan in PLANS if "rows" not in plan),
    ],
)
def test_every_order(gpu, estimator, plan, monkeypatch):
    """One of each family, in one block and in many, of even and of ragged tiles."""
    even = Case(N=8, P=8, L=16, K=64, scale=0.3, l_dtype=BF16, m_dtype=BF16, l_layout="channels_last")
    for case in (varied(RAGGED, clip=2.0, self_mask="exclude"), even):
        ran = force(monkeypatch, case, **PLANS[plan])
        check(estimator, case)
        (ran,) = ran
        assert ran.order == PLANS[plan].get("order", ran.order)
        assert (ran.gpu.flash is not None) == ("flash" in plan)
        monkeypatch.undo()


@pytest.mark.parametrize(("l_dtype", "m_dtype"), [(F32, F32), (F16, F16), (BF16, F32), (F16, BF16)], ids=str)
@pytest.mark.parametrize("estimator", ["infonce", "jsd"])
def test_every_dtype(gpu, estimator, l_dtype, m_dtype, monkeypatch):
    """float32 to float32's own budget; halves that differ are scored in float32."""
    case = varied(RAGGED, l_dtype=l_dtype, m_dtype=m_dtype)
    halves = l_dtype == m_dtype and l_dtype.itemsize == 2
    for plan in ("few launches", "columns outside, blocked", *(["flash"] if halves else [])):
        force(monkeypatch, case, **PLANS[plan])
        check(estimator, case)
        monkeypatch.undo()


@pytest.mark.parametrize("plan", ["few launches", "columns outside, blocked"])
def test_float16_weights_of_any_size(gpu, plan, monkeypatch):
    """Scaled summaries that float16 has not the range for, and weights that are spread over all of it."""
    for scale in (1e-6, 30.0, -3e5):
        for estimator in ONE_OF_EACH_FAMILY:
            if (estimator, plan) != ("dv", "few launches"):
                case = varied(RAGGED, l_dtype=F16, m_dtype=F16, scale=scale)
                ran = force(monkeypatch, case, **PLANS[plan])
                check(estimator, case)
                assert [plan.weight_dtype for plan in ran] == [F16]
                monkeypatch.undo()


def test_float16_inputs_with_bfloat16_weights(gpu, monkeypatch):
    """Where weights are not bounded, or not known when they are stored."""
    for estimator, reduction, plan in (
        ("kl", "mean", "few launches"),
        ("infonce", "none", "columns outside, blocked"),
        ("infonce", "mean", "rows outside"),
        ("jsd", "mean", "flash"),
    ):
        case = varied(RAGGED, l_dtype=F16, m_dtype=F16, reduction=reduction)
        ran = force(monkeypatch, case, **PLANS[plan])
        check(estimator, case)
        assert {plan.weight_dtype for plan in ran} == {BF16}
        monkeypatch.undo()


def test_tf32_follows_torch(gpu):
    """torch.backends.cuda.matmul decides how float32 is multiplied: TF32 is coarser, and no worse than its 10 bits."""
    case = varied(RAGGED, l_dtype=F32, m_dtype=F32)
    exact = run("infonce", case)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rounded = run("infonce", case)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert "tf32" in gpu.launches[-2].kernel.asm["ptx"]
    for name, gradient in exact.grads.items():
        error = (rounded.grads[name] - gradient).norm() / gradient.norm()
        assert 1e-6 < error < 2e-3


SHIPPED = {
    dtype: {arch: gpu_plan.tiles_for(chip, dtype) for arch, chip in ((80, gpu_plan.A100), (90, gpu_plan.H100))}
    for dtype in (BF16, F32)
}


@pytest.mark.parametrize("dtype", SHIPPED, ids=str)
@pytest.mark.parametrize("estimator", ["infonce", "jsd"])
def test_every_shipped_tile(gpu, estimator, dtype, monkeypatch):
    """At sizes that fill whole tiles, and that do not; the statistics alone and the weights."""
    for tile in SHIPPED[dtype][gpu.arch]:
        for N, P, L, K in (
            (4, tile.BM // 4, tile.BN // 4, 2 * tile.BK),
            (5, tile.BM // 4, tile.BN // 4 - 1, tile.BK + 8),
        ):
            case = Case(N=N, P=P, L=L, K=K, scale=0.2, l_dtype=dtype, m_dtype=dtype)
            force(monkeypatch, case, tile, **PLANS["few launches"])
            check(estimator, case)
            monkeypatch.undo()


FLASH = {80: gpu_plan._FLASH.values(), 90: (*gpu_plan._FLASH_TMA.values(), gpu_plan._FLASH_TMA_NARROW)}


@pytest.mark.parametrize("estimator", ["infonce", "jsd"])
def test_every_flash_tile(gpu, estimator, monkeypatch):
    """At sizes that fill whole tiles, and that do not, in several parts; references found on the way, and given."""
    for tile in FLASH[gpu.arch]:
        whole = max(tile.BM, tile.BN) // 2
        for N, P, L, K, reduction in (
            (4, whole, whole, tile.BK, "mean"),
            (5, tile.BM // 5 + 1, 2 * tile.BN // 5 - 1, tile.BK - 24, "none"),
        ):
            case = Case(N=N, P=P, L=L, K=K, scale=0.2, l_dtype=BF16, m_dtype=BF16, reduction=reduction)
            force(monkeypatch, case, flash=tile)
            check(estimator, case)
            monkeypatch.undo()
    assert 2 in {launch.grid[1] for launch in gpu.launches if launch.kernel.metadata.name == "gradient"}


@pytest.mark.parametrize("estimator", ["infonce", "jsd"])
def test_chosen_where_weights_have_no_room(gpu, estimator):
    """Nothing forced but the budget: in blocks, stored weights would take more launches."""
    case = Case(N=16, P=4, L=64, K=32, scale=0.3, l_dtype=BF16, m_dtype=BF16, l_layout="channels_last")
    p, chip, (l, m, _) = case.problem(estimator), chip_of(torch.device("cpu")), case.tensors()
    budget = gpu_plan.flash_scratch_bytes(p, chip, gpu_plan.flash_tile(chip, p), case.N)
    with dimkern.config(memory_budget=budget):
        text = dimkern.explain(l, m, loss=estimator)
        assert "its weights stay in registers" in text
        assert "work: 4 matrix products" in text
        check(estimator, case)
    assert sum(launch.kernel.metadata.name == "gradient" for launch in gpu.launches) == 2


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_references_found_on_the_way(gpu, scale, monkeypatch):
    """The largest score so far serves whatever comes later: nothing has to be repaired."""
    case = varied(RAGGED, N=9, L=40, scale=scale)
    force(monkeypatch, case, flash=True)
    check("infonce", case)
    assert "close_rows" not in {launch.kernel.metadata.name for launch in gpu.launches}


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("scale", [1e4, -1e4, 0.3])
def test_references_that_fail_are_repaired(gpu, scale, dtype, monkeypatch):
    """A row's largest positive says nothing of its negatives at scores of 1e4: the rows are redone, on the device."""
    case = varied(RAGGED, scale=scale, l_dtype=dtype, m_dtype=dtype)
    force(monkeypatch, case, **PLANS["rows outside"])
    check("infonce", case)
    (repair,) = [launch for launch in gpu.launches if launch.kernel.metadata.name == "close_rows"]
    if dtype == BF16:  # left at once, or multiplied again
        assert (repair.counts.get("products", 0) > 0) == (abs(scale) > 1)


@pytest.mark.parametrize("l_layout", L_LAYOUTS)
def test_every_layout(gpu, l_layout):
    case = Case(N=4, P=2, L=12, K=32, scale=0.3, l_dtype=BF16, m_dtype=BF16, l_layout=l_layout, m_layout="strided")
    check("infonce", case)


@pytest.mark.parametrize("needs", ["l", "m", "s"])
@pytest.mark.parametrize("flash", [False, True], ids=["stored", "flash"])
def test_only_the_gradient_that_is_needed(gpu, needs, flash, monkeypatch):
    for reduction in ("mean", "none"):
        case = varied(RAGGED, needs=needs, reduction=reduction)
        force(monkeypatch, case, few_launches=not flash and reduction == "mean", flash=flash)
        check("infonce", case)
        monkeypatch.undo()


@pytest.mark.parametrize("estimator", ONE_OF_EACH_FAMILY)
def test_the_least_budget(gpu, estimator):
    """Single images against single images still add up."""
    case = varied(RAGGED, N=4, P=1)
    with dimkern.config(memory_budget=gpu_plan.scratch_bytes(case.problem(estimator), 1, 1, False)):
        check(estimator, case)


@pytest.mark.parametrize("plan", ["few launches", "flash"])
def test_the_order_of_programs_does_not_matter(plan, monkeypatch):
    """No atomics: equal to the last bit however the chip schedules."""
    runs, case = [], varied(RAGGED, N=9, L=40)
    force(monkeypatch, case, **PLANS[plan])
    for seed in (1, 2):
        with simulated(90, seed=seed):
            runs.append(run("infonce", case))
    assert torch.equal(runs[0].loss, runs[1].loss)
    assert all(torch.equal(runs[0].grads[name], runs[1].grads[name]) for name in "lms")


class Watched(TorchDispatchMode):
    """What torch runs: each of these is a launch on a GPU, but for views and allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        changes = operator._schema.is_mutable or not any(a.alias_info for a in operator._schema.returns)
        if changes and not any(word in str(operator) for word in ("empty", "detach", "set_", "dimkern")):
            self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("estimator", ["infonce", "jsd"])
def test_eight_launches(gpu, estimator, monkeypatch):
    """A small problem's forward and backward."""
    case = varied(RAGGED, K=32, l_layout="channels_last", m_layout="NPK")
    l, m, _ = case.tensors()
    monkeypatch.setattr(ops, "is_watched", lambda *_: False)  # what the op does, in sight of Watched
    with Watched() as watched:
        loss = dimkern.infonce_loss(l, m) if estimator == "infonce" else dimkern.fenchel_dual_loss(l, m)
        loss.backward(torch.ones(()))
    kinds = [launch.kernel.metadata.name for launch in gpu.launches]
    assert len(kinds) + len(watched.names) - watched.names.count("aten.ones.default") <= 8, (kinds, watched.names)


def test_auto_chooses_it_and_float64_does_not(gpu):
    l, m, _ = RAGGED.tensors()
    text = dimkern.explain(l, m)
    assert "backend: triton" in text
    assert f"GPU: sm_{gpu.arch} with 4 multiprocessors" in text
    assert "predicted by a model, not measured" in text
    assert "not triton: its kernels have no float64" in dimkern.explain(l.to(F64), m)
    with pytest.raises(ValueError, match="backend is 'triton': its kernels have no float64"):
        dimkern.infonce_loss(l.to(F64), m, backend="triton")
    assert dimkern.infonce_loss(l.to(F64), m).dtype == F64
    with torch.no_grad():
        without = dimkern.infonce_loss(l, m)
    torch.testing.assert_close(without, dimkern.infonce_loss(l, m).detach())
