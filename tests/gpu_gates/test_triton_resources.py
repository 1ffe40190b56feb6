"""Every shipped configuration fits its chip: no spills, tensor cores and TMA in the loop, room for its programs."""

import pytest

pytest.importorskip("triton", reason="needs Triton (its compiler runs without a GPU)")

import torch
from simulator import compiling, gate, of_triton
from triton.tools.tensor_descriptor import TensorDescriptor

from dimkern import gpu_plan
from dimkern.backends.triton import estimators, flash_kernel, kernels
from dimkern.estimators import REGISTRY

BF16, F32 = torch.bfloat16, torch.float32
CHIPS = {80: gpu_plan.A100, 90: gpu_plan.H100}
R, M, K, P, L = 4096, 262144, 1024, 2, 64  # what sizes are multiples of is all that the compiler learns of them


def compiled(arch, tile, estimator, dtype=BF16, keep=True, gain=True, clip=False, precision="ieee"):
    """The score+map kernel as TritonTiles would launch it."""

    def matrix(rows, columns, dtype):
        return torch.empty(rows, columns, dtype=dtype, device="meta")

    g, c, e, row = matrix(R, K, dtype), matrix(M, K, dtype), matrix(R, M, dtype), matrix(1, R, F32)
    tma = arch in (90, 100) and (dtype == BF16 or precision == "tf32")
    if tma:
        g, c = (TensorDescriptor(x, list(x.shape), [K, 1], [B, tile.BK]) for x, B in ((g, tile.BM), (c, tile.BN)))
    functions = {name.upper(): getattr(estimators, f"{estimator}_{name}") for name in ("psi", "phi")}
    with compiling(arch):
        kernel = kernels.score_map.warmup(
            g, c, row, row, row, row, e, row, row, K, K, M, R, M, K, P, L, 3, 2.0, **functions,
            LSE=REGISTRY[estimator].family != "pointwise", CLIP=clip, KEEP=keep, GAIN=gain and keep, OWN=False,
            BM=tile.BM, BN=tile.BN, BK=tile.BK, GROUP=16, TMA=tma, PRECISION=precision, grid=(1,),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    what = f"{estimator} {str(dtype).removeprefix('torch.')}{' ' + precision if dtype == F32 else ''}"
    label = f"{what} {tile.BM}x{tile.BN}x{tile.BK}{'' if keep else ' statistics'}{' clip' if clip else ''}"
    return of_triton(kernel, label)


def compiled_flash(arch, tile, estimator, rows, clip=False, copy=False):
    """A gradient's kernel as FlashTiles would launch it."""

    def matrix(rows, columns, dtype):
        return torch.empty(rows, columns, dtype=dtype, device="meta")

    dtype, row = torch.float16 if copy else BF16, matrix(1, R, F32)
    X, Y, A, B = (R, M, P, L) if rows else (M, R, L, P)
    operands = matrix(X, tile.BK, dtype), matrix(Y, tile.BK, dtype), matrix(Y, tile.BK, BF16)
    if arch >= 90:
        operands = (
            TensorDescriptor(x, list(x.shape), [tile.BK, 1], [size, tile.BK])
            for x, size in zip(operands, (tile.BM, tile.BN, tile.BN), strict=True)
        )
    functions = {name.upper(): getattr(estimators, f"{estimator}_{name}") for name in ("psi", "phi")}
    with compiling(arch):
        kernel = flash_kernel.gradient.warmup(
            *operands, row, row, row, row, row, row, row, *[tile.BK] * 4, X, Y, tile.BK, A, B, 3, 2.0, Y, **functions,
            CLIP=clip, ROWS=rows, RUNNING=rows and REGISTRY[estimator].family != "pointwise", COPY=copy,
            BX=tile.BM, BY=tile.BN, BK=tile.BK, TMA=arch >= 90, PRECISION="ieee", grid=(1,), num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
    side = "summaries" if rows else "locations"
    label = f"{estimator} {'float16' if copy else 'bfloat16'} {tile.BM}x{tile.BN}x{tile.BK} gradient of {side}"
    return of_triton(kernel, label + (" clip" if clip else ""))


def shipped(dtype):
    return [(arch, tile) for arch, chip in CHIPS.items() for tile in gpu_plan.tiles_for(chip, dtype)]


def name(value):
    return f"{value.BM}x{value.BN}" if isinstance(value, gpu_plan.Tile) else None


@pytest.mark.parametrize("keep", [True, False], ids=["weights", "statistics"])
@pytest.mark.parametrize("estimator", ["infonce", "jsd"])
@pytest.mark.parametrize(("arch", "tile"), shipped(BF16), ids=name)
def test_half_precision(arch, tile, estimator, keep, report):
    resources = compiled(arch, tile, estimator, keep=keep)
    report(resources)
    ok, reason = gate(resources, blocks_per_sm=tile.programs, tensor_core=True, tma=arch == 90)
    assert ok, reason


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clip"])
@pytest.mark.parametrize("estimator", [name for name in REGISTRY if name not in ("infonce", "jsd")])
def test_the_large_tile_of_a_hopper(estimator, clip, report):
    """Emitting weights, whatever the estimator: masks of own-image pairs and all."""
    resources = compiled(90, gpu_plan.tiles_for(gpu_plan.H100, BF16)[0], estimator, clip=clip)
    report(resources)
    ok, reason = gate(resources, tensor_core=True, tma=True)
    assert ok, reason


@pytest.mark.parametrize("estimator", ["infonce", "jsd"])
@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize(
    ("precision", "tile"),
    [("ieee", tile) for tile in gpu_plan._IEEE] + [("tf32", tile) for tile in gpu_plan._TF32],
    ids=name,
)
def test_float32(arch, tile, estimator, precision, report):
    resources = compiled(arch, tile, estimator, F32, precision=precision)
    report(resources)
    ok, reason = gate(resources, tensor_core=precision == "tf32", tma=arch == 90 and precision == "tf32")
    assert ok, reason


def check_in_registers(resources, tile, arch, report):
    """Weights do not pass through shared memory either: in the loop nothing is stored there but by copies."""
    report(resources)
    ok, reason = gate(resources, blocks_per_sm=tile.programs, tensor_core=True, tma=arch == 90)
    assert ok, reason
    assert "STS" not in resources.loop, resources.loop


@pytest.mark.parametrize("rows", [True, False], ids=["summaries", "locations"])
@pytest.mark.parametrize("estimator", ["infonce", "jsd"])
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("arch", CHIPS)
def test_weights_in_registers(arch, K, estimator, rows, report):
    """Plainly, and beside a soft clip and features that float16 inputs need twice."""
    tile = (gpu_plan._FLASH if arch == 80 else gpu_plan._FLASH_TMA)[K]
    check_in_registers(compiled_flash(arch, tile, estimator, rows), tile, arch, report)
    if (arch, K) == (90, 128):
        tile = gpu_plan._FLASH_TMA_NARROW
    check_in_registers(compiled_flash(arch, tile, estimator, rows, clip=True, copy=True), tile, arch, report)


@pytest.mark.parametrize("rows", [True, False], ids=["summaries", "locations"])
@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("estimator", [name for name in REGISTRY if name not in ("infonce", "jsd")])
def test_weights_in_registers_whatever_the_estimator(estimator, arch, rows, report):
    """The wider K."""
    tile = gpu_plan._FLASH[128] if arch == 80 else gpu_plan._FLASH_TMA[128]
    check_in_registers(compiled_flash(arch, tile, estimator, rows, clip=arch == 80), tile, arch, report)
    if arch == 90:
        tile = gpu_plan._FLASH_TMA_NARROW
        check_in_registers(compiled_flash(arch, tile, estimator, rows, clip=True), tile, arch, report)


@pytest.mark.parametrize("arch", [100, "gfx942"])
@pytest.mark.parametrize("estimator", ["infonce", "jsd"])
def test_other_chips_compile(arch, estimator, report):
    """Reported, not gated."""
    tile = gpu_plan._HALF_TMA[1] if arch == 100 else gpu_plan._HALF[1]
    report(compiled(arch, tile, estimator))
