"""Tiles in plain PyTorch: the dot critic on any device, GEMMs by torch.

Owns the scaled summaries, the staging of local features and the scratch tiles of one call.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from ..estimators import Scores, Term
from ..plan import Plan, blocks, within


class TorchTiles:
    """s = scale * <g, c>, softly clipped where the problem says so (MATHS.md §1)."""

    def __init__(
        self,
        plan: Plan,
        c: Tensor,  # (held, L, K) or (held, H, W, K), any strides, any floating dtype
        g: Tensor,  # (N, P, K)
        scale: Tensor,  # 0-d
        grad_c: Tensor | None,  # (held, L, K) score dtype, contiguous, uninitialised
        grad_h: Tensor | None,  # (N, P, K) the gradient by scale * g
    ) -> None:
        p = plan.problem
        self._p, self._row, self._clip = p, p.row, p.clip
        self._c, self._grad_c, self._grad_h = c, grad_c, grad_h
        self._given, self._scale = g, scale
        self._plan = plan
        self._buffers: dict[str, Tensor] = {}
        self._staging_images = plan.col_images
        self._staged: slice | None = None  # the images in the staging buffer
        self._kept: dict[int, Tensor] = {}

    @cached_property
    def _g(self) -> Tensor:
        """scale * G, (N, P, K) in the score dtype: one buffer whatever the layout of G."""
        p = self._p
        scaled = torch.empty(p.N, p.P, p.K, dtype=p.score_dtype, device=p.device)
        return scaled.copy_(self._given).mul_(self._scale.to(p.score_dtype))

    def positives(self, images: slice) -> Tensor:
        p = self._p
        scores = torch.empty(images.stop - images.start, p.P, p.L, dtype=p.score_dtype, device=p.device)
        for cols in blocks(p.held, self._staging_images, p.here.start):
            both = _both(images, cols)
            if both is not None:
                c = self._locals(cols)[within(both, cols)]
                torch.bmm(self._g[both], c.transpose(1, 2), out=scores[within(both, images)])
        return self._soft_clip(scores)

    def measure(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        tile = self._score(rows, cols, self._tile("scores"))
        ref = self._reference(tile, rows, cols)
        return self._per_row(ref), self._per_row(self._sum(self._evaluate(self._row.psi, tile, ref), rows, cols))

    def weigh(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        tile = self._score(rows, cols, self._kept_tile(rows, cols))
        ref = self._reference(tile, rows, cols)
        sums = self._map(tile, ref, rows, cols)
        self._kept[cols.start] = tile
        return self._per_row(ref), self._per_row(sums)

    def accumulate(self, rows: slice, cols: slice, alpha: Tensor, own: Tensor | None) -> None:
        self._accumulate(self._kept.pop(cols.start), rows, cols, alpha, own)

    def sweep(self, rows: slice, cols: slice, ref: Tensor | None, alpha: Tensor, own: Tensor) -> Tensor:
        tile = self._score(rows, cols, self._tile("scores"))
        if ref is None:
            ref = self._reference(tile, rows, cols)
        else:
            ref = ref.to(self._p.score_dtype).reshape(-1, 1)
            self._own(tile, rows, cols, -torch.inf)
        sums = self._map(tile, ref, rows, cols)
        self._accumulate(tile, rows, cols, alpha, own)
        return self._per_row(sums)

    def whole(self, kappa: float) -> tuple[Tensor, Scores] | None:
        return None

    def rescale(self, factor: Tensor) -> None:
        multiply((self._grad_c, self._grad_h), factor)

    def accumulate_own(self, own: Tensor) -> None:
        p = self._p
        for cols in blocks(p.held, self._staging_images, p.here.start):
            self._accumulate_own(p.here, cols, own)

    def _score(self, rows: slice, cols: slice, out: Tensor) -> Tensor:
        g = self._g[rows].flatten(0, 1)  # (rows, K)
        c = self._locals(cols).flatten(0, 1)  # (cols, K)
        tile = out[: g.shape[0] * c.shape[0]].view(g.shape[0], c.shape[0])
        return self._soft_clip(torch.mm(g, c.t(), out=tile))

    def _soft_clip(self, scores: Tensor) -> Tensor:
        return scores if self._clip is None else scores.div_(self._clip).tanh_().mul_(self._clip)

    def _slope(self, clipped: Tensor, out: Tensor | None = None) -> Tensor:
        """Derivative of the soft clip at scores that are clipped already."""
        assert self._clip is not None
        return torch.div(clipped, self._clip, out=out).square_().neg_().add_(1.0)

    def _reference(self, tile: Tensor, rows: slice, cols: slice) -> Tensor:
        """The exact maximum over the block's negatives, (rows, 1): no guess, so no repair."""
        if self._row.family == "pointwise":
            return tile.new_zeros(tile.shape[0], 1)
        self._own(tile, rows, cols, -torch.inf)
        return finite(tile.amax(1, keepdim=True))

    def _map(self, tile: Tensor, ref: Tensor, rows: slice, cols: slice) -> Tensor:
        """Turn scores into weights phi in place; the row sums of psi, (rows,)."""
        slope = None if self._clip is None else self._slope(tile, self._like("slope", tile))
        if not self._row.shares_map:
            sums = self._sum(self._row.psi(tile, ref, out=self._like("psi", tile)), rows, cols)
        self._evaluate(self._row.phi, tile, ref)
        if self._row.shares_map:
            sums = self._sum(tile, rows, cols)
        if slope is not None:
            tile.mul_(slope)
        self._own(tile, rows, cols, 0.0)
        return sums

    def _evaluate(self, term: Term, tile: Tensor, ref: Tensor) -> Tensor:
        """A term of the tile's scores, in place of them."""
        if term.in_place:
            return term(tile, ref, out=tile)
        return tile.copy_(term(tile, ref, out=self._like("psi", tile)))

    def _sum(self, psi: Tensor, rows: slice, cols: slice) -> Tensor:
        self._own(psi, rows, cols, 0.0)
        return psi.sum(1)

    def _own(self, tile: Tensor, rows: slice, cols: slice, value: float) -> None:
        """Overwrite the own-image pairs of a tile, its block diagonal."""
        images = _both(rows, cols)
        if images is not None:
            blocks = tile.view(rows.stop - rows.start, self._p.P, cols.stop - cols.start, self._p.L)
            blocks[within(images, rows), :, within(images, cols)].diagonal(dim1=0, dim2=2).fill_(value)

    def _accumulate(self, tile: Tensor, rows: slice, cols: slice, alpha: Tensor, own: Tensor | None) -> None:
        alpha = alpha.to(self._p.score_dtype).reshape(-1, 1)  # (rows, 1)
        if self._grad_h is not None:
            grad = self._grad_h[rows].flatten(0, 1)
            product = self._product(grad)
            torch.mm(tile, self._locals(cols).flatten(0, 1), out=product)
            if cols.start == self._p.here.start:
                torch.mul(product, alpha, out=grad)
            else:
                grad.addcmul_(product, alpha)
        if self._grad_c is not None:
            g = self._g[rows].flatten(0, 1)
            scaled = torch.mul(g, alpha, out=self._product(g))
            self._grad_c[self._here(cols)].flatten(0, 1).addmm_(tile.t(), scaled, beta=1 if rows.start else 0)
        if own is not None:
            self._accumulate_own(rows, cols, own)

    def _accumulate_own(self, rows: slice, cols: slice, own: Tensor) -> None:
        images = _both(rows, cols)
        if images is None:
            return
        weights = self._own_of(own, images, rows)
        c, g = self._locals(cols)[within(images, cols)], self._g[images]
        if self._clip is not None:
            weights = weights * self._slope(self._soft_clip(torch.bmm(g, c.transpose(1, 2))))
        if self._grad_h is not None:
            self._grad_h[images].baddbmm_(weights, c)
        if self._grad_c is not None:
            self._grad_c[self._here(images)].baddbmm_(weights.transpose(1, 2), g)

    def _locals(self, cols: slice) -> Tensor:
        """Local features of some images, (cols, L, K) with a matrix's strides: a view, or staged once per block."""
        c = self._c[self._here(cols)]
        if not self._p.staged:
            return c
        block = self._buffer("staging", self._staging_images * self._p.L * self._p.K)[: c.numel()].view(c.shape)
        if self._staged != cols:
            block.copy_(c)
            self._staged = cols
        return block.flatten(1, -2)

    def _kept_tile(self, rows: slice, cols: slice) -> Tensor:
        """This column block's place among the weights kept for a row block."""
        p = self._p
        pool = self._buffer("kept", self._plan.row_images * p.P * p.held * p.L)
        return pool[(rows.stop - rows.start) * p.P * self._here(cols).start * p.L :]

    def _own_of(self, own: Tensor, images: slice, rows: slice) -> Tensor:
        """(images, P, L) of the weights `own`, which are those of the images of `rows` that are here."""
        given = slice(max(rows.start, self._p.here.start), rows.stop)
        return own[within(images, given)].to(self._p.score_dtype)

    def _here(self, images: slice) -> slice:
        """Where these images are among those whose local features this process has."""
        return within(images, self._p.here)

    def _tile(self, name: str) -> Tensor:
        p = self._p
        return self._buffer(name, self._plan.row_images * p.P * self._plan.col_images * p.L)

    def _like(self, name: str, tile: Tensor) -> Tensor:
        return self._tile(name)[: tile.numel()].view_as(tile)

    def _product(self, like: Tensor) -> Tensor:
        return self._buffer("product", self._plan.row_images * self._p.P * self._p.K)[: like.numel()].view_as(like)

    def _buffer(self, name: str, size: int) -> Tensor:
        """Scratch for the whole call: a fresh tile each time would cost more in page faults than its map."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(size, dtype=self._p.score_dtype, device=self._p.device)
        return self._buffers[name]

    def _per_row(self, statistic: Tensor) -> Tensor:
        return statistic.reshape(-1, self._p.P)


def finite(highest: Tensor) -> Tensor:
    """The references of rows with these largest scores; any finite one serves an empty or overflown row."""
    return torch.where(highest.isinf(), 0.0, highest)  # inf - inf would be NaN


def multiply(gradients: Iterable[Tensor | None], factor: Tensor) -> None:
    """Multiply the gradients that are needed by a 0-d factor, in place."""
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(factor)


def _both(rows: slice, cols: slice) -> slice | None:
    """The images that have both their summaries and their locations in a block."""
    images = slice(max(rows.start, cols.start), min(rows.stop, cols.stop))
    return images if images.start < images.stop else None
