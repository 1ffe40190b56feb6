"""Faults planted in kernels/cuda, and which check finds each: a meta-test of the other tests of these kernels.

The sources are changed as text, compiled by g++ on the emulation and run by simulator/cuda_host/test_kernels.cpp:
against sums in double, or under a sanitizer, where a CUDA thread is a std::thread. What is changed in the PTX runs in
the simulator.
"""

import re
import shutil
import subprocess

import pytest
from oracle import BF16, Case
from simulator import SimulationError, find_nvcc
from simulator.cuda_host.library import KERNELS, ROOT, assert_right, gxx, on_cpu_tensors

TEST = ROOT / "tests/simulator/cuda_host/test_kernels.cpp"
THREADS = ["-DDK_THREADS", "-pthread", "-O1"]
FLAGS = {
    "double": [],
    "thread": [*THREADS, "-fsanitize=thread"],
    "address": [*THREADS, "-fsanitize=address", "-fno-sanitize-recover=all"],
}
# file, what stands there (the n-th time), what is put there, and the check that finds it; None: nothing does
PLANTED = {
    "a dropped barrier before a stage is read": ("weigh.cuh", "sync_block();  // the line", 0, "//", "thread"),
    "a dropped barrier between two reductions": ("reduce.cuh", "sync_block();  // the next", 0, "//", "thread"),
    "a weakened wait": ("weigh.cuh", "wait_async<kStages - 2>", 0, "wait_async<kStages - 1>", "double"),
    "a removed mask of columns": ("weigh.cuh", "w.M - col0 < kCols ? w.M - col0 : kCols", 0, "kCols", "double"),
    "a removed mask of rows that are loaded": ("weigh.cuh", "first + row < count &&", 0, "count > 0 &&", "address"),
    "a removed mask of columns that are stored": ("weigh.cuh", "rows[i] && col < w.keep_row", 0, "rows[i]", "double"),
    "own-image pairs among the negatives": ("weigh.cuh", "(w.row0 + row) / w.P * w.L", 0, "w.L", "double"),
    "a wrong stride": ("weigh.cuh", "(first + row) * stride", 0, "(first + row) * (stride + 1)", "double"),
    "a wrong swizzle": ("weigh.cuh", "(chunk ^ (row & 7))", 0, "(chunk ^ (row & 3))", None),
    "panels that keep their own reference": ("finish.cuh", "if (gain != 1.0f)", 0, "if (gain > 1e30f)", "double"),
}


def outcome(name, sanitizer, folder, planted=None, only="infonce"):
    """The run of the kernels' test, of sources with a fault."""
    shutil.copytree(KERNELS, folder, dirs_exist_ok=True)
    if planted:
        file, found, n, instead, _ = planted
        parts = (folder / file).read_text().split(found)
        assert len(parts) > n + 1, f"{file} has no {found!r}"
        (folder / file).write_text(found.join(parts[: n + 1]) + instead + found.join(parts[n + 1 :]))
    program = gxx(folder / f"{name}_{sanitizer}", TEST, *FLAGS[sanitizer], kernels=folder)
    return subprocess.run([program, only], capture_output=True, text=True)


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_without_faults(sanitizer, tmp_path):
    run = outcome("sound", sanitizer, tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("fault", PLANTED)
def test_planted(fault, tmp_path):
    planted = PLANTED[fault]
    check = planted[-1] or "double"
    run = outcome("faulty", check, tmp_path, planted)
    assert (run.returncode != 0) == (planted[-1] is not None), run.stdout + run.stderr
    if check != "double":
        assert "Sanitizer" in run.stderr


# in the PTX: a pattern, the n-th time it occurs, and what is put there
PTX_FAULTS = {
    "a dropped barrier": (r"bar\.sync\s+0;", 0, ""),
    "a weakened wait": (r"cp\.async\.wait_group 1;", 0, "cp.async.wait_group 2;"),
    "an operand read from another register": (r"(mma\.sync\S+ \{[^}]*\}, \{)(%r\d+), (%r\d+)", 3, r"\1\3, \2"),
}


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("fault", PTX_FAULTS)
def test_planted_in_the_ptx(fault):
    from simulator.cuda_host.ptx import executed

    pattern, n, instead = PTX_FAULTS[fault]

    def change(ptx):
        places = list(re.finditer(pattern, ptx))
        if "mma.sync" not in ptx:
            return ptx
        place = places[n]
        return ptx[: place.start()] + place.expand(instead) + ptx[place.end() :]

    case = Case(N=4, L=20, K=200, scale=0.05, l_dtype=BF16, m_dtype=BF16, l_layout="transposed", m_layout="NK")
    with on_cpu_tensors(), pytest.raises((SimulationError, AssertionError)), executed("80", change):
        assert_right("infonce", case)
