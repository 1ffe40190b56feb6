"""CUDA C++ to PTX, where nvcc is installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path


@cache
def find() -> str | None:
    """nvcc of $CUDA_HOME, of PATH, or of the `nvidia-cuda-nvcc` package."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home, "bin/nvcc")] if home else []
    if found := shutil.which("nvcc"):
        candidates.append(Path(found))
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        candidates += sorted(Path(folder).glob("*/bin/nvcc"))
    return next((str(path) for path in candidates if path.exists()), None)


def compile_ptx(source: Path | str, arch: str, *options: str) -> str:
    """PTX of a .cu file, or of source text, for "sm_80" or "sm_90a"."""
    nvcc = find()
    if nvcc is None:
        raise FileNotFoundError("nvcc is not installed: pip install nvidia-cuda-nvcc, or set CUDA_HOME")
    with tempfile.TemporaryDirectory() as folder:
        path = source
        if isinstance(source, str):
            path = Path(folder, "kernel.cu")
            path.write_text(source)
        out = Path(folder, "kernel.ptx")
        command = [nvcc, "-ptx", f"-arch={arch}", "-std=c++20", "-O3", *options, str(path), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed: {(done.stderr or done.stdout)[-3000:]}")
        return out.read_text()
