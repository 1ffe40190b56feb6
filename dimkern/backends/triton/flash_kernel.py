"""score + map + accumulate on a GPU in one: weights stay in registers, and are multiplied at once (K of 128 at most).

Written for either gradient: a tile's `outer` items, those whose gradients it makes, are summaries or locations, and the
`inner` ones it goes through the others. An image has A outer items and B inner ones; its own pairs are found by
division, as in `kernels.py`, whose conventions hold here.
"""

import triton
import triton.language as tl

from .kernels import NO_SCORE, exp, finite, highest, load_tile, map_scores, own_columns, soft_clip


@triton.jit(do_not_specialize=["shift"])
def gradient(x, y, z, scale_ptr, ref_ptr, gain_ptr, own_ptr, out, psi_ptr, top_ptr,
             x_stride, y_stride, z_stride, out_stride, X, Y, K, A, B, shift, clip, span,
             PSI: tl.constexpr, PHI: tl.constexpr, CLIP: tl.constexpr, ROWS: tl.constexpr,
             RUNNING: tl.constexpr, COPY: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr, BK: tl.constexpr,
             TMA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile against `span` inner items, a multiple of BY: outer items x (X, x_stride), inner ones y (Y, y_stride).

    The inner items' images begin `shift` after the outer ones'. z is y in the dtype of the weights, with COPY a copy.
    With ROWS, outer items are summaries: out gets the sum of phi * z over their negatives, psi the sum of psi. The
    references are given, or with RUNNING the largest scores so far, which go to `top`. Without, they are locations:
    out gets the gradient, from the summaries' ref and gain and own-image weights own (images, B, A).
    """
    begin, part = tl.program_id(0) * BX, tl.program_id(1)
    items = begin + tl.arange(0, BX)
    x_tile = load_tile(x, begin, 0, x_stride, X, K, BX, BK, TMA)
    scale = tl.load(scale_ptr)
    first = own_columns(items, shift, A, B, Y)
    own_begins, own_ends = own_columns(begin, shift, A, B, Y), own_columns(begin + BX - 1, shift, A, B, Y) + B
    sums = tl.zeros((BX,), tl.float32)
    top = tl.full((BX,), NO_SCORE, tl.float32)
    ref = sums
    if ROWS and not RUNNING:
        ref = tl.load(ref_ptr + items, mask=items < X, other=0.0)
    total = tl.zeros((BX, BK), tl.float32)
    for at in tl.range(part * span, tl.minimum((part + 1) * span, Y), BY):
        y_tile = load_tile(y, at, 0, y_stride, Y, K, BY, BK, TMA)
        s = tl.dot(x_tile, y_tile.T, input_precision=PRECISION) * scale
        inner = at + tl.arange(0, BY)
        # with cp.async no branch may stand between the products: weights would pass through shared memory
        ragged = (own_begins < at + BY) & (own_ends > at) | (at + BY > Y) if TMA else True
        clipped = soft_clip(s, clip, CLIP)
        if ROWS:
            if RUNNING:
                higher = tl.maximum(top, highest(s, at, first, ragged, clip, Y, B, CLIP))
                ref = finite(higher)
                fade = exp(top - ref)
                top = higher
                sums *= fade
                total *= fade[:, None]
            psi, w = map_scores(clipped, ref[:, None], inner, first, ragged, clip, Y, B, PSI, PHI, CLIP, True)
            sums += tl.sum(psi, 1)
        else:
            of_row = tl.load(ref_ptr + inner, mask=inner < Y, other=0.0)
            _, w = map_scores(clipped, of_row[None, :], inner, first, ragged, clip, Y, B, PSI, PHI, CLIP, True)
            w *= tl.load(gain_ptr + inner, mask=inner < Y, other=0.0)[None, :]
        z_tile = load_tile(z, at, 0, z_stride, Y, K, BY, BK, TMA) if COPY else y_tile
        total = tl.dot(w.to(z_tile.dtype), z_tile, total, input_precision=PRECISION)
    if ROWS:
        at = part.to(tl.int64) * X + items
        tl.store(psi_ptr + at, sums, mask=items < X)
        if RUNNING:
            tl.store(top_ptr + at, top, mask=items < X)
    else:
        if part == 0:
            total = add_own(total, z, own_ptr, items, first, own_begins, own_ends, z_stride, X, Y, K, A, B, BY, TMA)
        total *= scale
    channels = tl.arange(0, BK)
    at = (part.to(tl.int64) * X + items)[:, None] * out_stride + channels[None, :]
    tl.store(out + at, total, mask=(items < X)[:, None] & (channels < out_stride)[None, :])


@triton.jit
def add_own(total, z, own_ptr, items, first, own_begins, own_ends, z_stride, X, Y, K, A, B,
            BY: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Add to locations' gradients what the summaries of their own images give, of given weights."""
    image, place = items // A, items % A
    row = (image.to(tl.int64) * B * A + place)[:, None]
    for at in tl.range(tl.maximum(own_begins, 0), tl.minimum(own_ends, Y), BY, num_stages=1):
        d = (at + tl.arange(0, BY))[None, :] - first[:, None]
        own = (d >= 0) & (d < B) & (items < X)[:, None]
        w = tl.load(own_ptr + row + d * A, mask=own, other=0.0)
        z_tile = load_tile(z, at, 0, z_stride, Y, K, BY, total.shape[1], TMA)
        total = tl.dot(w.to(z_tile.dtype), z_tile, total)
    return total
