"""Small Triton kernels, compiled for sm_80 and sm_90 and executed, against float64."""

import pytest

pytest.importorskip("triton", reason="needs Triton (its compiler runs without a GPU)")

import torch
from problem import Problem, run_row_sums
from simulator import simulated

# relative error of a sum of exponentials: the inputs are exact, TF32 rounds them to 11 bits
TOLERANCE = {torch.bfloat16: 2e-6, torch.float16: 2e-6, torch.float32: 2e-6, "tf32": 4e-3}
CASES = [(arch, form) for arch, forms in ((80, ["pointers"]), (90, ["pointers", "tma", "device"])) for form in forms]
SHAPES = [(64, 4, 128), (37, 7, 56)]


DTYPES = [torch.bfloat16, torch.float16, "tf32"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("arch", "form", "dtype"),
    # float32 proper has no tensor cores
    [(*case, dtype) for case in CASES for dtype in DTYPES + [torch.float32] * (case[1] == "pointers")],
    ids=str,
)
def test_row_sums(arch, form, dtype, shape):
    problem = Problem(*shape, dtype=torch.float32 if dtype == "tf32" else dtype)
    precision = "tf32" if dtype == "tf32" else "ieee"
    with simulated(arch) as gpu:
        sums, _ = run_row_sums(problem, form, tile=(64, 64, 32), precision=precision, num_warps=4)
    expected = problem.weights().sum(1)
    assert ((sums.double().sum(0) - expected) / expected).abs().max() <= TOLERANCE[dtype]
    ptx = gpu.launches[-1].kernel.asm["ptx"]
    on_tensor_cores = "wgmma.mma_async" in ptx if arch == 90 else "mma.sync" in ptx
    assert on_tensor_cores == (dtype is not torch.float32)
    assert ("cp.async.bulk.tensor" in ptx) == (form != "pointers")


@pytest.mark.parametrize(("arch", "form"), CASES)
def test_emitted_weights_at_ragged_sizes(arch, form):
    problem = Problem(40, 8, 72)  # TMA wants rows of whole 16 bytes
    with simulated(arch):
        _, weights = run_row_sums(problem, form, emit=True, num_warps=4)
    expected = problem.weights()
    # one rounding to bfloat16
    assert ((weights.double() - expected).abs() <= 2.0**-8 * expected + 1e-6).all()


@pytest.mark.parametrize(("arch", "form", "warps"), [(80, "pointers", 8), (90, "pointers", 4), (90, "tma", 8)])
def test_large_tiles_and_deep_pipelines(arch, form, warps):
    problem = Problem(128, 4, 320)
    with simulated(arch) as gpu:
        sums, _ = run_row_sums(problem, form, tile=(128, 128, 64), num_warps=warps, num_stages=3)
    expected = problem.weights().sum(1)
    assert ((sums.double().sum(0) - expected) / expected).abs().max() <= 2e-6
    assert gpu.launches[-1].counts["products"] > 0
