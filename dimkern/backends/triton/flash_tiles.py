"""Tiles on a GPU for small K: each gradient is made by a kernel of its own, in which weights never leave the registers.

Two products over the pairs for each gradient, in place of one for the scores and a pair-sized matrix of weights.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...gpu_plan import FLASH_WEIGHT, splits
from ...plan import Plan
from ..torch import finite
from .flash_kernel import gradient
from .tiles import TritonTiles, described, flat


class FlashTiles(TritonTiles):
    """Rows are never blocked: every row sees its columns in one go, a block of them at a time."""

    def __init__(
        self, plan: Plan, c: Tensor, g: Tensor, scale: Tensor, grad_c: Tensor | None, grad_h: Tensor | None
    ) -> None:
        super().__init__(plan, c, g, scale, grad_c, grad_h)
        assert plan.gpu is not None
        assert plan.gpu.flash is not None
        assert plan.row_images == plan.problem.N
        self._chip, self._flash = plan.gpu.chip, plan.gpu.flash
        self._weighed: dict[int, tuple[Tensor, Tensor | None]] = {}

    def weigh(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        if self._grad_h is None:
            ref, sums = self.measure(rows, cols)
            self._weighed[cols.start] = ref, None
            return ref, sums
        top, partial, product = self._by_rows(rows, cols, None)
        ref = finite(top.amax(0))
        factor = (top - ref).exp()
        self._weighed[cols.start] = self._per_row(ref), product.mul_(factor.unsqueeze(-1)).sum(0)
        return self._per_row(ref), self._per_row((partial.double() * factor.double()).sum(0))

    def accumulate(self, rows: slice, cols: slice, alpha: Tensor, own: Tensor | None) -> None:
        assert own is not None  # all rows are closed at once
        ref, product = self._weighed.pop(cols.start)
        own = self._own_weights(cols, own)
        if product is not None:
            self._add_to_summaries(rows, cols, product, alpha, own)
        self._locals_gradient(rows, cols, ref, alpha, own)

    def sweep(self, rows: slice, cols: slice, ref: Tensor | None, alpha: Tensor, own: Tensor) -> Tensor:
        ref = torch.zeros_like(alpha) if ref is None else ref
        own = self._own_weights(cols, own)
        if self._grad_h is None:
            sums = self.measure(rows, cols)[1]
        else:
            _, partial, product = self._by_rows(rows, cols, ref)
            self._add_to_summaries(rows, cols, product.sum(0), alpha, own)
            sums = self._per_row(partial.sum(0, dtype=torch.float64))
        self._locals_gradient(rows, cols, ref, alpha, own)
        return sums

    def _by_rows(self, rows: slice, cols: slice, ref: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of each part of the columns: the references that were found, (parts, R), sums of psi, and of phi * C."""
        p, g, c = self._p, self._rows(rows), self._locals(cols)
        parts, _ = self._parts(g, c)
        top, partial = torch.empty(2, parts, g.shape[0], dtype=torch.float32, device=p.device)
        out = torch.empty(parts, g.shape[0], p.K, dtype=torch.float32, device=p.device)
        nothing = self._scale
        self._launch(g, c, p.P, p.L, cols.start - rows.start, (nothing if ref is None else flat(ref), nothing, nothing),
                     out, partial, top, ROWS=True, RUNNING=ref is None)  # fmt: skip
        return top, partial, out

    def _locals_gradient(self, rows: slice, cols: slice, ref: Tensor, alpha: Tensor, own: Tensor) -> None:
        if self._grad_c is None:
            return
        p, g, c = self._p, self._rows(rows), self._locals(cols)
        grad, (parts, _) = self._grad_c[self._here(cols)].flatten(0, 1), self._parts(c, g)
        out = grad if parts == 1 else torch.empty(parts, *grad.shape, dtype=torch.float32, device=p.device)
        nothing = self._scale
        self._launch(c, g, p.L, p.P, rows.start - cols.start, (flat(ref), flat(alpha), own.contiguous()),
                     out, nothing, nothing, ROWS=False, RUNNING=False)  # fmt: skip
        if parts > 1:
            torch.sum(out, 0, out=grad)

    def _add_to_summaries(self, rows: slice, cols: slice, product: Tensor, alpha: Tensor, own: Tensor) -> None:
        """What a block of columns gives: alpha times sums of phi * C, and what their images' own summaries take."""
        assert self._grad_h is not None
        p, grad, gain = self._p, self._grad_h[rows].flatten(0, 1), flat(alpha).unsqueeze(1)
        if cols.start == p.here.start:
            torch.mul(product, gain, out=grad)
        else:
            grad.addcmul_(product, gain)
        images = self._grad_h[cols]
        c = self._locals(cols)[:, : p.K].to(FLASH_WEIGHT).view(-1, p.L, p.K)
        torch.baddbmm(images, own.to(FLASH_WEIGHT), c, out_dtype=torch.float32, out=images)

    def _parts(self, outer: Tensor, inner: Tensor) -> tuple[int, int]:
        """Into how many parts the inner items are cut so that the chip is busy, and how many items a part has."""
        return splits(self._chip, self._flash, outer.shape[0], inner.shape[0])

    def _launch(
        self, x: Tensor, y: Tensor, A: int, B: int, shift: int, given: tuple[Tensor, Tensor, Tensor], out: Tensor,
        psi: Tensor, top: Tensor, **form: bool,
    ) -> None:  # fmt: skip
        p, tile, (parts, span) = self._p, self._flash, self._parts(x, y)
        copied = y.dtype != FLASH_WEIGHT
        z = y.to(FLASH_WEIGHT) if copied else y
        operands = (x, y, z)
        if self._tma:
            operands = described(x, tile.BM, tile.BK), described(y, tile.BN, tile.BK), described(z, tile.BN, tile.BK)
        with torch.cuda.device_of(x):
            gradient[(triton.cdiv(x.shape[0], tile.BM), parts)](
                *operands, self._scale, *given, out, psi, top, x.stride(0), y.stride(0), z.stride(0), p.K,
                x.shape[0], y.shape[0], x.shape[1], A, B, shift, p.clip or 0.0, span, **self._map, **form,
                COPY=copied, BX=tile.BM, BY=tile.BN, BK=tile.BK, TMA=self._tma, num_warps=tile.warps,
                num_stages=tile.stages,
            )  # fmt: skip
