"""One thread, and memory that nobody wrote is NaN: a result that reads it cannot pass for a right one."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

# a thread that waits must not spin where others need its core; read when torch loads OpenMP
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# the native library's own fresh tensors are NaN, as torch.empty's are below
os.environ["DIMKERN_POISON"] = "1"

import torch


def pytest_configure(config):
    # these tests pass without the native library too; that it warns is a test of its own
    config.addinivalue_line("filterwarnings", "ignore:the native CPU library:UserWarning")
    torch.set_num_threads(1)  # pytest-xdist is the parallelism


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """Every torch.empty of a core test is filled with NaN (the training tests set their own determinism)."""
    if request.module.__name__.rpartition(".")[2].startswith("test_train"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="session")
def native_tests():
    """Builds a target of the native tests in build/tests, incrementally; returns its executable."""
    if not (shutil.which("cmake") and (shutil.which("c++") or shutil.which("g++"))):
        pytest.skip("needs cmake and a C++ compiler")
    root = Path(__file__).resolve().parent.parent
    build = root / "build" / "tests"
    build.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja"] if shutil.which("ninja") and not (build / "CMakeCache.txt").exists() else []

    def executable(target):
        with _locked(build / "lock"):  # the workers of pytest-xdist share the folder
            for command in (["-S", root, "-B", build, *generator], ["--build", build, "--target", target]):
                done = subprocess.run(["cmake", *command], capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr
        return build / target

    return executable


@contextlib.contextmanager
def _locked(path):
    fcntl = pytest.importorskip("fcntl")
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
