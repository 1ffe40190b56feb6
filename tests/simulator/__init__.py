"""GPU kernels executed, checked and measured on a machine that has no GPU.

The PTX that Triton and nvcc make for sm_80 (mma.sync, cp.async) and sm_90a (wgmma, TMA, mbarriers) runs on
numpy, one block of threads at a time. While it runs it is checked: every global access lies inside an
argument, every shared one inside the allocation; no two warps meet in shared memory without a barrier, no
two blocks in global memory at all; asynchronous copies and products do not exist before their wait. What
fails a check, and an instruction that is not known, raises. Nothing here says how fast a kernel is.

(a) A Triton kernel, from `kernel[grid](...)` on, compiled by the real compiler:

    from simulator import simulated
    with simulated(90) as gpu:                      # or 80; both may be used in one process
        kernel[grid](torch.randn(64, 64), ...)      # CPU tensors, TensorDescriptors, numbers
    gpu.launches[-1].counts                         # {"instructions": …, "products": …, "barriers": …}

    Under it `triton.runtime.driver.active` answers for the device, as it does on a GPU:
    `.get_current_target().arch`, `.get_current_stream(0)` and
    `.utils.get_device_properties(0)["multiprocessor_count"]`. Ask it, not torch.cuda, and the launcher
    needs no other path for tests. `torch.cuda.device_of(tensor)` is harmless on CPU tensors.

    Triton's interpreter, mended, in any order of the programs, is faster and sees races between programs:
    `with interpreted(seed=1): kernel[grid](...)`; through the public losses `with simulated(90), interpreted():`.

(b) A kernel of nvcc's:

    from simulator import GlobalMemory, compile_ptx, launch
    memory = GlobalMemory()
    x = np.zeros(256, np.float32)
    launch(compile_ptx(Path("kernel.cu"), "sm_80"), grid=(2,), args=[memory.add(x, "x"), 256], memory=memory,
           entry="mangled_name", threads=(128,), shared_bytes=0)    # entry, threads: where the PTX leaves them open

(c) What a kernel takes of the chip, and whether that will do:

    from simulator import compiling, of_triton, of_ptx, gate, table
    with compiling(90):                             # 80, 90, 100 or "gfx942"; nothing is launched
        compiled = kernel.warmup(*args, grid=(1,), BLOCK=128, num_warps=8)   # args may be torch.empty(…, device="meta")
    resources = of_triton(compiled, "score bf16 128×256")   # or of_triton(gpu.launches[-1].kernel)
    ok, reason = gate(resources, blocks_per_sm=1, tensor_core=True, tma=True)
    print(table([resources]))
"""

from .errors import Deadlock, Hazard, OutOfBounds, Race, SimulationError, Unsupported
from .global_memory import GlobalMemory
from .launch import launch
from .nvcc import compile_ptx
from .nvcc import find as find_nvcc
from .resources import Resources, gate, of_ptx, of_triton, table

try:
    from .interpreter import interpreted
    from .triton_driver import compiling, simulated
except ImportError:  # no Triton here: PTX can still be run
    compiling = simulated = interpreted = None

__all__ = [
    "Deadlock",
    "GlobalMemory",
    "Hazard",
    "OutOfBounds",
    "Race",
    "Resources",
    "SimulationError",
    "Unsupported",
    "compile_ptx",
    "compiling",
    "find_nvcc",
    "gate",
    "interpreted",
    "launch",
    "of_ptx",
    "of_triton",
    "simulated",
    "table",
]
