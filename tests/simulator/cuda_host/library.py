"""kernels/cuda without a GPU: its ops for CPU tensors, each launch run by g++'s code or by the PTX simulator.

The ops are the shipped ones, compiled by g++ on emulation.h. A launch runs the kernel as g++ compiled it, a fiber for
each CUDA thread, or hands its name and parameters to a launcher, which runs nvcc's PTX of the same kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from oracle import Case, Run, _differentiate, assert_within_budget, loss_of
from torch.utils._python_dispatch import TorchDispatchMode

from dimkern import ops, plan

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "cuda_host"
KERNELS = ROOT / "kernels" / "cuda"
TORCH = Path(torch.__path__[0])
TORCH_FLAGS = [
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    f"-I{TORCH / 'include'}",
    f"-I{TORCH / 'include/torch/csrc/api/include'}",
]
NVCC_FLAGS = ["-std=c++20", "-O3", "-prec-div=false"]  # CMakeLists.txt's
LAUNCHER = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_ubyte)
)


def gxx(output: Path, source: Path, *flags: str, kernels: Path = KERNELS) -> Path:
    """Compiles a source on the emulation, where it is newer than the output."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    command = ["g++", "-x", "c++", "-std=c++20", "-O2", "-g1", "-DDK_HOST", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", f"-I{ROOT / 'kernels/include'}", f"-I{kernels}", f"-I{Path(__file__).parent}"]
    return _compiled(output, [*command, str(source), "-o", str(output), *flags, "-ldl"], kernels)


def nvcc(output: Path, architecture: str, *flags: str) -> Path:
    """Compiles the shipped ops for one architecture."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    command = ["nvcc", *NVCC_FLAGS, f"-arch=sm_{architecture}", *flags, *TORCH_FLAGS, f"-I{ROOT / 'kernels/include'}"]
    return _compiled(output, [*command, str(KERNELS / "ops.cu"), "-o", str(output)], KERNELS)


def _compiled(output: Path, command: list[str], kernels: Path) -> Path:
    folders = kernels, ROOT / "kernels/include/dimkern", Path(__file__).parent
    newest = max(file.stat().st_mtime for folder in folders for file in folder.iterdir() if file.is_file())
    output.parent.mkdir(parents=True, exist_ok=True)
    with _locked(output.with_suffix(".lock")):  # the workers of pytest-xdist share the folder
        if not output.exists() or output.stat().st_mtime < newest:
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return output


@contextlib.contextmanager
def _locked(path: Path):
    fcntl = pytest.importorskip("fcntl")
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """The ops for CPU tensors; and what only CUDA has of torch's own, the products of half types left in float32."""
    loaded = hasattr(torch.ops.dimkern_cuda, "weigh")  # the schemas, by the installed library
    library = gxx(
        BUILD / f"libdimkern_cuda_host{'_impl' * loaded}.so",
        KERNELS / "ops.cu",
        "-shared",
        "-fPIC",
        *["-DDK_SCHEMAS_LOADED"] * loaded,
        *(flag.replace("-I", "-isystem") for flag in TORCH_FLAGS),
        f"-L{TORCH / 'lib'}",
        "-ltorch_cpu",
    )
    torch.ops.load_library(str(library))
    _ATEN.impl("mm.dtype_out", lambda a, b, dtype, *, out: out.copy_(a.to(dtype) @ b.to(dtype)), "CPU")
    return ctypes.CDLL(str(library))


_ATEN = torch.library.Library("aten", "IMPL")


@contextlib.contextmanager
def on_cpu_tensors():
    """Lets backend="cuda" take CPU tensors, and products of float32 be tf32."""
    load()
    reason, precision = plan.why_not_cuda, torch.backends.cuda.matmul.fp32_precision
    plan.why_not_cuda = lambda device: None
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        plan.why_not_cuda, torch.backends.cuda.matmul.fp32_precision = reason, precision


def served(estimator: str, case: Case) -> Run:
    """Loss and gradients by the CUDA backend; what its float32 scores, weights and tf32 products may round."""
    l, m, scale = case.tensors()
    keywords = {"scale": scale, "clip": case.clip, "reduction": case.reduction}
    loss = loss_of(estimator, l, m, case.self_mask, backend="cuda", **keywords)
    run = _differentiate(case, loss, (l, m, scale))
    if case.l_dtype == torch.float32:
        run.scores_rounding = 2.0**-12
    else:
        run.rounding = 2 * torch.finfo(case.l_dtype).eps  # three times half a unit: weights, again if moved, summaries
    return run


def assert_right(estimator: str, case: Case) -> None:
    assert_within_budget(estimator, case, served(estimator, case))


class Launches(TorchDispatchMode):
    """Names of the ops that launch a kernel on a GPU: all but views and fresh memory."""

    QUIET = re.compile(
        "view|_unsafe_view|_reshape_alias|detach|alias|expand|permute|transpose|t|unsqueeze|squeeze|slice|select"
        "|as_strided|unflatten|empty|new_empty|empty_like|empty_strided|lift_fresh"
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func.name().removesuffix(".default").split("::")
        if space == "dimkern":  # a composite: what it calls counts
            with self:
                return getattr(ops, f"_{name}")(*args, **(kwargs or {}))
        if func._can_decompose():
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if space != "dimkern_cpu" and not self.QUIET.fullmatch(name.split(".")[0]):
            self.names.append(f"{space}::{name}")
        return func(*args, **(kwargs or {}))
