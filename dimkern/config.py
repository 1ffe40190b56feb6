"""Settings that travel with the context, not with the call: the memory budget."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_CPU_DEFAULT = 256 * 10**6
_ACCELERATOR_FRACTION = 0.25  # of what is free: the encoder's activations need the rest
_ENVIRONMENT = "DIMKERN_MEMORY_BUDGET"

_budget: ContextVar[int | None] = ContextVar("dimkern_memory_budget", default=None)


def parse_bytes(size: int | str, name: str = "memory_budget") -> int:
    """Bytes in `size`: an int, or text such as "256MB" (10^6) or "1GiB" (2^30)."""
    given = size
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", size.upper())
        if not match or match[2] == "I":
            raise ValueError(f"{name} is {size!r}; accepted are bytes as an int or text such as '256MB' or '1GiB'")
        size = round(float(match[1]) * _UNITS[match[2]])  # 1.13 * 1000 is less than 1130
    elif isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} is a {type(size).__name__}; accepted are bytes as an int or text such as '256MB'")
    if size <= 0:
        raise ValueError(f"{name} is {given!r}; it must be positive")
    return size


@contextmanager
def config(*, memory_budget: int | str) -> Iterator[None]:
    """Bound what a loss may allocate beyond its inputs, outputs and gradients, in this context.

    The gradients of half-precision inputs are float32 from the forward until the upstream factor is in; that by
    bfloat16 local features on a CPU is bfloat16.

    Args:
        memory_budget: bytes, or text such as "256MB". Without it the environment variable
            DIMKERN_MEMORY_BUDGET counts, and else 256 MB on a CPU, a quarter of the free memory on an
            accelerator.

    Raises:
        ValueError, TypeError: not a positive size.
    """
    token = _budget.set(parse_bytes(memory_budget))
    try:
        yield
    finally:
        _budget.reset(token)


def memory_budget(device: torch.device) -> int:
    """The bytes that count on `device` now."""
    chosen = _budget.get()
    if chosen is not None:
        return chosen
    if _ENVIRONMENT in os.environ:
        return parse_bytes(os.environ[_ENVIRONMENT], _ENVIRONMENT)
    if device.type in ("cuda", "xpu"):
        free, _ = getattr(torch, device.type).mem_get_info(device)
        return int(free * _ACCELERATOR_FRACTION)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() * _ACCELERATOR_FRACTION)
    return _CPU_DEFAULT
