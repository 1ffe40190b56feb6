"""What nvcc makes of kernels/cuda: resources of every kernel, and a library that loads where there is no CUDA."""

import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton's ptxas and nvdisasm")

import torch
from simulator import find_nvcc, gate, of_ptx, table
from simulator.cuda_host.library import BUILD, ROOT
from simulator.cuda_host.ptx import entries

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")

WARPS = 4
# dynamic shared memory, and the blocks that an SM is to hold: of sm_80, of sm_90
KERNELS = {
    "weigh": (49152, {80: 3, 90: 3}),
    "finish": (16, {80: 7, 90: 7}),
    "settle": (16, {80: 8, 90: 8}),
    "chain": (16, {80: 8, 90: 8}),
}


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_resources(architecture, capsys):
    """No spills; tensor cores and cp.async in the innermost loop; as many blocks on an SM as intended."""
    chip, rows, failures = int(architecture[:2]), [], []
    for name, ptx in sorted(entries(architecture).items()):
        kernel = next(kernel for kernel in KERNELS if str(len(kernel)) + kernel in name)
        shared, blocks = KERNELS[kernel]
        label = name.removeprefix("_ZN7dimkern3gpu").split("EEE")[0]
        # by Triton's ptxas, beside which is the disassembler; it may not know what nvcc's newest version is called
        ptx = re.sub(r"^\.version .*$", ".version 8.5", ptx, count=1, flags=re.M)
        resources = of_ptx(ptx, chip, WARPS, shared, label)
        ok, reason = gate(resources, blocks_per_sm=blocks[chip], tensor_core=kernel == "weigh")
        if kernel == "weigh" and not (resources.loop.get("LDGSTS") and resources.loop.get("LDSM")):
            ok, reason = False, f"no cp.async or ldmatrix in the innermost loop, which has {resources.loop}"
        rows.append(resources)
        failures += [] if ok else [f"{label}: {reason}"]
    with capsys.disabled():
        print("\n" + table(rows))
    assert not failures, "\n".join(failures)
    assert len(rows) == 2 * 3 * 9 + 1 + 3


def test_the_library_builds_against_this_torch_and_loads():
    """By CMake, as setup.py has it; in a torch without CUDA its ops are there and say why they cannot run."""
    build = BUILD / "extension"
    options = [f"-DTORCH_DIR={torch.__path__[0]}", "-DDIMKERN_BUILD_TESTS=OFF", "-DDIMKERN_CUDA=ON"]
    compiler = f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"
    for command in (["-S", ROOT, "-B", build, *options, compiler], ["--build", build, "--target", "dimkern_cuda"]):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    script = f"""
import torch
if not hasattr(torch.ops.dimkern_cuda, "weigh"):
    torch.ops.load_library({str(build / "libdimkern_cuda.so")!r})
print(torch.ops.dimkern_cuda.weigh.default._schema)
print(torch.ops.dimkern_cuda.why_not.default())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    schema, reason = done.stdout.splitlines()
    assert schema.startswith("dimkern_cuda::weigh(Tensor g, Tensor c")
    if not torch.cuda.is_available():
        assert reason == "this build of torch has no CUDA" or "driver" in reason
