"""Tiles by the CUDA library (`kernels/cuda`): a whole batch of a classic Deep InfoMax size in five launches.

score and map are one kernel on tensor cores, `finish` another, the two gradient products are cuBLAS's, and `settle`
scales what they leave. A sixth launch copies local features that are no matrix of 16-byte rows. Nothing waits for
the host, so a CUDA graph may capture it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..estimators import Scores
from ..plan import Plan, is_matrix_view
from .torch import TorchTiles

_native = torch.ops.dimkern_cuda
_WIDE = 16  # bytes that a thread copies at a time: the rows of all matrices begin and end at multiples of it


class CudaTiles(TorchTiles):
    """The dot critic on one NVIDIA GPU of compute capability 8.0 or later."""

    def __init__(
        self,
        plan: Plan,
        c: Tensor,  # (N, L, K) or (N, H, W, K), any strides
        g: Tensor,  # (N, P, K) of the same dtype
        scale: Tensor,  # 0-d
        grad_c: Tensor | None,  # (N, L, K) float32, contiguous, uninitialised
        grad_h: Tensor | None,  # (N, P, K) the gradient by scale * g
    ) -> None:
        super().__init__(plan, c, g, scale, grad_c, grad_h)
        self._factor = scale.to(torch.float32)
        self._own_scores: Tensor | None = None  # (N, P, L)

    def whole(self, kappa: float) -> tuple[Tensor, Scores] | None:
        p = self._p
        g, c = _wide_rows(self._given), _wide_rows(self._c)  # (R, K), (M, K), K perhaps padded
        keep = g.new_empty(p.rows, _padded(p.N * p.L, g.dtype)) if p.needs_grad else None
        # float16 lacks the range for alpha∘G: there the weights take alpha, and one factor comes out at the end
        folded = g.dtype == torch.float16
        weighted = None if folded or self._grad_c is None else torch.empty_like(g)
        statistics = self._weigh(g, c, keep)
        losses, negatives, alpha = self._finish(g, statistics, kappa, keep, weighted)
        if keep is not None:
            weights = keep[:, : p.N * p.L]  # w = alpha ∘ weights, own-image pairs among them
            if self._grad_h is not None:
                _product(weights, c[:, : p.K], out=self._grad_h.flatten(0, 1))
            if self._grad_c is not None:
                _product(weights.t(), (g if weighted is None else weighted)[:, : p.K], out=self._grad_c.flatten(0, 1))
        in_product = self._grad_c if folded else None
        loss = _native.settle.default(losses, alpha, self._factor, self._grad_h, in_product)
        return loss, Scores(self.positives(slice(0, p.N)), negatives.view(p.N, p.P))

    def positives(self, images: slice) -> Tensor:
        return super().positives(images) if self._own_scores is None else self._own_scores[images]

    def measure(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        p = self._p
        assert (rows, cols) == (slice(0, p.N), slice(0, p.N)), "the plan takes the batch as a whole"
        g = _wide_rows(self._given)
        _, negatives, _ = self._finish(g, self._weigh(g, _wide_rows(self._c), None), 0.0, None, None)
        # closed already; the driver closes statistics itself, so it is given those that close to the same
        pairs = (p.N - 1) * p.L
        if p.row.family == "pointwise":
            return self._per_row(torch.zeros_like(negatives)), self._per_row(negatives * pairs)
        ref = negatives if p.row.family == "row_lse" else negatives + math.log(pairs)
        return self._per_row(ref), self._per_row(torch.ones_like(negatives))

    def _weigh(self, g: Tensor, c: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """score + map: references and sums of each panel; own-image scores, and weights where they are kept."""
        p = self._p
        self._own_scores = g.new_empty(p.N, p.P, p.L, dtype=torch.float32)
        ref, sums = _native.weigh.default(
            g, c, self._factor, p.estimator, p.clip or 0.0, p.P, p.L, 0, 0, p.N, self._own_scores, keep
        )
        return ref, sums

    def _finish(
        self, g: Tensor, statistics: tuple[Tensor, Tensor], kappa: float, keep: Tensor | None, weighted: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(losses, negatives, alpha), (R,) each."""
        p = self._p
        losses, negatives, alpha = _native.finish.default(
            *statistics, self._own_scores, g, self._factor, p.estimator, p.clip or 0.0, kappa, p.P, p.L, keep, weighted
        )
        return losses, negatives, alpha


def chain(grad_c: Tensor, grad_h: Tensor, upstream: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients by c and g, of a dtype, from saved ones by c and scale * g: one launch where torch has five."""
    by_c, by_g = _native.chain.default(grad_c, grad_h, upstream, scale.to(torch.float32), dtype)
    return by_c, by_g


def _wide_rows(x: Tensor) -> Tensor:
    """Vectors (N, ..., K) as a matrix of wide rows: in place where they are one, else copied, padded with zeros."""
    K, rows = x.shape[-1], x.shape[:-1].numel()
    width = _padded(K, x.dtype)
    if width == K and is_matrix_view(x):
        matrix = x.flatten(0, -2)
        if matrix.stride(0) * x.element_size() % _WIDE == 0 and x.data_ptr() % _WIDE == 0:
            return matrix
    fresh = torch.empty if width == K else torch.zeros
    wide = fresh(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    wide[..., :K].copy_(x)
    return wide.view(rows, width)


def _padded(count: int, dtype: torch.dtype) -> int:
    """So many numbers of a dtype, rounded up to wide ones."""
    wide = _WIDE // dtype.itemsize
    return -(-count // wide) * wide


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b, summed and left in float32."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
