"""Faults planted in compiled kernels, and the check that catches each; the last table is what no check catches."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="needs Triton (its compiler runs without a GPU)")

import cuda_problem
import reference_kernels
import torch
from oracle import BF16, Case
from problem import Problem, run_row_sums
from simulator import Hazard, OutOfBounds, Race, SimulationError, find_nvcc, simulated
from simulator.errors import Deadlock
from triton_losses import check, force

from dimkern.backends.triton import flash_kernel, flash_tiles

RAGGED = Problem(70, 5, 208)  # ragged in rows, columns and channels: a missing mask shows only there


def replace(pattern: str, by: str, number: int | None = None):
    """Replaces one match of the pattern, or all of them; a fault that changes nothing is an error."""

    def mutate(ptx: str) -> str:
        matches = list(re.finditer(pattern, ptx, re.S))
        chosen = matches if number is None else [matches[number]]
        assert chosen, f"{pattern!r} is not in the PTX: this fault plants nothing"
        for match in reversed(chosen):
            ptx = ptx[: match.start()] + match.expand(by) + ptx[match.end() :]
        return ptx

    return mutate


def in_loop(pattern: str):
    """Drops every match between the loop's wait for the tensor cores and the loop's end."""

    def mutate(ptx: str) -> str:
        loop = re.search(r"wgmma\.wait_group\.sync\.aligned 1;.*?@%p\d+ bra", ptx, re.S)
        changed, count = re.subn(pattern, "", loop[0])
        assert count, f"{pattern!r} is not in the loop"
        return ptx.replace(loop[0], changed)

    return mutate


def outcome(arch: int, form: str, mutate) -> str:
    """The class of the error, or "wrong" or "right" as the numbers are."""
    try:
        with simulated(arch, mutate=mutate):
            sums, _ = run_row_sums(RAGGED, form, num_warps=4, num_stages=3)
    except SimulationError as error:
        return type(error).__name__
    return _judge(sums)


def _judge(sums) -> str:
    expected = RAGGED.weights().sum(1)
    error = ((sums.double().sum(0) - expected) / expected).abs().max()
    return "right" if error <= 2e-6 else "wrong"  # NaN is wrong


BARRIER = r"bar\.sync\s+0;"
MASKED_COPY = r"(cp\.async\.cg[^;]*), (?:0x10|16), %r\d+;"
CAUGHT = {
    # architecture, form, the fault, what it is caught by
    "a barrier before ldmatrix": (80, "pointers", replace(BARRIER, "", 1), Race),
    "a barrier before the next stage": (80, "pointers", replace(BARRIER, "", 2), Race),
    "a barrier of the row sums": (80, "pointers", replace(BARRIER, "", 4), Race),
    "cp.async wait weakened": (
        80,
        "pointers",
        replace(r"cp\.async\.wait_group\s+\w+;", "cp.async.wait_group 6;", 0),
        "wrong",
    ),
    "cp.async commit dropped": (80, "pointers", replace(r"cp\.async\.commit_group;", "", 1), "wrong"),
    "mask of a copy removed": (80, "pointers", replace(MASKED_COPY, r"\1, 16;", 0), OutOfBounds),
    "mask of a store removed": (80, "pointers", replace(r"@%p\d+ st\.global", "st.global"), OutOfBounds),
    "wrong row of a fragment": (
        80,
        "pointers",
        replace(r"(ldmatrix[^;]*\}, \[%r\d+)(?:\+\d+)?\]", r"\1+128]", 1),
        "wrong",
    ),
    "a barrier before wgmma": (90, "pointers", replace(BARRIER, "", 1), Race),
    "a barrier after wgmma": (90, "pointers", replace(BARRIER, "", 2), Race),
    "proxy fence dropped": (90, "pointers", replace(r"fence\.proxy\.async\.shared::cta;", ""), Race),
    "wgmma wait weakened, cp.async": (
        90,
        "pointers",
        replace(r"wait_group\.sync\.aligned 1;", "wait_group.sync.aligned 2;"),
        Hazard,
    ),
    "wgmma wait weakened, TMA": (
        90,
        "tma",
        replace(r"wait_group\.sync\.aligned 1;", "wait_group.sync.aligned 2;"),
        Hazard,
    ),
    "last wgmma wait weakened": (
        90,
        "tma",
        replace(r"wait_group\.sync\.aligned 0;", "wait_group.sync.aligned 1;"),
        Hazard,
    ),
    "barriers between wgmma and TMA": (90, "tma", in_loop(BARRIER), Race),
    "every barrier": (90, "tma", replace(BARRIER, ""), Race),
    "mbarrier wait dropped": (
        90,
        "tma",
        replace(r"mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;", ""),
        SimulationError,
    ),
    "fewer bytes expected": (90, "tma", replace(r"(expect_tx[^;]*), \d+;", r"\1, 4096;", 0), Deadlock),
    "the box of a TMA load moved": (90, "tma", replace(r"(tensor\.2d[^;]*?\{)%r\d+, ", r"\g<1>8, ", 0), "wrong"),
    "mask of a store removed, TMA": (90, "tma", replace(r"@%p\d+ st\.global", "st.global"), OutOfBounds),
}

# what no check here catches: in the lockstep of this simulator these do no harm
NOT_CAUGHT = {
    "wgmma.fence dropped: the order of register writes before wgmma is not modelled": (
        90,
        "pointers",
        replace(r"wgmma\.fence\.sync\.aligned;", ""),
    ),
    "an mbarrier's wait tried once only: a wait here always succeeds or raises": (
        90,
        "tma",
        replace(r"@!complete bra\.uni waitLoop;", ""),
    ),
    "a barrier that another follows before anything is touched": (90, "tma", replace(BARRIER, "", 1)),
    "the mask of a store of replicated values: every thread has the same": (
        80,
        "pointers",
        replace(r"@%p\d+ st\.shared", "st.shared", 0),
    ),
}


@pytest.mark.parametrize("fault", CAUGHT)
def test_is_caught(fault):
    arch, form, mutate, by = CAUGHT[fault]
    assert outcome(arch, form, None) == "right"
    found = outcome(arch, form, mutate)
    assert found == by if isinstance(by, str) else found in {c.__name__ for c in (by, *by.__subclasses__())}


@pytest.mark.parametrize("fault", NOT_CAUGHT)
def test_is_known_not_to_be_caught(fault):
    """If one of these begins to be caught, say so: move it to the other table."""
    assert outcome(*NOT_CAUGHT[fault]) == "right"


@pytest.mark.parametrize("seed", [0, 1])
def test_an_atomic_turned_into_a_store(seed):
    x = torch.randn(100, 40, generator=torch.Generator().manual_seed(0))

    def run(mutate=None):
        out = torch.zeros(40)
        with simulated(80, mutate=mutate, seed=seed):
            reference_kernels.column_sums[(4,)](x, out, 100, 40, BR=32, BC=64, num_warps=1)
        return out

    torch.testing.assert_close(run().double(), x.double().sum(0), rtol=1e-5, atol=1e-5)
    with pytest.raises(Race):
        run(replace(r"(?:atom|red)\.(?:[\w.]*)add\.f32\s+(?:%r\d+, |_, )?", "st.global.b32 "))


@pytest.mark.parametrize("wrong", ["stride of the rows", "columns beyond the end"])
def test_wrong_sizes(wrong):
    problem = Problem(70, 5, 208)
    sums = torch.full((6, 70), torch.nan)
    columns = 350 + (wrong != "stride of the rows") * 8
    stride = 208 + (wrong == "stride of the rows") * 16
    with pytest.raises(OutOfBounds), simulated(80):
        reference_kernels.row_sums[(2, 6)](
            problem.g, problem.c, sums, None, 70, columns, stride, 5,
            BR=64, BC=64, BK=64, PRECISION="tf32", EMIT=False, num_warps=4,
        )  # fmt: skip


FLASH = Case(N=8, P=19, L=31, K=40, scale=0.3, l_dtype=BF16, m_dtype=BF16)  # two parts of the inner items, both ways
FLASH_ARGUMENTS = {"y_stride": 11, "out_stride": 13, "B": 18, "shift": 19, "span": 21}


def argument(name: str, change):
    """A launch with one argument changed."""
    at = FLASH_ARGUMENTS[name]
    return lambda grid, given: (grid, (*given[:at], change(given[at]), *given[at + 1 :]))


def of_gradient(mutate):
    """A fault in the PTX of the kernels that keep weights in registers, none in others'."""
    return lambda ptx: mutate(ptx) if re.search(r"\.entry gradient\b", ptx) else ptx


