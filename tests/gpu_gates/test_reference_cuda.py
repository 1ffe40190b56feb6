"""A small CUDA C++ kernel, compiled by nvcc for sm_80 and sm_90a and executed, against float64; its resources."""

import pytest
from simulator import find_nvcc, gate, of_ptx

if find_nvcc() is None:
    pytest.skip("nvcc is not installed: pip install nvidia-cuda-nvcc", allow_module_level=True)

import cuda_problem
from problem import Problem


@pytest.mark.parametrize("shape", [(64, 4, 128), (37, 7, 56), (100, 3, 200)], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_row_sums(arch, shape):
    problem = Problem(*shape)
    sums, counts = cuda_problem.run_row_sums(problem, cuda_problem.ptx_of(arch))
    expected = problem.weights().sum(1)
    assert ((sums.double().sum(0) - expected) / expected).abs().max() <= 2e-6
    assert counts["products"] > 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_resources(arch):
    pytest.importorskip("triton", reason="its package carries nvdisasm")
    ptx = cuda_problem.ptx_of(arch)
    r = of_ptx(ptx, int(arch[3:5]), cuda_problem.THREADS // 32, cuda_problem.SHARED_BYTES, "reference")
    assert gate(r, blocks_per_sm=4) == (True, "")
    assert r.loop["HMMA"] == 16  # 8 column blocks, 2 steps of 16 channels
    assert r.loop["LDGSTS"] >= 4
