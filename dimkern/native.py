"""The native libraries for CPUs and for CUDA: loaded when dimkern is imported, or the reason why not."""

from __future__ import annotations

import os
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent / "_native"


def _load(kind: str, needs: str) -> str | None:
    library = _FOLDER / f"libdimkern_{kind.lower()}.so"
    if not library.exists():
        return (
            f"the native {kind} library was not built; with {needs} installed, "
            "reinstall dimkern with pip install --no-build-isolation"
        )
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the native {kind} library does not load: {error}"
    return None


WHY_NOT_LOADED = _load("CPU", "a C++ compiler, cmake and torch")
_CUDA_NOT_LOADED = _load("CUDA", "nvcc (CUDA 12 or later), cmake and a torch with CUDA")
if _CUDA_NOT_LOADED is None:
    _CUDA_NOT_LOADED = str(torch.ops.dimkern_cuda.why_not.default()) or None


def why_not_cuda(device: torch.device) -> str | None:
    """None if the CUDA library can run on a device, else the reason."""
    if _CUDA_NOT_LOADED is not None:
        return _CUDA_NOT_LOADED
    if device.type != "cuda":
        return f"the tensors are on {device}, not on an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0, whose tensor cores it needs"
    return None


@lru_cache(maxsize=1)
def warn_once(reason: str) -> None:
    """Say once in a process that the slower backend serves."""
    text = f"{reason}; until then the streaming backend serves: as exact, but slower"
    warnings.warn(text, stacklevel=_frames_below_the_caller())


def _frames_below_the_caller() -> int:
    """Of dimkern and of torch's dispatch, counted from the function that warns."""
    frame, count = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("dimkern", "torch"):
        frame, count = frame.f_back, count + 1
    return count


@lru_cache(maxsize=1)
def bf16_inner() -> int:
    """Channels in bfloat16 that the library multiplies at a time, as they are; 0 where it has no product of them."""
    return 0 if WHY_NOT_LOADED is not None else int(torch.ops.dimkern_cpu.bf16_inner.default())


def instruction_sets() -> dict[str, str]:
    """What became of each instruction set of the library, the fastest first: chosen and why, or not and why."""
    if WHY_NOT_LOADED is not None:
        return {"not loaded": WHY_NOT_LOADED}
    lines = str(torch.ops.dimkern_cpu.isas.default()).splitlines()
    return dict(line.split(": ", 1) for line in lines)


if "DIMKERN_CPU_ISA" in os.environ:  # else nothing is chosen before the first loss
    _unheeded = instruction_sets().get("DIMKERN_CPU_ISA")
    if _unheeded is not None:
        warnings.warn(f"DIMKERN_CPU_ISA: {_unheeded}; the fastest of those that do serves", stacklevel=2)