FLASH_CAUGHT = {
    # architecture, the launch, the PTX, what it is caught by: beyond the end of one part lies the next
    "own images are negatives": (80, argument("B", lambda B: 0), None, "wrong"),
    "own images are the next ones": (90, argument("shift", lambda shift: shift + 1), None, "wrong"),
    "stride of the inner items": (80, argument("y_stride", lambda stride: stride + 16), None, OutOfBounds),
    "stride of the gradient": (80, argument("out_stride", lambda stride: stride + 1), None, OutOfBounds),
    "parts that leave some out": (90, argument("span", lambda span: span - 64), None, "wrong"),
    "parts that are not made": (90, lambda grid, given: ((grid[0], 1), given), None, "wrong"),
    "mask of a store removed": (80, None, of_gradient(replace(r"@%p\d+ st\.global", "st.global")), Race),
    "every barrier": (80, None, of_gradient(replace(BARRIER, "")), Race),
    "wgmma wait weakened": (
        90,
        None,
        of_gradient(replace(r"wait_group\.sync\.aligned 0;", "wait_group.sync.aligned 1;")),
        Hazard,
    ),
}


@pytest.mark.parametrize("fault", FLASH_CAUGHT)
def test_is_caught_where_weights_stay_in_registers(fault, monkeypatch):
    arch, launch, mutate, by = FLASH_CAUGHT[fault]
    force(monkeypatch, FLASH, flash=True)
    if launch is not None:

        class Changed:
            def __getitem__(self, grid):
                def run(*given, **options):
                    changed, arguments = launch(grid, given)
                    flash_kernel.gradient[changed](*arguments, **options)

                return run

        monkeypatch.setattr(flash_tiles, "gradient", Changed())
    try:
        with simulated(arch, mutate=mutate):
            check("infonce", FLASH)
        found = "right"
    except AssertionError:
        found = "wrong"
    except SimulationError as error:
        found = type(error).__name__
    assert found in ({by} if isinstance(by, str) else {c.__name__ for c in (by, *by.__subclasses__())})


