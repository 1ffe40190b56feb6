"""Tiles of the pair MLP in plain PyTorch, on any device: the hidden layers of one tile of pairs at a time.

With U = w ∘ [z > 0], the weight of each pair where the second layer's unit is on, everything that the weights
and the layers below need is linear in U, and the values of that layer are not needed again:

    Q = Uᵀ·relu(a + b)    gives ∂W2 = w3 ∘ Q and, with q = Uᵀ·1, ∂w3 = (W2 ∘ Q)·1 + b2 ∘ q and ∂b2 = w3 ∘ q
    U·(w3 ∘ W2)           is the gradient by relu(a + b)

So a block that waits for its row's sum keeps one truth value a unit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..critics import PairMLP
from ..plan import Plan, blocks, within
from .torch import TorchTiles, _both, multiply


class PairMLPGradients(NamedTuple):
    """Buffers, uninitialised, None where nobody needs one; shapes as in PairMLP."""

    a: Tensor | None
    b: Tensor | None
    w2: Tensor | None  # this one and those below are all there or all None
    b2: Tensor | None
    w3: Tensor | None
    b3: Tensor | None


class PairMLPTiles(TorchTiles):
    """s = w3·relu(W2·relu(a + b) + b2) + b3, softly clipped where the problem says so (MATHS.md §1)."""

    def __init__(self, plan: Plan, layers: PairMLP, grads: PairMLPGradients) -> None:
        one = torch.ones((), dtype=plan.problem.score_dtype, device=plan.problem.device)
        super().__init__(plan, layers.a, layers.b, one, grads.a, grads.b)
        self._w2, self._b2, self._w3, self._b3 = layers[2:]
        self._grads = grads
        for gradient in grads:
            if gradient is not None:
                gradient.zero_()
        self._wide = torch.float32 if plan.problem.device.type == "mps" else torch.float64
        self._weight_sum = torch.zeros((), dtype=self._wide, device=plan.problem.device)
        # (H, H), what carries U to the first layer
        self._down = self._w3.unsqueeze(1) * self._w2 if grads.a is not None or grads.b is not None else None
        if self._clip is not None and any(gradient is not None for gradient in grads):
            # now: in a tile the scratch of the layers is in use
            self._own_slope = self._slope(self.positives(plan.problem.here))  # (held, P, L)

    def finish_gradients(self) -> None:
        """Turn Q and q, which were accumulated in the places of ∂W2 and ∂b2, into the gradients."""
        d_w2, d_b2, d_w3, d_b3 = self._grads[2:]
        if d_w2 is None or d_b2 is None or d_w3 is None or d_b3 is None:
            return
        torch.linalg.vecdot(self._w2, d_w2, out=d_w3)
        d_w3.addcmul_(self._b2, d_b2)
        d_w2.mul_(self._w3.unsqueeze(1))
        d_b2.mul_(self._w3)
        d_b3.copy_(self._weight_sum)

    def positives(self, images: slice) -> Tensor:
        p = self._p
        scores = torch.empty(images.stop - images.start, p.P, p.L, dtype=p.score_dtype, device=p.device)
        b, a = self._g[images].unsqueeze(2), self._c[self._here(images)].unsqueeze(1)
        for chunk in blocks(len(scores), self._plan.row_images * self._plan.col_images):
            self._hide(b[chunk], a[chunk])
            self._score_hidden(scores[chunk].view(-1))
        return self._soft_clip(scores)

    def weigh(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        statistics = super().weigh(rows, cols)
        outer = self._layer("outer", self._pairs(rows, cols))
        self._kept_units(rows, cols).copy_(outer)  # outer is never negative; five times as fast as a comparison
        return statistics

    def accumulate(self, rows: slice, cols: slice, alpha: Tensor, own: Tensor | None) -> None:
        self._hide(*self._block(rows, cols))
        self._layer("outer", self._pairs(rows, cols)).copy_(self._kept_units(rows, cols).view(torch.int8))
        super().accumulate(rows, cols, alpha, own)

    def rescale(self, factor: Tensor) -> None:
        super().rescale(factor)
        multiply((*self._grads[2:4], self._weight_sum), factor)

    def accumulate_own(self, own: Tensor) -> None:
        p = self._p
        for images in blocks(p.held, min(self._plan.row_images, self._plan.col_images), p.here.start):
            n, here = images.stop - images.start, self._here(images)
            self._hide(self._g[images].unsqueeze(2), self._c[here].unsqueeze(1))
            self._score_hidden(torch.empty(n * p.P * p.L, dtype=p.score_dtype, device=p.device))
            by_hidden = self._back(self._own_weights(images, own[here]))
            if by_hidden is None:
                continue
            by_hidden = by_hidden.view(n, p.P, p.L, p.K)
            if self._grad_c is not None:
                self._grad_c[here] += by_hidden.sum(1)
            if self._grad_h is not None:
                self._grad_h[images] += by_hidden.sum(2)

    def _score(self, rows: slice, cols: slice, out: Tensor) -> Tensor:
        self._hide(*self._block(rows, cols))
        tile = out[: self._pairs(rows, cols)]
        self._score_hidden(tile)
        return self._soft_clip(tile.view(-1, (cols.stop - cols.start) * self._p.L))

    def _accumulate(self, tile: Tensor, rows: slice, cols: slice, alpha: Tensor, own: Tensor | None) -> None:
        p = self._p
        tile.mul_(alpha.to(p.score_dtype).reshape(-1, 1))  # (rows, cols)
        images = _both(rows, cols)
        if own is not None and images is not None:
            weights = self._own_weights(images, self._own_of(own, images, rows))
            pairs = tile.view(rows.stop - rows.start, p.P, cols.stop - cols.start, p.L)
            diagonal = pairs[within(images, rows), :, within(images, cols)].diagonal(dim1=0, dim2=2)  # (P, L, images)
            diagonal.copy_(weights.permute(1, 2, 0))
        by_hidden = self._back(tile)
        if by_hidden is None:
            return
        by_hidden = by_hidden.view(*tile.shape, p.K)
        if self._grad_c is not None:
            self._grad_c[self._here(cols)].flatten(0, 1).add_(by_hidden.sum(0))
        if self._grad_h is not None:
            self._grad_h[rows].flatten(0, 1).add_(by_hidden.sum(1))

    def _own_weights(self, images: slice, own: Tensor) -> Tensor:
        """The weights (images, P, L) of own-image pairs, the slope of the soft clip in them."""
        weights = own.to(self._p.score_dtype)
        return weights if self._clip is None else weights * self._own_slope[self._here(images)]

    def _hide(self, b: Tensor, a: Tensor) -> None:
        """The first hidden layer of the pairs of b and a, which broadcast to (..., H)."""
        shape = [max(sizes) for sizes in zip(b.shape, a.shape, strict=True)]
        inner = self._layer("inner", math.prod(shape[:-1])).view(shape)
        torch.add(b, a, out=inner).relu_()

    def _score_hidden(self, out: Tensor) -> None:
        """The second hidden layer and the scores (pairs,) of the first layer in place."""
        inner, outer = (self._layer(name, len(out)) for name in ("inner", "outer"))
        torch.mm(inner, self._w2.t(), out=outer)
        outer.add_(self._b2).relu_()
        torch.mv(outer, self._w3, out=out).add_(self._b3)

    def _back(self, weights: Tensor) -> Tensor | None:
        """Add the weights' gradients; the gradient (pairs, H) by a + b, valid until the next tile."""
        w = weights.reshape(-1, 1)  # (pairs, 1)
        inner, units = (self._layer(name, len(w)) for name in ("inner", "outer"))
        _masked(w.expand_as(units), units, out=units)
        if self._grads.w2 is not None and self._grads.b2 is not None:
            self._grads.w2.addmm_(units.t(), inner)
            self._grads.b2.add_(units.sum(0))
            self._weight_sum += w.sum(dtype=self._wide)
        if self._down is None:
            return None
        by_hidden = torch.mm(units, self._down, out=self._layer("by hidden", len(w)))
        _masked(by_hidden, inner, out=by_hidden)
        return by_hidden

    def _block(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        return self._g[rows].flatten(0, 1).unsqueeze(1), self._c[self._here(cols)].flatten(0, 1).unsqueeze(0)

    def _pairs(self, rows: slice, cols: slice) -> int:
        p = self._p
        pairs: int = (rows.stop - rows.start) * p.P * (cols.stop - cols.start) * p.L
        return pairs

    def _layer(self, name: str, pairs: int) -> Tensor:
        """Scratch for a hidden layer of a tile, (pairs, H)."""
        p, plan = self._p, self._plan
        most = plan.row_images * p.P * plan.col_images * p.L
        return self._buffer(name, most * p.K)[: pairs * p.K].view(pairs, p.K)

    def _kept_units(self, rows: slice, cols: slice) -> Tensor:
        """This column block's place among the row block's truth values, (pairs, H)."""
        p = self._p
        if "units" not in self._buffers:
            most = self._plan.row_images * p.P * p.held * p.L * p.K
            self._buffers["units"] = torch.empty(most, dtype=torch.bool, device=p.device)
        start = (rows.stop - rows.start) * p.P * self._here(cols).start * p.L * p.K
        pairs = self._pairs(rows, cols)
        return self._buffers["units"][start : start + pairs * p.K].view(pairs, p.K)


def _masked(x: Tensor, where_positive: Tensor, out: Tensor) -> None:
    """x where the other is positive, else 0: a product with a truth value would make NaN of an infinite weight."""
    torch.ops.aten.threshold_backward.grad_input(x, where_positive, 0, grad_input=out)
