"""nvcc's PTX of kernels/cuda, executed end to end: the public API with backend="cuda", loss and gradients, in float64.

The ops and their launches are the shipped ones (simulator/cuda_host/library.py); each launch runs in the simulator,
which checks bounds, races and asynchronous copies.
"""

import pytest

pytest.importorskip("triton", reason="needs Triton's ptxas")  # with the gates on resources beside it

import torch
from oracle import BF16, F16, F32, Case, loss_of, varied
from simulator.cuda_host.library import assert_right, on_cpu_tensors
from simulator.cuda_host.ptx import executed

from dimkern.estimators import REGISTRY

DTYPES = (BF16, F16, F32)
# two tiles of rows and three panels, both ragged; K ends within a line
RAGGED = Case(N=11, P=6, L=12, K=72, scale=0.08, l_layout="transposed", m_layout="NPK", clip=None)
EVEN = Case(N=64, P=1, L=2, K=64, scale=0.1, l_layout="transposed", m_layout="NK")


@pytest.fixture(autouse=True)
def cuda_on_cpu_tensors():
    with on_cpu_tensors():
        yield


def check(architecture, estimator, case, dtype):
    with executed(architecture) as launches:
        assert_right(estimator, varied(case, l_dtype=dtype, m_dtype=dtype))
    assert [kernel for kernel, _ in launches] == ["weigh", "finish", "settle", "chain"]
    assert launches[0][1]["products"] > 0


# one of each family in every dtype, the other rows of the registry in one
FAMILIES = {row.family: name for name, row in reversed(REGISTRY.items())}
CASES = [(name, dtype) for name in FAMILIES.values() for dtype in DTYPES]
CASES += [(name, DTYPES[n % 3]) for n, name in enumerate(REGISTRY) if name not in FAMILIES.values()]


@pytest.mark.parametrize(("estimator", "dtype"), CASES, ids=str)
def test_ragged_sizes(estimator, dtype):
    check("80", estimator, RAGGED, dtype)


@pytest.mark.parametrize(("estimator", "dtype"), [("infonce", BF16), ("jsd", F16)], ids=str)
def test_even_sizes(estimator, dtype):
    check("80", estimator, EVEN, dtype)


@pytest.mark.parametrize(("estimator", "dtype"), [("infonce", BF16), ("jsd", F32), ("dv", F16)], ids=str)
def test_soft_clip_on_hopper(estimator, dtype):
    check("90a", estimator, varied(RAGGED, clip=1.5, scale=0.2), dtype)


@pytest.mark.parametrize("estimator", ["infonce", "jsd"])
def test_statistics_only(estimator):
    l, m, scale = varied(RAGGED, l_dtype=BF16, m_dtype=BF16).tensors()
    with executed("90a") as launches, torch.no_grad():
        loss = loss_of(estimator, l, m, scale=scale, backend="cuda")
    oracle = loss_of(estimator, l.double(), m.double(), scale=scale.double(), backend="reference")
    torch.testing.assert_close(loss.double(), oracle.detach(), rtol=1e-5, atol=1e-6)
    assert [kernel for kernel, _ in launches] == ["weigh", "finish", "settle"]
