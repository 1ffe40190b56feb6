"""Metadata is in pyproject.toml; here the native libraries are built, by CMake, against the torch that is installed.

Where torch, CMake or a compiler (C++, nvcc for the CUDA library) is missing, or torch has no CUDA, the package is
installed without them: `dimkern doctor` says so, and the other backends serve.
"""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARIES = {"dimkern_cpu": "the native CPU library", "dimkern_cuda": "the CUDA library"}


class CMakeBuild(build_ext):
    """Builds one CMake target as a plain shared library: it holds no Python module, torch loads it."""

    def get_ext_filename(self, fullname):
        *package, target = fullname.split(".")
        return str(Path(*package, f"lib{target}.so"))

    def build_extension(self, ext):
        target = ext.name.split(".")[-1]
        library = LIBRARIES[target]
        torch = importlib.util.find_spec("torch")
        cmake = shutil.which("cmake") or shutil.which("cmake", path=Path(sys.executable).parent)
        if torch is None or cmake is None:
            missing = "torch (install it first, and this package with --no-build-isolation)" if cmake else "cmake"
            print(f"dimkern: {library} is left out: {missing} is not installed", file=sys.stderr)
            return
        torch = torch.submodule_search_locations[0]
        options = []
        if target == "dimkern_cuda":
            nvcc = find_nvcc()
            if nvcc is None or runpy.run_path(str(Path(torch, "version.py")))["cuda"] is None:
                missing = "torch has no CUDA" if nvcc else "nvcc is not installed"
                print(f"dimkern: {library} is left out: {missing}", file=sys.stderr)
                return
            options = ["-DDIMKERN_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
        build = ROOT / "build" / target
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        options += [
            f"-DTORCH_DIR={torch}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}",
            "-DDIMKERN_BUILD_TESTS=OFF",
        ]
        try:
            subprocess.run([cmake, "-S", ROOT, "-B", build, *generator, *options], check=True)
            subprocess.run([cmake, "--build", build, "--target", target, "--parallel"], check=True)
        except subprocess.CalledProcessError as error:
            print(f"dimkern: {library} is left out: {error}", file=sys.stderr)
            return
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / f"lib{target}.so", output)

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self):
        (ROOT / "dimkern" / "_native").mkdir(exist_ok=True)
        super().copy_extensions_to_source()


def find_nvcc():
    """CUDA's compiler: in $CUDACXX, on the PATH, or where $CUDA_HOME or the toolkit's own installer put it."""
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    return shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which(
        "nvcc", path=os.pathsep.join(map(str, homes))
    )


libraries = [Extension(f"dimkern._native.{target}", sources=[], optional=True) for target in LIBRARIES]
setup(ext_modules=libraries, cmdclass={"build_ext": CMakeBuild})
