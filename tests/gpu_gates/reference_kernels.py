"""Small Triton kernels of the shape of the real ones: the simulator is tested on these.

For a block of rows: sums of exp(s) over the columns of other images, one partial sum for each column tile,
and the weights themselves.
"""

import triton
import triton.language as tl


@triton.jit
def row_sums(g_ptr, c_ptr, sums_ptr, weights_ptr, R, C, K, L,
             BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
             EMIT: tl.constexpr):  # fmt: skip
    """Pointers: cp.async and mma.sync on sm_80, cp.async and wgmma on sm_90."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    ks = tl.arange(0, BK)
    g_ptrs = g_ptr + rows[:, None].to(tl.int64) * K + ks[None, :]
    c_ptrs = c_ptr + cols[None, :].to(tl.int64) * K + ks[:, None]
    s = tl.zeros((BR, BC), tl.float32)
    for k in range(0, K, BK):
        g = tl.load(g_ptrs + k, mask=(rows[:, None] < R) & (ks[None, :] < K - k), other=0.0)
        c = tl.load(c_ptrs + k, mask=(cols[None, :] < C) & (ks[:, None] < K - k), other=0.0)
        s = tl.dot(g, c, s, input_precision=PRECISION)
    _finish(s, rows, cols, sums_ptr, weights_ptr, R, C, L, EMIT)


@triton.jit
def row_sums_tma(g_map, c_map, sums_ptr, weights_ptr, R, C, K, L,
                 BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, EMIT: tl.constexpr):  # fmt: skip
    """Descriptors made by the host: TMA and wgmma."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    s = tl.zeros((BR, BC), tl.float32)
    for k in range(0, K, BK):
        g = g_map.load([tl.program_id(0) * BR, k])
        c = c_map.load([tl.program_id(1) * BC, k])
        s = tl.dot(g, c.T, s)
    _finish(s, rows, cols, sums_ptr, weights_ptr, R, C, L, EMIT)


@triton.jit
def _finish(s, rows, cols, sums_ptr, weights_ptr, R, C, L, EMIT: tl.constexpr):
    own = cols[None, :] // L == rows[:, None]
    e = tl.where(own | (cols[None, :] >= C), 0.0, tl.exp(s))
    tl.store(sums_ptr + tl.program_id(1) * R + rows, tl.sum(e, 1), mask=rows < R)
    if EMIT:
        at = weights_ptr + rows[:, None].to(tl.int64) * C + cols[None, :]
        tl.store(at, e.to(weights_ptr.dtype.element_ty), mask=(rows[:, None] < R) & (cols[None, :] < C))


@triton.jit
def row_sums_descriptor(g_ptr, c_ptr, sums_ptr, weights_ptr, R, C, K, L,
                        BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, EMIT: tl.constexpr):  # fmt: skip
    """Descriptors that the kernel makes for itself, and a TMA store of the weights."""
    g_map = tl.make_tensor_descriptor(g_ptr, shape=[R, K], strides=[K, 1], block_shape=[BR, BK])
    c_map = tl.make_tensor_descriptor(c_ptr, shape=[C, K], strides=[K, 1], block_shape=[BC, BK])
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    s = tl.zeros((BR, BC), tl.float32)
    for k in range(0, K, BK):
        s = tl.dot(g_map.load([tl.program_id(0) * BR, k]), c_map.load([tl.program_id(1) * BC, k]).T, s)
    own = cols[None, :] // L == rows[:, None]
    e = tl.where(own | (cols[None, :] >= C), 0.0, tl.exp(s))
    tl.store(sums_ptr + tl.program_id(1) * R + rows, tl.sum(e, 1), mask=rows < R)
    if EMIT:
        weights = tl.make_tensor_descriptor(weights_ptr, shape=[R, C], strides=[C, 1], block_shape=[BR, BC])
        weights.store([tl.program_id(0) * BR, tl.program_id(1) * BC], e.to(weights_ptr.dtype.element_ty))


@triton.jit
def column_sums(x_ptr, out_ptr, R, C, BR: tl.constexpr, BC: tl.constexpr):
    """Float atomics: every program adds its rows' sums to the same columns."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    cols = tl.arange(0, BC)
    inside = (rows[:, None] < R) & (cols[None, :] < C)
    x = tl.load(x_ptr + rows[:, None] * C + cols[None, :], mask=inside, other=0.0)
    tl.atomic_add(out_ptr + cols, tl.sum(x, 0), mask=cols < C, sem="relaxed")
