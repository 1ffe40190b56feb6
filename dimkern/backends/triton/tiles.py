"""Tiles on a GPU: score and map fused in Triton, the two gradient products by cuBLAS through torch.

Owns the operands, the scratch for weights and the launches of one call. Tensor cores read the inputs in their own
half precision, and weights are stored in it too (float16 ones where `gpu_plan.weight_dtype` says so, else bfloat16): a
relative error of half a unit of the last place on a weight, while a score is float32 from its sum on.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...estimators import Scores
from ...gpu_plan import largest_weight, precision, uses_tma
from ...plan import Plan, is_aligned, within
from ..torch import _both, finite, multiply
from . import estimators, kernels

_TOP = 2.0**15  # what the largest weight is stored as in float16, which so keeps those down to 2^-40 of it
_LEAST_ALPHA = 2.0**-100  # of a row's positives' weights: beyond that its negatives are nothing beside them


class TritonTiles:
    """s = scale * <g, c>, softly clipped where the problem says so (MATHS.md §1)."""

    def __init__(
        self,
        plan: Plan,
        c: Tensor,  # (held, L, K) or (held, H, W, K), any strides, any floating dtype but float64
        g: Tensor,  # (N, P, K)
        scale: Tensor,  # 0-d
        grad_c: Tensor | None,  # (held, L, K) float32, contiguous, uninitialised
        grad_h: Tensor | None,  # (N, P, K) the gradient by scale * g
    ) -> None:
        p = plan.problem
        assert plan.gpu is not None
        self._plan, self._p, self._tile, self._tma = plan, p, plan.gpu.tile, uses_tma(plan.gpu.chip, p.operand_dtype)
        self._c, self._grad_c, self._grad_h = c, grad_c, grad_h
        self._operand = p.operand_dtype
        self._weight = plan.weight_dtype
        self._narrow = self._weight == torch.float16
        self._unit = _TOP / largest_weight(p) if self._narrow else 1.0  # weights are stored times this
        self._scale = scale.to(torch.float32)
        self._g = padded_matrix(g.flatten(0, 1), self._operand)  # (R, K rounded up)
        self._scaled: Tensor | None = None
        self._staged: tuple[slice, Tensor] | None = None
        self._own: tuple[Tensor, Tensor] | None = None
        self._kept: dict[int, Tensor] = {}
        self._pool: Tensor | None = None
        self._map = {
            "PSI": getattr(estimators, f"{p.estimator}_psi"),
            "PHI": getattr(estimators, f"{p.estimator}_phi"),
            "CLIP": p.clip is not None,
            "PRECISION": precision(),
        }
        self._lse = p.row.family != "pointwise"

    def positives(self, images: slice) -> Tensor:
        return self._own_scores()[0][self._here(images)]

    def measure(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        top, partial = self._score_map(rows, cols)
        if not self._lse:
            sums = self._per_row(partial.sum(0, dtype=torch.float64))
            return torch.zeros_like(sums), sums
        ref = finite(top.amax(0))
        sums = (partial.double() * (top - ref).double().exp()).sum(0)
        return self._per_row(ref), self._per_row(sums)

    def weigh(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        p = self._p
        e = self._kept_block(rows, cols)
        self._kept[cols.start] = e
        if self._lse:
            ref = self._own_scores()[1][rows].clone()
        else:
            ref = torch.zeros(rows.stop - rows.start, p.P, dtype=torch.float32, device=p.device)
        _, partial = self._score_map(rows, cols, e, ref)
        sums = self._close_rows(rows, cols, e, ref, partial) if self._lse else partial.sum(0, dtype=torch.float64)
        return ref, self._per_row(sums)

    def accumulate(self, rows: slice, cols: slice, alpha: Tensor, own: Tensor | None) -> None:
        e = self._kept.pop(cols.start)
        p, here = self._p, _both(rows, self._p.here)
        if here is not None and own is None:
            self._write_own(e, rows, cols, torch.zeros(here.stop - here.start, p.P, p.L, device=p.device))
        elif here is not None and own is not None:
            # own weights join the kept ones, which are relative to alpha; where alpha has all but vanished it is raised
            # to what is still nothing beside them
            alpha = alpha.clone()
            of_own = alpha[within(here, rows)]
            torch.maximum(of_own, own.abs().amax(-1) * _LEAST_ALPHA, out=of_own)
            relative = torch.where(of_own.unsqueeze(-1) == 0, 0.0, own / of_own.unsqueeze(-1))
            self._write_own(e, rows, cols, relative)
        self._products(e, rows, cols, alpha)

    def sweep(self, rows: slice, cols: slice, ref: Tensor | None, alpha: Tensor, own: Tensor) -> Tensor:
        e = self._kept_block(rows, cols)
        ref = torch.zeros_like(alpha) if ref is None else ref
        if self._narrow:
            alpha, own = alpha * self._unit, own * self._unit
        _, partial = self._score_map(rows, cols, e, ref, alpha)
        self._write_own(e, rows, cols, own)
        self._products(e, rows, cols, None)
        return self._per_row(partial.sum(0, dtype=torch.float64))

    def whole(self, kappa: float) -> tuple[Tensor, Scores] | None:
        """In as few launches as can be: statistics, finish, weights, two products."""
        p = self._p
        assert self._plan.gpu is not None
        if not self._plan.gpu.few_launches:
            return None
        everything = slice(0, p.N)
        c, e = self._locals(everything), self._kept_block(everything, everything)
        top, partial = self._score_map(everything, everything)
        f32 = {"dtype": torch.float32, "device": p.device}
        scores, own = torch.empty(2, p.N, p.P, p.L, **f32)
        negatives, ref, gain, losses = torch.empty(4, p.N, p.P, **f32)
        scaled = self._g if self._narrow else torch.empty(*self._g.shape, dtype=self._weight, device=p.device)
        with torch.cuda.device_of(c):
            kernels.finish_rows[(p.rows,)](
                self._g, c, self._scale, partial, top, scores, negatives, own, ref, gain, losses, scaled,
                partial.shape[0], self._g.stride(0), c.stride(0), p.rows, p.P, p.L, c.shape[1],
                math.log(kappa) if kappa else -math.inf, float((p.N - 1) * p.L), p.clip or 0.0, self._unit,
                F=getattr(estimators, f"{p.estimator}_f"), DF=getattr(estimators, f"{p.estimator}_df"),
                LSE=self._lse, CLIP=p.clip is not None, SCALED=not self._narrow, BT=32, BL=16, BK=128, num_warps=4,
            )  # fmt: skip
        self._score_map(everything, everything, e, ref, gain, own)
        self._scaled = None if self._narrow else scaled[:, : p.K]
        self._products(e, everything, everything, None)
        return losses.sum(), Scores(scores, negatives)

    def rescale(self, factor: Tensor) -> None:
        multiply((self._grad_c, self._grad_h), factor)

    def accumulate_own(self, own: Tensor) -> None:
        p = self._p
        g = self._scaled_summaries().view(p.N, p.P, p.K)
        for cols in self._plan.col_blocks():
            weights = self._own_weights(cols, own)
            c = self._locals(cols)[:, : p.K].float().view(-1, p.L, p.K)
            if self._grad_h is not None:
                self._grad_h[cols].baddbmm_(weights, c)
            if self._grad_c is not None:
                self._grad_c[self._here(cols)].baddbmm_(weights.mT, g[cols])

    def _own_weights(self, cols: slice, own: Tensor) -> Tensor:
        """By the scores before the clip, (images of cols, P, L) float32."""
        own = own[self._here(cols)].float()
        return own if self._p.clip is None else own * (1.0 - (self.positives(cols) / self._p.clip).square())

    def _score_map(
        self,
        rows: slice,
        cols: slice,
        e: Tensor | None = None,
        ref: Tensor | None = None,
        gain: Tensor | None = None,
        own: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Launch a block's tiles: their references, where none are given, and row sums of psi, (column tiles, rows)."""
        p, g, c = self._p, self._rows(rows), self._locals(cols)
        tile, R, M, K = self._tile, g.shape[0], c.shape[0], g.shape[1]
        partial = torch.empty(triton.cdiv(M, tile.BN), R, dtype=torch.float32, device=p.device)
        top = torch.empty_like(partial) if e is None and self._lse else partial
        keep, nothing = e is not None, self._scale
        operands = (described(g, tile.BM, tile.BK), described(c, tile.BN, tile.BK)) if self._tma else (g, c)
        with torch.cuda.device_of(g):
            kernels.score_map[(triton.cdiv(R, tile.BM) * triton.cdiv(M, tile.BN),)](
                *operands, self._scale, nothing if ref is None else flat(ref), nothing if gain is None else flat(gain),
                nothing if own is None else own, nothing if e is None else e, partial, top,
                g.stride(0), c.stride(0), 0 if e is None else e.stride(0), R, M, K, p.P, p.L, cols.start - rows.start,
                p.clip or 0.0, **self._map, LSE=self._lse, KEEP=keep, GAIN=gain is not None, OWN=own is not None,
                TMA=self._tma, BM=tile.BM, BN=tile.BN, BK=tile.BK, GROUP=16, num_warps=tile.warps,
                num_stages=tile.stages,
            )  # fmt: skip
        return top, partial

    def _close_rows(self, rows: slice, cols: slice, e: Tensor, ref: Tensor, partial: Tensor) -> Tensor:
        p, g, c = self._p, self._rows(rows), self._locals(cols)
        R, M, K = g.shape[0], c.shape[0], g.shape[1]
        sums = torch.empty(R, dtype=torch.float32, device=p.device)
        BM, BN = 64, 64
        with torch.cuda.device_of(g):
            kernels.close_rows[(triton.cdiv(R, BM),)](
                g, c, self._scale, ref, e, partial, sums, partial.shape[0], g.stride(0), c.stride(0), e.stride(0),
                R, M, K, p.P, p.L, cols.start - rows.start, p.clip or 0.0, **self._map, BM=BM, BN=BN, BK=32,
                BT=32, num_warps=4, num_stages=2,
            )  # fmt: skip
        return sums

    def _own_scores(self) -> tuple[Tensor, Tensor]:
        """Scores of the own-image pairs here, (held, P, L), and each row's largest, (N, P); 0 where none is here."""
        if self._own is None:
            p = self._p
            scores = torch.empty(p.held, p.P, p.L, dtype=torch.float32, device=p.device)
            top = torch.zeros(p.N, p.P, dtype=torch.float32, device=p.device)
            for cols in self._plan.col_blocks():
                g, c = self._rows(cols), self._locals(cols)
                with torch.cuda.device_of(c):
                    kernels.own_scores[(g.shape[0],)](
                        g, c, self._scale, scores[self._here(cols)], top[cols], g.stride(0), c.stride(0), p.P, p.L,
                        c.shape[1], p.clip or 0.0, CLIP=p.clip is not None, BL=16, BK=128, num_warps=4,
                    )  # fmt: skip
            self._own = scores, top
        return self._own

    def _write_own(self, e: Tensor, rows: slice, cols: slice, own: Tensor) -> None:
        """The weights of the own-image pairs of `rows` that are here, (images, P, L), into the block's."""
        p, images = self._p, _both(rows, cols)
        if images is None:
            return
        own = own[within(images, _both(rows, p.here) or images)].float().contiguous()
        scores = self._own_scores()[0][self._here(images)] if p.clip is not None else own
        with torch.cuda.device_of(e):
            kernels.write_own[((images.stop - images.start) * p.P,)](
                e[(images.start - rows.start) * p.P :], own, scores, e.stride(0), p.P, p.L, images.start - cols.start,
                p.clip or 0.0, CLIP=p.clip is not None, BL=min(128, triton.next_power_of_2(p.L)), num_warps=1,
            )  # fmt: skip

    def _products(self, e: Tensor, rows: slice, cols: slice, alpha: Tensor | None) -> None:
        """The two gradient products of a block's weights, which alpha, (rows, P), has yet to scale."""
        p, e = self._p, e[:, : (cols.stop - cols.start) * self._p.L]
        gain = None if alpha is None else flat(alpha).unsqueeze(1)
        if self._grad_h is not None:
            c = self._locals(cols)[:, : p.K].to(self._weight)
            grad = self._grad_h[rows].flatten(0, 1)
            if gain is None:
                add_product(grad, e, c, add=cols.start > p.here.start, unit=self._unit)
            elif cols.start == p.here.start:
                add_product(grad, e, c, add=False)
                grad.mul_(gain)
            else:
                grad.addcmul_(add_product(torch.empty_like(grad), e, c, add=False), gain)
        if self._grad_c is not None:
            grad = self._grad_c[self._here(cols)].flatten(0, 1)
            if self._narrow:  # as they are: scaled ones may leave float16's range
                add_product(grad, e.t(), self._rows(rows)[:, : p.K], add=rows.start > 0, unit=self._unit)
                if rows.stop == p.N:
                    grad.mul_(self._scale)
                return
            g = self._scaled_summaries()[rows.start * p.P : rows.stop * p.P]
            g = (g if gain is None else g * gain).to(self._weight)
            add_product(grad, e.t(), g, add=rows.start > 0)

    def _scaled_summaries(self) -> Tensor:
        """scale * G, (R, K) float32."""
        if self._scaled is None:
            self._scaled = self._g[:, : self._p.K].float() * self._scale
        return self._scaled

    def _rows(self, rows: slice) -> Tensor:
        return self._g[rows.start * self._p.P : rows.stop * self._p.P]

    def _locals(self, cols: slice) -> Tensor:
        """Local features of some images as a matrix in the operand dtype, (columns, K rounded up)."""
        if self._p.in_place:
            return self._c[self._here(cols)].flatten(0, 1)
        if self._staged is None or self._staged[0] != cols:
            self._staged = None
            self._staged = cols, padded_matrix(self._c[self._here(cols)].flatten(0, -2), self._operand)
        return self._staged[1]

    def _kept_block(self, rows: slice, cols: slice) -> Tensor:
        """Room for a block's weights, (rows, columns rounded up): what is beyond the columns is nobody's."""
        p = self._p
        if self._pool is None:
            size = self._plan.row_images * p.P * round_up(self._plan.col_images * p.L)
            kept = -(-p.held // self._plan.col_images) if self._plan.order == "rows outside" else 1
            self._pool = torch.empty(kept, size, dtype=self._weight, device=p.device)
        R, M = (rows.stop - rows.start) * p.P, (cols.stop - cols.start) * p.L
        block = self._pool[self._here(cols).start // self._plan.col_images if len(self._pool) > 1 else 0]
        return block[: R * round_up(M)].view(R, round_up(M))

    def _here(self, images: slice) -> slice:
        """Where these images are among those whose local features this process has."""
        return within(images, self._p.here)

    def _per_row(self, statistic: Tensor) -> Tensor:
        return statistic.reshape(-1, self._p.P)


def padded_matrix(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (rows, K) as a matrix whose rows are a multiple of 16 elements, zeros after K; x itself where it is one."""
    rows, K = x.shape
    if x.dtype == dtype and is_aligned(x):
        return x
    matrix = torch.zeros(rows, round_up(K), dtype=dtype, device=x.device)
    matrix[:, :K] = x
    return matrix


def described(x: Tensor, rows: int, channels: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, channels])


def add_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool, unit: float = 1.0) -> Tensor:
    """out (float32) = a·b / unit, or with `add` out + a·b / unit: accumulated in float32 whatever a and b are."""
    if a.dtype == torch.float32:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if add or unit != 1.0:  # beta = 0: what is in out is not read
        return torch.addmm(out, a, b, beta=float(add), alpha=1.0 / unit, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1).float()


def round_up(size: int) -> int:
    return -(-size // 16) * 16
