"""Tiles by the native CPU library (`kernels/cpu`): score, map and accumulate fused, a tile never leaving the cache.

Blocks inside a block, threads and instruction sets are the library's affair. Local features that are no
matrix of numbers that it multiplies are staged panel by panel, in the cache.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..estimators import Scores
from ..plan import Plan, own_images
from .torch import TorchTiles

_native = torch.ops.dimkern_cpu


class CpuTiles(TorchTiles):
    """The dot critic on a CPU."""

    def __init__(
        self,
        plan: Plan,
        c: Tensor,  # (N, L, K)
        g: Tensor,  # (N, P, K)
        scale: Tensor,  # 0-d
        grad_c: Tensor | None,  # (N, L, K) in the plan's summed_dtype
        grad_h: Tensor | None,  # (N, P, K)
    ) -> None:
        super().__init__(plan, c, g, scale, grad_c, grad_h)
        p = plan.problem
        if p.staged and p.strided:  # the kernels stage panels by themselves
            self._staging_images = own_images(p)
        self._factor = scale.item()
        # G (N, P, K) in what the kernels multiply; no call of torch where it is that already
        dtype = torch.bfloat16 if p.bf16_products else p.score_dtype
        self._rows = g if g.dtype == dtype and g.is_contiguous() else g.to(dtype).contiguous()
        self._own_seen = [False] * p.held
        self._packed: tuple[slice, tuple[Tensor, Tensor]] | None = None
        self._weighed: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def _own_scores(self) -> Tensor:
        p = self._p
        return torch.empty(p.held, p.P, p.L, dtype=p.score_dtype)

    def positives(self, images: slice) -> Tensor:
        here = self._here(images)
        return self._own_scores[here] if all(self._own_seen[here]) else super().positives(images)

    def measure(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        return self._weigh(rows, cols, None, None)

    def weigh(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        keep, panel_ref = self._keep(*self._matrices(rows, cols), cols.start)
        ref, sums = self._weigh(rows, cols, keep, panel_ref)
        self._weighed[cols.start] = keep, panel_ref, ref
        return ref, sums

    def accumulate(self, rows: slice, cols: slice, alpha: Tensor, own: Tensor | None) -> None:
        keep, panel_ref, ref = self._weighed.pop(cols.start)
        self._accumulate_native(rows, cols, keep, panel_ref, ref, alpha, own)

    def sweep(self, rows: slice, cols: slice, ref: Tensor | None, alpha: Tensor, own: Tensor) -> Tensor:
        return self._accumulate_native(rows, cols, None, None, ref, alpha, own)

    def whole(self, kappa: float) -> tuple[Tensor, Scores] | None:
        p, plan = self._p, self._plan
        known = p.row.family == "pointwise" or (self._grad_c is None and self._grad_h is None)
        if plan.row_images < p.N or plan.col_images < p.N or not (known or plan.order == "rows outside"):
            return None
        c = self._c if self._c.ndim == 3 else self._locals(slice(0, p.N))
        loss, positives, negatives = _native.mean_loss.default(
            self._rows, c, p.estimator, self._factor, p.clip or 0.0, kappa, self._grad_h, self._grad_c
        )
        return loss, Scores(positives, negatives)

    def _keep(self, g: Tensor, c: Tensor, first_image: int) -> tuple[Tensor, Tensor]:
        """Room for a block's weights, and for the references of its panels."""
        kept, panels = _native.kept_sizes.default(g, c.shape[0] * c.shape[1])
        return self._buffer(f"kept {first_image}", kept), self._buffer(f"panels {first_image}", panels)

    def _weigh(self, rows: slice, cols: slice, keep: Tensor | None, panel_ref: Tensor | None) -> tuple[Tensor, Tensor]:
        g, c = self._matrices(rows, cols)
        ref, sums = _native.weigh.default(
            g, c, self._pack(rows)[0], *self._where(rows, cols), self._own_scores, keep, panel_ref
        )
        for image in range(max(rows.start, cols.start), min(rows.stop, cols.stop)):
            self._own_seen[image - self._p.here.start] = True
        return self._per_row(ref), self._per_row(sums)

    def _accumulate_native(
        self,
        rows: slice,
        cols: slice,
        keep: Tensor | None,
        panel_ref: Tensor | None,
        ref: Tensor | None,
        alpha: Tensor,
        own: Tensor | None,
    ) -> Tensor:
        g, c = self._matrices(rows, cols)
        dtype = self._p.score_dtype
        sums = _native.accumulate.default(
            g,
            c,
            *self._pack(rows),
            *self._where(rows, cols),
            keep,
            panel_ref,
            None if ref is None else ref.to(dtype).contiguous(),
            alpha.to(dtype).contiguous(),
            None if own is None else self._of_rows(own.to(dtype).contiguous(), rows),
            self._own_scores,
            None if self._grad_h is None else self._grad_h[rows],
            None if self._grad_c is None else self._grad_c[self._here(cols)],
            cols.start > self._p.here.start,
            rows.start > 0,
        )
        return self._per_row(sums)

    def _matrices(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        """Summaries (images, P, K), and local features (cols, L, K), which the kernels stage by panels if need be."""
        return self._rows[rows], self._c[self._here(cols)] if self._c.ndim == 3 else self._locals(cols)

    def _where(self, rows: slice, cols: slice) -> tuple[str, float, float, int, int]:
        p, first = self._p, self._p.here.start  # the kernels count from the first image here; rows may lie before it
        row0, col0 = (rows.start - first) * p.P, (cols.start - first) * p.L
        return p.estimator, self._factor, p.clip or 0.0, row0, col0

    def _of_rows(self, own: Tensor, rows: slice) -> Tensor | None:
        """Weights of the own-image pairs of all `rows`, as the kernels index them, from those whose images are here."""
        before, after = max(0, self._p.here.start - rows.start), max(0, rows.stop - self._p.here.stop)
        return (pad(own, (0, 0, 0, 0, before, after)) if before or after else own) if len(own) else None

    def _pack(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The summaries as the kernels read them, packed once per row block."""
        if self._packed is None or self._packed[0] != rows:
            self._packed = rows, _native.pack.default(self._rows[rows], self._factor, self._p.needs_grad)
        return self._packed[1]
