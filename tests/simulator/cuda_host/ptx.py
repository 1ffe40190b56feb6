"""Launches of the CUDA ops on CPU tensors, given to nvcc's PTX of their kernels in the simulator."""

from __future__ import annotations

import contextlib
import ctypes
import re
from functools import lru_cache

import numpy as np
from simulator.global_memory import GlobalMemory
from simulator.launch import launch

from .library import BUILD, LAUNCHER, load, nvcc

P, I, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _structure(**fields):
    return type("Parameters", (ctypes.Structure,), {"_fields_": list(fields.items())})


# The kernels' parameters as weigh.cuh and finish.cuh declare them, and how many bytes each pointer leads to.
PARAMETERS = {
    "weigh": _structure(
        g=P, c=P, scale=P, keep=P, ref=P, sum=P, positives=P,
        g_row=I, c_row=I, keep_row=I, R=I, M=I, P=I, L=I, row0=I, col0=I, line=ctypes.c_int, clip=F, own=F,
    ),
    "finish": _structure(
        ref=P, sum=P, positives=P, g=P, scale=P, keep=P, weighted_g=P, alpha=P, losses=P, negatives=P,
        keep_row=I, g_row=I, R=I, M=I, P=I, L=I, K=I, clip=F, kappa=F,
    ),
    "settle": _structure(alpha=P, losses=P, scale=P, grad_h=P, grad_c=P, loss=P, R=I, K=I, size_c=I),
    "chain": _structure(grad_c=P, grad_h=P, upstream=P, scale=P, d_c=P, d_g=P, size_c=I, size_g=I),
}  # fmt: skip


def _sizes(kernel: str, p, item: int, tiled: bool) -> dict[str, int]:
    if kernel in ("weigh", "finish"):
        rows = -(-p.R // 64) if tiled else p.R
        statistics = rows * -(-p.M // 64) * 4
        row = p.line if kernel == "weigh" else p.K * item
        sizes = {
            "g": (p.R - 1) * p.g_row * item + row, "scale": 4, "keep": p.R * p.keep_row * item, "ref": statistics,
            "sum": statistics, "positives": p.R * p.L * 4, "weighted_g": p.R * row, "alpha": p.R * 4,
            "losses": p.R * 4, "negatives": p.R * 4,
        }  # fmt: skip
        return sizes | ({"c": (p.M - 1) * p.c_row * item + row} if kernel == "weigh" else {})
    if kernel == "settle":
        rows = p.R * 4
        return {"alpha": rows, "losses": rows, "scale": 4, "grad_h": rows * p.K, "grad_c": 4 * p.size_c, "loss": 4}
    sizes = {"grad_c": 4 * p.size_c, "grad_h": 4 * p.size_g, "upstream": 4, "scale": 4}
    return sizes | {"d_c": item * p.size_c, "d_g": item * p.size_g}


@lru_cache
def entries(architecture: str) -> dict[str, str]:
    """PTX of each kernel by its mangled name."""
    text = nvcc(BUILD / f"ops_{architecture}.ptx", architecture, "-ptx").read_text()
    start = re.compile(r"^\s*(?:\.weak |\.visible )?\s*\.entry ", re.M)
    heads = [m.start() for m in start.finditer(text)]
    shared = "\n".join(re.findall(r"^\.extern \.shared[^;]*;", text, re.M))
    preamble = text[: re.search(r"^\.address_size.*$", text, re.M).end()] + "\n" + shared + "\n"
    kernels = (text[a:b] for a, b in zip(heads, [*heads[1:], len(text)], strict=True))
    return {re.search(r"\.entry\s+(\w+)", kernel)[1]: preamble + kernel for kernel in kernels}


@contextlib.contextmanager
def executed(architecture: str, change=lambda ptx: ptx, seed: int = 0):
    """Launches run nvcc's PTX for an architecture; yields the names and counts of those made so far.

    change: the PTX of a kernel -> what is executed instead.
    """
    library, made, errors = load(), [], []

    def run(name, blocks, threads, shared, raw):
        if errors:
            return
        try:
            kernel = next(kernel for kernel in PARAMETERS if str(len(kernel)) + kernel in name.decode())
            made.append((kernel, _run(kernel, name.decode(), blocks, shared, raw, architecture, change, seed)))
        except Exception as error:
            errors.append(error)

    launcher = LAUNCHER(run)
    library.dimkern_set_launcher(launcher)
    try:
        yield made
    finally:
        library.dimkern_set_launcher(LAUNCHER(0))
        if errors:  # what a result that was never written raised follows from it
            raise errors[0]


def _run(kernel, name, blocks, shared, raw, architecture, change, seed):
    p = PARAMETERS[kernel].from_buffer_copy(ctypes.string_at(raw, ctypes.sizeof(PARAMETERS[kernel])))
    item = 4 if "Tf32" in name or kernel == "settle" else 2
    memory = GlobalMemory()
    for field, size in _sizes(kernel, p, item, tiled="2DV" in name).items():
        address = getattr(p, field, None)
        if address and size:
            data = np.frombuffer((ctypes.c_ubyte * size).from_address(address), np.uint8)
            setattr(p, field, memory.add(data, f"{kernel}'s {field}"))
    ptx = change(entries(architecture)[name])
    return launch(ptx, (blocks,), [bytes(p)], memory, shared_bytes=shared, entry=name, seed=seed)