def test_nothing_is_planted_where_weights_stay_in_registers(monkeypatch):
    force(monkeypatch, FLASH, flash=True)
    for arch in (80, 90):
        with simulated(arch) as gpu:
            check("infonce", FLASH)
        assert {launch.grid[1] for launch in gpu.launches if launch.kernel.metadata.name == "gradient"} == {2}


CUDA_CAUGHT = {
    "the barrier": (replace(BARRIER, ""), Race),
    "cp.async wait weakened": (replace(r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;"), Race),
    "cp.async commit dropped": (replace(r"cp\.async\.commit_group;", "", 0), Race),
    "mask of a copy removed": (replace(r"(cp\.async\.cg[^;]*16), %r\d+;", r"\1, 16;"), SimulationError),
}


@pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed: pip install nvidia-cuda-nvcc")
@pytest.mark.parametrize("fault", CUDA_CAUGHT)
def test_is_caught_in_cuda(fault):
    mutate, by = CUDA_CAUGHT[fault]
    ptx = cuda_problem.ptx_of("sm_80")
    assert _judge(cuda_problem.run_row_sums(RAGGED, ptx)[0]) == "right"
    try:
        sums, _ = cuda_problem.run_row_sums(RAGGED, mutate(ptx))
    except by:
        return
    assert _judge(sums) == "wrong"
