"""The GPU that Triton's driver would launch on: what it is, or why there is none."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

INSTALLED = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Chip:
    """What the plan and the kernels' tables need to know of a GPU."""

    maker: str  # as Triton names it: "cuda" or "hip"
    arch: int  # 80, 90, ...; of an AMD chip 0
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes/s of its memory
    shared_memory: int  # bytes that a program may have

    @property
    def name(self) -> str:
        return f"sm_{self.arch}" if self.maker == "cuda" else self.maker

    @property
    def has_tma(self) -> bool:
        return self.maker == "cuda" and self.arch >= 90


def chip_of(device: torch.device) -> Chip | str:
    """The chip behind tensors on `device`, or the reason a user should read."""
    driver = _driver(device)
    if isinstance(driver, str):
        return driver
    target = driver.get_current_target()
    index = driver.get_current_device() if device.index is None else device.index
    arch = target.arch
    if device.type == "cuda" and target.backend == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
    if target.backend == "cuda" and arch < 80:
        return f"the Triton kernels need compute capability 8.0 or later, {device} has {arch // 10}.{arch % 10}"
    return _chip(driver, target.backend, arch if isinstance(arch, int) else 0, index)


@lru_cache
def _chip(driver: Any, maker: str, arch: int, index: int) -> Chip:
    p = driver.utils.get_device_properties(index)
    bandwidth = 2.0 * p["mem_clock_rate"] * 1e3 * p["mem_bus_width"] / 8
    return Chip(maker, arch, p["multiprocessor_count"], p["sm_clock_rate"] * 1e3, bandwidth, p["max_shared_mem"])


def _driver(device: torch.device) -> Any:
    if not INSTALLED:
        return "Triton is not installed"
    if device.type == "cuda":
        from triton.runtime.driver import driver

        try:
            return driver.active
        except RuntimeError as error:
            return f"Triton has no driver for {device}: {error}"
    # whoever brought Triton a driver of his own for other devices has imported it
    module = sys.modules.get("triton.runtime.driver")
    active = getattr(module, "driver", None) and module.driver._active  # type: ignore[union-attr]
    if active is None or active.get_active_torch_device().type != device.type:
        return _on_no_gpu(device)
    return active


@lru_cache
def _on_no_gpu(device: torch.device) -> str:
    return f"the tensors are on {device}, not on a GPU"  # asked for by every loss on a CPU
