"""score + map on a GPU: a GEMM tile with an estimator's map as its epilogue.

The kernels never name an estimator: its psi and phi come as functions (`estimators.py`), and a new row of the registry
changes nothing here. Sums leave as one partial for each tile, so that the order they are added in is fixed: no atomics.
Row and column indices are relative to the block of pairs; its columns begin `shift` images after its rows. Matrices
have rows of `stride` elements, K of them features, and both are multiples of 16. Nothing is specialised for what
differs from block to block: a block at 1 would have a constant there, and one at a multiple of 16 another kernel.
"""

import triton
import triton.language as tl

from .math import exp, log1p, sigmoid, softplus, tanh

NO_SCORE = tl.constexpr(float("-inf"))
EMPTY, FULL = tl.constexpr(2.0**-60), tl.constexpr(2.0**60)  # sums of psi between which a row's reference served


@triton.jit(do_not_specialize=["shift"])
def score_map(g, c, scale_ptr, ref_ptr, gain_ptr, own_ptr, e, psi_ptr, top_ptr,
              g_stride, c_stride, e_stride, R, M, K, P, L, shift, clip,
              PSI: tl.constexpr, PHI: tl.constexpr, LSE: tl.constexpr, CLIP: tl.constexpr, KEEP: tl.constexpr,
              GAIN: tl.constexpr, OWN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
              GROUP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile: its row sums of psi, and with KEEP the weights phi, with GAIN gain * phi, in e (R, e_stride).

    With KEEP the reference of a log-sum-exp row is given. Without, it is the tile's own maximum, which goes to
    `top`. Weights of own-image pairs are, with OWN, those of own (R, L); without, they are left as they come, for
    `write_own` to overwrite.
    """
    tile_row, tile_col = tile_of(R, M, BM, BN, GROUP)
    row, col = tile_row * BM, tile_col * BN
    s = score_tile(g, c, row, col, g_stride, c_stride, R, M, K, tl.load(scale_ptr), BM, BN, BK, TMA, PRECISION)
    parts = quarters(s)

    rows = row + tl.arange(0, BM)
    first = own_columns(rows, shift, P, L, M)
    own_begins, own_ends = own_columns(row, shift, P, L, M), own_columns(row + BM - 1, shift, P, L, M) + L
    ragged = (own_begins < col + BN) & (own_ends > col) | (col + BN > M)
    at = tile_col.to(tl.int64) * R + rows
    if KEEP:
        ref = tl.load(ref_ptr + rows, mask=rows < R, other=0.0)
    else:
        ref = tl.zeros((BM,), tl.float32)
        if LSE:
            top = tl.full((BM,), NO_SCORE, tl.float32)
            for i in tl.static_range(4):
                top = tl.maximum(top, highest(parts[i], col + i * (BN // 4), first, ragged, clip, M, L, CLIP))
            tl.store(top_ptr + at, top, mask=rows < R)
            ref = finite(top)
    gain = ref
    if GAIN:
        gain = tl.load(gain_ptr + rows, mask=rows < R, other=0.0)
    sums = tl.zeros((BM,), tl.float32)
    for i in tl.static_range(4):
        sums += map_part(parts[i], row, col + i * (BN // 4), first, ref, gain, ragged, clip, own_ptr, e, e_stride,
                         R, M, L, PSI, PHI, LSE, CLIP, KEEP, GAIN, OWN)  # fmt: skip
    tl.store(psi_ptr + at, sums, mask=rows < R)


@triton.jit(do_not_specialize=["T", "shift"])
def close_rows(g, c, scale_ptr, ref_ptr, e, psi_ptr, sum_ptr, T,
               g_stride, c_stride, e_stride, R, M, K, P, L, shift, clip,
               PSI: tl.constexpr, PHI: tl.constexpr, CLIP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
               BK: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add the T partial sums of rows kept by `score_map`; where a reference failed, redo its rows with their maximum.

    Always launched; the redoing is left out on what the sums say, so nothing waits for the host.
    """
    row = tl.program_id(0) * BM
    rows = row + tl.arange(0, BM)
    sums = tl.zeros((BM,), tl.float32)
    for t in range(0, T, BT):
        tiles = t + tl.arange(0, BT)
        inside = (tiles < T)[:, None] & (rows < R)[None, :]
        sums += tl.sum(tl.load(psi_ptr + tiles[:, None].to(tl.int64) * R + rows[None, :], mask=inside, other=0.0), 0)
    failed = (rows < R) & ~((sums > EMPTY) & (sums < FULL))  # a NaN has failed too
    if tl.max(failed.to(tl.int32), 0) != 0:
        scale = tl.load(scale_ptr)
        first = own_columns(rows, shift, P, L, M)
        top = tl.full((BM,), NO_SCORE, tl.float32)
        for col in range(0, M, BN):
            s = score_tile(g, c, row, col, g_stride, c_stride, R, M, K, scale, BM, BN, BK, False, PRECISION)
            top = tl.maximum(top, highest(s, col, first, True, clip, M, L, CLIP))
        ref = finite(top)
        sums = tl.zeros((BM,), tl.float32)
        for col in range(0, M, BN):
            s = score_tile(g, c, row, col, g_stride, c_stride, R, M, K, scale, BM, BN, BK, False, PRECISION)
            sums += map_part(s, row, col, first, ref, ref, True, clip, e, e, e_stride, R, M, L,
                             PSI, PHI, True, CLIP, True, False, False)  # fmt: skip
        tl.store(ref_ptr + rows, ref, mask=rows < R)
    tl.store(sum_ptr + rows, sums, mask=rows < R)


@triton.jit
def own_scores(g, c, scale_ptr, s_ptr, top_ptr, g_stride, c_stride, P, L, K, clip,
               CLIP: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """The rows of some images against their own locations: the scores, (images, P, L), and the largest of each row."""
    row = tl.program_id(0)
    scale = tl.load(scale_ptr)
    top = tl.full((BL,), NO_SCORE, tl.float32)
    for first in range(0, L, BL):
        locations = first + tl.arange(0, BL)
        s = own_products(g, c, row, row // P, locations, g_stride, c_stride, L, K, BL, BK) * scale
        s = soft_clip(s, clip, CLIP)
        tl.store(s_ptr + row.to(tl.int64) * L + locations, s, mask=locations < L)
        top = tl.maximum(top, tl.where(locations < L, s, NO_SCORE))
    tl.store(top_ptr + row, tl.max(top, 0))


@triton.jit(do_not_specialize=["T"])
def finish_rows(g, c, scale_ptr, psi_ptr, top_ptr, s_ptr, negative_ptr, own_ptr, ref_ptr, gain_ptr, loss_ptr, scaled,
                T, g_stride, c_stride, R, P, L, K, log_kappa, pairs, clip, unit,
                F: tl.constexpr, DF: tl.constexpr, LSE: tl.constexpr, CLIP: tl.constexpr, SCALED: tl.constexpr,
                BT: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Close a row of the mean loss (estimators.py): from the partial statistics of all its negatives, `pairs` of them,

    its negative term; of its positives the scores and the weights; what its negatives' weights need (ref, gain); its
    share of the loss; and with SCALED scale * G for the locals' gradient, a row of `scaled`. Weights and gain leave
    times `unit`.
    """
    row = tl.program_id(0)
    tiles = tl.arange(0, BT)
    each = 1.0 / (R.to(tl.float32) * L)
    scale = tl.load(scale_ptr)
    ref = 0.0
    if LSE:
        top = tl.full((BT,), NO_SCORE, tl.float32)
        for t in range(0, T, BT):
            top = tl.maximum(top, tl.load(top_ptr + (t + tiles) * R + row, mask=t + tiles < T, other=NO_SCORE))
        ref = finite(tl.max(top, 0))
    sums = tl.zeros((BT,), tl.float32)
    for t in range(0, T, BT):
        psi = tl.load(psi_ptr + (t + tiles) * R + row, mask=t + tiles < T, other=0.0)
        if LSE:
            psi *= exp(tl.load(top_ptr + (t + tiles) * R + row, mask=t + tiles < T, other=NO_SCORE) - ref)
        sums += psi
    if LSE:
        log_sum = ref + tl.log(tl.sum(sums, 0))
        high, low = tl.maximum(log_sum, log_kappa), tl.minimum(log_sum, log_kappa)
        negative = tl.where(high == NO_SCORE, NO_SCORE, high + log1p(exp(low - high)))
        ref = tl.where(negative == NO_SCORE, 0.0, negative)
    else:
        negative = tl.sum(sums, 0) / pairs

    image = row // P
    items = tl.zeros((BL,), tl.float32)
    gains = tl.zeros((BL,), tl.float32)
    for first in range(0, L, BL):
        locations = first + tl.arange(0, BL)
        s = soft_clip(own_products(g, c, row, image, locations, g_stride, c_stride, L, K, BL, BK) * scale, clip, CLIP)
        if LSE:
            item = softplus(negative - s)
            weight = sigmoid(negative - s) * each
            gains += tl.where(locations < L, weight, 0.0)
        else:
            item = -F(s)
            weight = tl.zeros((BL,), tl.float32) + DF(s) * each
        items += tl.where(locations < L, item, 0.0)
        if CLIP:
            weight *= slope(s, clip)
        at = row.to(tl.int64) * L + locations
        tl.store(s_ptr + at, s, mask=locations < L)
        tl.store(own_ptr + at, -weight * unit, mask=locations < L)
    loss = tl.sum(items, 0) * each
    gain = tl.sum(gains, 0)
    if not LSE:
        loss += negative / R
        gain = 1.0 / (R * pairs)
    tl.store(loss_ptr + row, loss)
    tl.store(negative_ptr + row, negative)
    tl.store(ref_ptr + row, ref)
    tl.store(gain_ptr + row, gain * unit)
    if SCALED:
        for k in range(0, K, BK):
            channels = k + tl.arange(0, BK)
            x = tl.load(g + row.to(tl.int64) * g_stride + channels, mask=channels < K, other=0.0).to(tl.float32)
            x = (x * scale).to(scaled.dtype.element_ty)
            tl.store(scaled + row.to(tl.int64) * K + channels, x, mask=channels < K)


@triton.jit
def own_products(g, c, row, image, locations, g_stride, c_stride, L, K, BL: tl.constexpr, BK: tl.constexpr):
    """<G_row, C> of some locations of an image, (BL,), in float32."""
    products = tl.zeros((BL, BK), tl.float32)
    columns = image.to(tl.int64) * L + locations
    for k in range(0, K, BK):
        channels = k + tl.arange(0, BK)
        x = tl.load(g + row.to(tl.int64) * g_stride + channels, mask=channels < K, other=0.0).to(tl.float32)
        inside = (locations < L)[:, None] & (channels < K)[None, :]
        y = tl.load(c + columns[:, None] * c_stride + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        products += x[None, :] * y
    return tl.sum(products, 1)


@triton.jit
def apply_upstream(grad_c, c_out, c_count, grad_h, g_out, g_count, upstream_ptr, scale_ptr, BLOCK: tl.constexpr):
    """The saved float32 gradients times the upstream scalar, by g also times scale, in the dtypes of the inputs."""
    upstream = tl.load(upstream_ptr).to(tl.float32)
    c_blocks = tl.cdiv(c_count, BLOCK)
    if tl.program_id(0) < c_blocks:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(grad_c + i, mask=i < c_count, other=0.0) * upstream
        tl.store(c_out + i, x.to(c_out.dtype.element_ty), mask=i < c_count)
    else:
        i = (tl.program_id(0) - c_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(grad_h + i, mask=i < g_count, other=0.0) * (upstream * tl.load(scale_ptr).to(tl.float32))
        tl.store(g_out + i, x.to(g_out.dtype.element_ty), mask=i < g_count)


@triton.jit(do_not_specialize=["shift"])
def write_own(e, own_ptr, s_ptr, e_stride, P, L, shift, clip, CLIP: tl.constexpr, BL: tl.constexpr):
    """Put own-image pairs' weights, (images, P, L), into a kept block.

    e, own and s (their scores) begin at the first such image; its columns are `shift` images into the block.
    """
    row = tl.program_id(0)
    for first in range(0, L, BL):
        locations = first + tl.arange(0, BL)
        at = row.to(tl.int64) * L + locations
        w = tl.load(own_ptr + at, mask=locations < L, other=0.0)
        if CLIP:
            w *= slope(tl.load(s_ptr + at, mask=locations < L, other=0.0), clip)
        column = (row // P + shift).to(tl.int64) * L
        tl.store(e + row.to(tl.int64) * e_stride + column + locations, w.to(e.dtype.element_ty), mask=locations < L)


@triton.jit
def tile_of(R, M, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile: row tiles of a group first, so that their summaries and a column tile stay in L2."""
    pid = tl.program_id(0)
    row_tiles, col_tiles = tl.cdiv(R, BM), tl.cdiv(M, BN)
    group = pid // (GROUP * col_tiles)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = pid % (GROUP * col_tiles)
    return group * GROUP + within % size, within // size


@triton.jit
def score_tile(g, c, row, col, g_stride, c_stride, R, M, K, scale, BM: tl.constexpr, BN: tl.constexpr,
               BK: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """scale * <G_r, C_c> of a tile, (BM, BN) float32."""
    s = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK):
        g_tile = load_tile(g, row, k, g_stride, R, K, BM, BK, TMA)
        c_tile = load_tile(c, col, k, c_stride, M, K, BN, BK, TMA)
        s = tl.dot(g_tile, c_tile.T, s, input_precision=PRECISION)
    return s * scale


@triton.jit
def load_tile(x, row, k, stride, count, K, B: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """Rows row.. and channels k.. of a matrix, (B, BK), zeros beyond it. x is a pointer, with TMA a descriptor."""
    if TMA:
        tile = x.load([row, k])
    else:
        rows = row + tl.arange(0, B)
        channels = k + tl.arange(0, BK)
        inside = (rows < count)[:, None] & (channels < K)[None, :]
        tile = tl.load(x + rows[:, None].to(tl.int64) * stride + channels[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def quarters(s):
    """A tile's columns in four parts, in the registers they are in: mapped one by one, they leave room for the map."""
    left, right = halves(s)
    a, b = halves(left)
    c, d = halves(right)
    return a, b, c, d


@triton.jit
def halves(s):
    return tl.split(tl.permute(tl.reshape(s, (s.shape[0], 2, s.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def map_part(s, row, col, first, ref, gain, ragged, clip, own_ptr, e, e_stride, R, M, L,
             PSI: tl.constexpr, PHI: tl.constexpr, LSE: tl.constexpr, CLIP: tl.constexpr, KEEP: tl.constexpr,
             GAIN: tl.constexpr, OWN: tl.constexpr):  # fmt: skip
    """Map some columns of a tile: the row sums of psi, (BM,); with KEEP the weights go to e."""
    cols = col + tl.arange(0, s.shape[1])
    s = soft_clip(s, clip, CLIP)
    psi, phi = map_scores(s, ref[:, None], cols, first, ragged, clip, M, L, PSI, PHI, CLIP, False)
    if KEEP:
        if GAIN:
            phi *= gain[:, None]
        rows = row + tl.arange(0, s.shape[0])
        if OWN and ragged:
            d = cols[None, :] - first[:, None]
            own = (d >= 0) & (d < L) & (rows < R)[:, None]
            phi = tl.where(own, tl.load(own_ptr + rows[:, None] * L + d, mask=own, other=0.0), phi)
        inside = (rows < R)[:, None] & (cols < e_stride)[None, :]
        tl.store(e + rows[:, None].to(tl.int64) * e_stride + cols[None, :], phi.to(e.dtype.element_ty), mask=inside)
    return tl.sum(psi, 1)


@triton.jit
def highest(s, col, first, ragged, clip, M, L, CLIP: tl.constexpr):
    """Each row's largest score over the negatives among some columns, (BM,)."""
    cols = col + tl.arange(0, s.shape[1])
    s = soft_clip(s, clip, CLIP)
    if ragged:
        s = tl.where(outside(cols, first, M, L), NO_SCORE, s)
    return tl.max(s, 1)


@triton.jit
def map_scores(s, ref, cols, first, ragged, clip, M, L, PSI: tl.constexpr, PHI: tl.constexpr, CLIP: tl.constexpr,
               BOTH: tl.constexpr):  # fmt: skip
    """psi and phi of scores that are clipped already; of pairs that are no negatives psi, with BOTH also phi, is 0."""
    psi = PSI(s, ref)
    if ragged and not BOTH:
        psi = tl.where(outside(cols, first, M, L), 0.0, psi)
    phi = PHI(s, ref)
    if len(phi.shape) == 0:
        phi = s * 0.0 + phi  # a tile in the scores' layout: in one of its own it would go through shared memory
    if CLIP:
        phi *= slope(s, clip)
    if ragged and BOTH:  # one branch for the two: a second one spilled
        apart = outside(cols, first, M, L)
        psi = tl.where(apart, 0.0, psi)
        phi = tl.where(apart, 0.0, phi)
    return psi, phi


@triton.jit
def finite(top):
    """Any finite reference serves a row that is empty (-inf) or has overflown (+inf): inf - inf would be NaN."""
    return tl.where(tl.abs(top) == float("inf"), 0.0, top)


@triton.jit
def own_columns(rows, shift, P, L, M):
    """The first of the L columns of each row's own image, held to [-L, M] where the block has none of them, (BM,)."""
    first = (rows // P - shift).to(tl.int64) * L
    return tl.minimum(tl.maximum(first, -L), M).to(tl.int32)


@triton.jit
def outside(cols, first, M, L):
    """Pairs that are no negatives: of the row's own image, or beyond the block's last column."""
    d = cols[None, :] - first[:, None]
    return ((d >= 0) & (d < L)) | (cols >= M)[None, :]


@triton.jit
def soft_clip(s, clip, CLIP: tl.constexpr):
    if CLIP:
        s = clip * tanh(s / clip)
    return s


@triton.jit
def slope(s, clip):
    """Derivative of the soft clip at scores that are clipped already."""
    return 1.0 - (s / clip) * (s / clip)
