"""Triton without a GPU: kernels are specialised and compiled as ever, their PTX is executed here.

    with simulated(90) as gpu:
        kernel[grid](cpu_tensors, ...)

Triton asks its driver for everything that depends on the machine, and so should the code under test:
`triton.runtime.driver.active.get_current_target().arch` is the architecture, `….utils.get_device_properties(
device)["multiprocessor_count"]` the number of multiprocessors. Each architecture is a device of its own
number, so one process can run several.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

from .global_memory import GlobalMemory
from .instructions.tma import TensorMap
from .launch import launch

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may have
_SWIZZLES = {0: 0, 1: 3, 2: 2, 3: 1}  # a CUtensorMap's numbers -> a matrix descriptor's


@dataclass
class Launch:
    """What one launch was: kept in `Gpu.launches`, newest last."""

    kernel: CompiledKernel  # its `asm["ptx"]`, its `metadata`
    grid: tuple[int, int, int]
    counts: dict[str, int]  # instructions, products, barriers
    stream: int  # that it was given


@dataclass
class Gpu:
    """The simulated device: what it counts as, and what ran on it."""

    arch: int | str
    multiprocessors: int = 4
    seed: int | None = 0  # of the order of the blocks
    mutate: Callable[[str], str] | None = None  # plants a fault in the PTX
    stream: int = 0  # the current one
    launches: list[Launch] = field(default_factory=list)


@contextlib.contextmanager
def simulated(arch: int, **options) -> Iterator[Gpu]:
    """Kernels launched inside run on the simulator, on CPU tensors; see `Gpu` for the options."""
    if arch not in SHARED_LIMIT:
        raise ValueError(f"arch is one of {sorted(SHARED_LIMIT)}, {arch} was given")
    gpu = Gpu(arch, **options)
    with _installed(gpu, lambda kernel: _launcher(gpu, kernel)):
        yield gpu


@contextlib.contextmanager
def compiling(arch: int | str) -> Iterator[Gpu]:
    """`kernel.warmup(*args, grid=(1,), **options)` inside compiles for 80, 90, 100 or "gfx942"; nothing runs."""

    def refuse(kernel):
        raise RuntimeError("inside compiling() kernels are compiled by warmup(), not launched")

    gpu = Gpu(arch)
    with _installed(gpu, refuse):
        yield gpu


@contextlib.contextmanager
def _installed(gpu: Gpu, run_of) -> Iterator[None]:
    before, run = driver._active, CompiledKernel.run
    allocate = triton.runtime._allocation._allocator.get()
    driver.set_active(_Driver(gpu))
    CompiledKernel.run = property(run_of)
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
    try:
        yield
    finally:
        CompiledKernel.run = run
        driver._active = before
        triton.set_allocator(allocate)


class _Driver:
    """The questions that Triton asks of a driver."""

    def __init__(self, gpu: Gpu):
        self.gpu, self.utils = gpu, self

    def get_current_target(self) -> GPUTarget:
        arch = self.gpu.arch
        return GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int | str:
        return self.gpu.arch

    def get_current_stream(self, device=None) -> int:
        return self.gpu.stream

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_LIMIT[self.gpu.arch],
            "max_num_regs": 65536,
            "multiprocessor_count": self.gpu.multiprocessors,
            "warpSize": 32,
            "sm_clock_rate": 1755000,
            "mem_clock_rate": 2619000,
            "mem_bus_width": 5120,
        }

    def launcher_cls(self, source, metadata) -> None:
        """Launching goes through CompiledKernel.run instead, which knows the kernel."""

    def load_binary(self, name, cubin, shared, device) -> tuple:
        return 1, name, 0, 0, 1024

    def get_benchmarker(self):
        def benchmark(function, quantiles=None, **options):
            function()
            return [1.0] * len(quantiles or [1])

        return benchmark


def _launcher(gpu: Gpu, kernel: CompiledKernel):
    kernel._init_handles()  # refuses a kernel that wants more shared memory than there is

    def run(x, y, z, stream, function, metadata, launch_metadata, enter, exit_, *args):
        memory = GlobalMemory()
        arguments = _Arguments(memory)
        descriptors = iter(kernel.metadata.tensordesc_meta or ())
        packed = []
        for (name, kind), value in zip(kernel.src.signature.items(), args, strict=True):
            if kind == "constexpr":
                continue
            if isinstance(kind, str) and kind.startswith("tensordesc"):
                packed += arguments.descriptor(value, next(descriptors), name)
            elif isinstance(kind, str) and kind.startswith("*"):
                packed.append(arguments.pointer(value, name))
            else:
                packed.append(value)
        scratch = kernel.metadata.global_scratch_size
        if scratch:  # for the descriptors that the kernel makes itself
            raw = np.full(scratch * x * y * z, 0xFF, np.uint8)
            packed.append(memory.add(raw, "Triton's scratch"))
        else:
            packed.append(0)
        packed.append(0)  # the profiler's scratch
        ptx = kernel.asm["ptx"] if gpu.mutate is None else gpu.mutate(kernel.asm["ptx"])
        counts = launch(ptx, (x, y, z), packed, memory, shared_bytes=kernel.metadata.shared, seed=gpu.seed)
        gpu.launches.append(Launch(kernel, (x, y, z), counts, stream))

    return run


class _Arguments:
    """Registers the tensors of one launch: every one may be touched from its first to its last element."""

    def __init__(self, memory: GlobalMemory):
        self.memory = memory
        self._starts: dict[int, int] = {}

    def pointer(self, tensor, name: str) -> int:
        if tensor is None:
            return 0
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}, a tensor is expected")
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}, the simulator takes CPU tensors")
        storage = tensor.untyped_storage()
        offset = tensor.storage_offset() * tensor.element_size()
        if storage.data_ptr() not in self._starts:
            raw = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),)).numpy()
            label = f"{name} {tuple(tensor.shape)}"
            self._starts[storage.data_ptr()] = self.memory.add(raw, label, *_extent(tensor))
        else:
            self.memory.extend(self._starts[storage.data_ptr()], *_extent(tensor))
        return self._starts[storage.data_ptr()] + offset

    def descriptor(self, descriptor, meta: dict, name: str) -> list:
        base = descriptor.base
        size = base.element_size()
        tensor_map = TensorMap(
            self.pointer(base, name),
            tuple(descriptor.shape),
            tuple(stride * size for stride in descriptor.strides),
            tuple(meta["block_size"]),
            size,
            _SWIZZLES[meta["swizzle"]],
        )
        return [tensor_map, *descriptor.shape, *descriptor.strides]


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Bytes of the storage between the first element and the end of the last."""
    start = tensor.storage_offset()
    span = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    size = tensor.element_size()
    return start * size, (start + (span if tensor.numel() else 0)) * size
