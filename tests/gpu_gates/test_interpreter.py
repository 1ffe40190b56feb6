"""The mended interpreter: right in every dtype and order of programs, and it sees planted faults."""

import pytest

pytest.importorskip("triton", reason="needs Triton (its interpreter runs without a GPU)")

import reference_kernels
import torch
import triton
import triton.language as tl
from oracle import BF16, Case, reductions, varied
from problem import Problem, run_row_sums
from simulator import interpreted, simulated
from triton.runtime.errors import InterpreterError
from triton_losses import check, force

from dimkern.estimators import REGISTRY


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("pointers", torch.bfloat16),
        ("pointers", torch.float16),
        ("pointers", torch.float32),
        ("tma", torch.bfloat16),
        ("tma", torch.float16),
    ],
    ids=str,
)
def test_row_sums(form, dtype, seed):
    problem = Problem(37, 7, 56, dtype=dtype)
    with interpreted(seed):
        sums, weights = run_row_sums(problem, form, tile=(32, 64, 32), precision="ieee", emit=True)
    expected = problem.weights()
    assert ((sums.double().sum(0) - expected.sum(1)) / expected.sum(1)).abs().max() <= 2e-6
    # one rounding to the dtype, and the error of exp itself
    assert ((weights.double() - expected).abs() <= (torch.finfo(dtype).eps + 2e-6) * expected + 1e-6).all()


def test_tf32_is_rounded():
    problem = Problem(37, 7, 56, dtype=torch.float32)
    with interpreted():
        sums, _ = run_row_sums(problem, "pointers", tile=(32, 64, 32), precision="tf32")
    expected = problem.weights().sum(1)
    assert 1e-6 < ((sums.double().sum(0) - expected) / expected).abs().max() < 4e-3


@pytest.mark.parametrize(("seed", "flash"), [(0, False), (1, False), (0, True)], ids=str)
@pytest.mark.parametrize("estimator", REGISTRY)
def test_the_public_losses(estimator, seed, flash, monkeypatch):
    """No program of any kernel races with another, whatever their order; the driver only answers for the device."""
    case = Case(N=7, P=3, L=21, K=40, scale=0.3, l_dtype=BF16, m_dtype=BF16)
    with simulated(90) as gpu, interpreted(seed):
        for reduction in reductions(estimator):
            small = varied(case, reduction=reduction)
            force(monkeypatch, small, few_launches=not flash and reduction != "none" and estimator != "dv", flash=flash)
            check(estimator, small)
            monkeypatch.undo()
    assert not gpu.launches


def test_atomics_in_any_order():
    x, out = torch.randn(100, 40), torch.zeros(40)
    with interpreted(3):
        reference_kernels.column_sums[(4,)](x, out, 100, 40, BR=32, BC=64)
    torch.testing.assert_close(out, x.sum(0), rtol=1e-5, atol=1e-5)


def test_the_compiler_is_back_afterwards():
    problem = Problem(32, 4, 32)
    with interpreted():
        first, _ = run_row_sums(problem, "pointers", tile=(32, 64, 32))
    with simulated(80) as gpu:
        second, _ = run_row_sums(problem, "pointers", tile=(32, 64, 32))
    assert len(gpu.launches) == 1
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@triton.jit
def _faulty(x, y, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if FAULT == "no mask":
        tl.store(y + here, tl.load(x + here))
    if FAULT == "every program writes the same":
        tl.store(y + tl.arange(0, BLOCK), tl.load(x + here, mask=here < n))
    if FAULT == "an address twice":
        tl.store(y + here // 2, tl.load(x + here, mask=here < n), mask=here < n)
    if FAULT == "reads what another writes":
        tl.store(y + here, tl.load(y + (here + BLOCK) % n, mask=here < n), mask=here < n)


@pytest.mark.parametrize(
    ("fault", "caught"),
    [
        ("no mask", "OutOfBounds"),
        ("every program writes the same", "Race"),
        ("an address twice", "Race"),
        ("reads what another writes", "Race"),
    ],
)
def test_planted_faults(fault, caught):
    x, y = torch.randn(100), torch.zeros(100)
    with pytest.raises(InterpreterError, match=caught), interpreted():
        _faulty[(2,)](x, y, 100, FAULT=fault, BLOCK=64)
