"""Metadata is in pyproject.toml; here the native CPU library is built, by CMake, against the torch that is installed.

Where torch, CMake or a C++ compiler is missing the package is installed without it: `dimkern doctor` says so,
and the streaming backend serves.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
LIBRARY = "libdimkern_cpu.so"


class CMakeBuild(build_ext):
    """Builds one CMake target as a plain shared library: it holds no Python module, torch loads it."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext):
        torch = importlib.util.find_spec("torch")
        cmake = shutil.which("cmake") or shutil.which("cmake", path=Path(sys.executable).parent)
        if torch is None or cmake is None:
            missing = "torch (install it first, and this package with --no-build-isolation)" if cmake else "cmake"
            print(f"dimkern: the native CPU library is left out: {missing} is not installed", file=sys.stderr)
            return
        build = ROOT / "build" / "native"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        options = [
            f"-DTORCH_DIR={torch.submodule_search_locations[0]}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}",
            "-DDIMKERN_BUILD_TESTS=OFF",
        ]
        try:
            subprocess.run([cmake, "-S", ROOT, "-B", build, *generator, *options], check=True)
            subprocess.run([cmake, "--build", build, "--target", "dimkern_cpu", "--parallel"], check=True)
        except subprocess.CalledProcessError as error:
            print(f"dimkern: the native CPU library is left out: {error}", file=sys.stderr)
            return
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / LIBRARY, output)

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self):
        (ROOT / "dimkern" / "_native").mkdir(exist_ok=True)
        super().copy_extensions_to_source()


library = Extension("dimkern._native.dimkern_cpu", sources=[], optional=True)
setup(ext_modules=[library], cmdclass={"build_ext": CMakeBuild})
