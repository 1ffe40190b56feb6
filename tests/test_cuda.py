"""The CUDA backend through the public API, on CPU tensors: the shipped ops and kernels as g++ compiles them.

Fibers stand for CUDA's threads (simulator/cuda_host/emulation.h); what nvcc makes of the same sources is executed by
tests/gpu_gates/test_cuda_ptx.py. Here are the wiring, the formulas and the edges of tiles.
"""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import BF16, F16, F32, F64, Case, gradients_of_a_gpu, loss_of, problems, varied
from simulator.capture import NothingWaits
from simulator.cuda_host.library import KERNELS, Launches, assert_right, on_cpu_tensors, served

import dimkern
from dimkern import ops
from dimkern.estimators import REGISTRY
from dimkern.plan import plan_for

DTYPES = (BF16, F16, F32)
FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# R = 70 and M = 130: two tiles of rows, three panels, both ragged; and two lines of K
RAGGED = Case(N=10, P=7, L=13, K=72, scale=0.08, l_layout="transposed", m_layout="NPK", needs="lms")


@pytest.fixture(autouse=True)
def cuda_on_cpu_tensors():
    with on_cpu_tensors(), gradients_of_a_gpu():
        yield


def of_dtype(case, dtype):
    return varied(case, l_dtype=dtype, m_dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", REGISTRY)
def test_ragged_tiles(estimator, dtype):
    assert_right(estimator, of_dtype(RAGGED, dtype))


@FEW
@given(
    case=problems(reduction="mean", budget=1.0), dtype=st.sampled_from(DTYPES), estimator=st.sampled_from([*REGISTRY])
)
def test_any_problem(case, dtype, estimator):
    """Layouts, strides, needed gradients, scales, clips: what the other backends are held to."""
    assert_right(estimator, of_dtype(case, dtype))


@FEW
@given(case=problems(reduction="none", budget=1.0), dtype=st.sampled_from(DTYPES))
@pytest.mark.parametrize("estimator", ["infonce", "jsd"])
def test_no_reduction(estimator, case, dtype):
    assert_right(estimator, of_dtype(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", REGISTRY)
def test_soft_clip(estimator, dtype):
    assert_right(estimator, of_dtype(varied(RAGGED, N=6, clip=1.5, scale=0.3), dtype))


@pytest.mark.parametrize("estimator", REGISTRY)
def test_without_gradients(estimator):
    case = of_dtype(RAGGED, BF16)
    with torch.no_grad():
        l, m, scale = case.tensors()
        got = loss_of(estimator, l, m, scale=scale, backend="cuda")
        oracle = loss_of(estimator, l.double(), m.double(), scale=scale.double(), backend="reference")
    torch.testing.assert_close(got.double(), oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("estimator", ["infonce", "dv", "jsd", "x2", "w1"])
@pytest.mark.parametrize("spread", [3.0, 100.0])
def test_extreme_scores(estimator, dtype, spread):
    """Panels whose maxima are far apart are brought to their row's reference; scores reach thousands."""
    l, m, _ = of_dtype(varied(RAGGED, scale=1.0), dtype).tensors()
    grow = torch.linspace(0.05, 1.0, RAGGED.N, dtype=F64)[torch.randperm(RAGGED.N, generator=torch.Generator())]
    l = (l.detach().double() * spread**0.5 * grow[:, None, None]).to(dtype).requires_grad_()
    m = (m.detach().double() * spread**0.5).to(dtype).requires_grad_()
    ours = torch.autograd.grad(loss_of(estimator, l, m, backend="cuda"), (l, m))
    wide = [x.detach().double().requires_grad_() for x in (l, m)]
    oracle = torch.autograd.grad(loss_of(estimator, *wide, backend="reference"), wide)
    for got, expected in zip(ours, oracle, strict=True):
        rounding = 4 * torch.finfo(dtype).eps
        assert float((got.double() - expected).norm()) <= rounding * float(expected.norm())


def test_the_weights_of_float16_neither_overflow_nor_vanish():
    """KL's weights reach e^15 in one image's panel and e^-15 in another's; their sum counts both."""
    case = of_dtype(Case(N=6, L=70, K=8, scale=1.0), F16)
    l, m, _ = case.tensors()
    with torch.no_grad():
        m[:] = 1.0
        l[:] = 2.0 * torch.arange(6)[:, None, None] / 5 - 0.2
    l, m = l.detach().requires_grad_(), m.detach().requires_grad_()
    ours = torch.autograd.grad(loss_of("kl", l, m, backend="cuda"), (l, m))
    wide = [x.detach().double().requires_grad_() for x in (l, m)]
    for got, expected in zip(ours, torch.autograd.grad(loss_of("kl", *wide, backend="reference"), wide), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=4e-3, atol=1e-7)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("estimator", REGISTRY)
def test_no_number_stays_none(estimator, bad):
    l, m, scale = of_dtype(RAGGED, BF16).tensors()
    with torch.no_grad():
        l[3, 5, 7] = bad
    loss = loss_of(estimator, l, m, scale=scale, backend="cuda")
    assert not bool(loss.isfinite())


def test_deterministic():
    runs = [served("infonce", of_dtype(RAGGED, BF16)) for _ in range(2)]
    assert torch.equal(runs[0].loss, runs[1].loss)
    assert all(torch.equal(runs[0].grads[name], runs[1].grads[name]) for name in "lms")


@pytest.mark.parametrize("estimator", REGISTRY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launches(estimator, dtype):
    """A small problem is dominated by launches: forward and backward together take no more than eight."""
    # one launch is the scale's, one a copy: these local features are no matrix of 16-byte rows
    l, m, _ = of_dtype(varied(RAGGED, l_layout="NKL", m_layout="NK", P=1), dtype).tensors()
    with Launches() as launches:
        loss = loss_of(estimator, l, m, scale=0.08, backend="cuda")
        torch.autograd.grad(loss, (l, m), torch.tensor(0.7))
    assert len(launches.names) <= 8, launches.names


@pytest.mark.parametrize(
    ("estimator", "reduction"), [("infonce", "mean"), ("dv", "mean"), ("jsd", "mean"), ("jsd", "none")]
)
def test_nothing_waits_for_the_host(estimator, reduction, monkeypatch):
    """No number of a tensor is read by the host, which a CUDA graph could not capture."""
    monkeypatch.setattr(ops, "_is_one", lambda number: False)  # it reads a CPU's numbers only, and these are a GPU's
    for dtype in DTYPES:
        l, m, scale = of_dtype(RAGGED, dtype).tensors()
        with NothingWaits() as ran:
            loss = loss_of(estimator, l, m, scale=scale, reduction=reduction, backend="cuda")
            torch.autograd.grad(loss, (l, m, scale), torch.full_like(loss, 0.7))
        if reduction == "mean":
            assert {"dimkern_cuda::weigh", "dimkern_cuda::chain"} <= {*ran.names}


def test_autocast_rounds_nothing():
    """Equal to the last bit: the products of kept weights are not cast, nor float32 scores."""
    for dtype in DTYPES:
        outside = served("infonce", of_dtype(RAGGED, dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = served("infonce", of_dtype(RAGGED, dtype))
        torch.testing.assert_close((inside.loss, inside.grads), (outside.loss, outside.grads), rtol=0, atol=0)


def test_every_launch_is_on_the_current_stream_of_a_tensors_device():
    """As it is written: `Current` sets the device and asks for its stream, and lives until the launch is made."""
    launches = re.findall(r"gpu::launch\((.*?)\);", (KERNELS / "ops.cu").read_text(), re.DOTALL)
    assert len(launches) == 4
    assert all(re.search(r"Current\(\w+\)\.stream, \w+$", launch) for launch in launches)


def test_reasons():
    l, m = torch.randn(4, 6, 3), torch.randn(4, 6)
    reasons = {
        "float64": (l.double(), m.double()),
        "one dtype": (l.bfloat16(), m),
        "tf32": (l, m),
    }
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    for reason, tensors in reasons.items():
        with pytest.raises(ValueError, match=f"backend is 'cuda': .*{reason}"):
            dimkern.infonce_loss(*tensors, backend="cuda")
        assert "not cuda: " in dimkern.explain(*tensors)
        assert dimkern.infonce_loss(*tensors).isfinite()  # by another backend
    with dimkern.config(memory_budget=100), pytest.raises(ValueError, match="as a whole"):
        dimkern.infonce_loss(l.bfloat16(), m.bfloat16(), backend="cuda")


def test_auto_leaves_large_batches_to_others():
    small, large = (Case(N=n, L=2, K=16, l_dtype=BF16, m_dtype=BF16).problem("infonce") for n in (512, 513))
    assert plan_for(small, 1 << 30, "auto").backend == "cuda"
    assert plan_for(large, 1 << 30, "auto").backend != "cuda"
    assert plan_for(large, 1 << 30, "cuda").backend == "cuda"
