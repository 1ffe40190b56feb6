"""The native CPU library: loaded when dimkern is imported, or the reason why not."""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent / "_native" / "libdimkern_cpu.so"


def _load() -> str | None:
    if not _LIBRARY.exists():
        return (
            "the native CPU library was not built; with a C++ compiler, cmake and torch installed, "
            "reinstall dimkern with pip install --no-build-isolation"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the native CPU library does not load: {error}"
    return None


WHY_NOT_LOADED = _load()


@lru_cache(maxsize=1)
def warn_once(reason: str) -> None:
    """Say once in a process that the slower backend serves."""
    text = f"{reason}; until then the streaming backend serves: as exact, but slower"
    warnings.warn(text, stacklevel=8)  # the caller is beyond torch's dispatch


@lru_cache(maxsize=1)
def multiplies_bf16() -> bool:
    """Whether the library multiplies numbers in bfloat16 as they are."""
    return WHY_NOT_LOADED is None and bool(torch.ops.dimkern_cpu.multiplies_bf16.default())


def instruction_sets() -> dict[str, str]:
    """What became of each instruction set of the library, the fastest first: chosen and why, or not and why."""
    if WHY_NOT_LOADED is not None:
        return {"not loaded": WHY_NOT_LOADED}
    lines = str(torch.ops.dimkern_cpu.isas.default()).splitlines()
    return dict(line.split(": ", 1) for line in lines)
