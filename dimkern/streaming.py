"""The driver of MATHS.md §3: score -> map -> finish -> accumulate, over blocks of pairs.

Owns the loops, the row statistics and the moment at which a weight is known. Knows nothing of
critics, devices or how a tile is scored and mapped: that is `Tiles`, one for each backend. Statistics
of a row are merged here and nowhere else, so a process group or another order of blocks changes only this file.

Two loop orders, chosen by the plan:

- rows outside: the unscaled weights E = phi(s) of a block of rows are kept; when the whole row has been
  seen its alpha is known and scales the small matrices. Three GEMMs for the log-sum-exp families.
- columns outside: alpha is known before the weights are made, so a tile is scored, mapped and
  accumulated while it is in cache. Three GEMMs for pointwise estimators; the log-sum-exp families
  need a first sweep for their row sums, four.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from .estimators import Scores, item_losses, mean_loss_weights
from .plan import Plan, Problem


class Tiles(Protocol):
    """One critic on one device, bound to its inputs and to the gradient buffers it adds to.

    `rows` and `cols` are slices of images: rows*P summaries against cols*L locations. The statistics of
    `measure`, `weigh` and `sweep` leave own-image pairs out; their weights, (rows, P, L), come as `own`. A
    (row, column) block is accumulated at most once, in ascending order of either slice.
    """

    def positives(self, images: slice) -> Tensor:
        """Scores of the own-image pairs, (images, P, L); cheapest once their blocks have been scored."""

    def measure(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        """score + map for the statistics alone: (the reference used, sum of psi), each (rows, P)."""

    def weigh(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        """The same, and keep the block's phi until `accumulate`."""

    def accumulate(self, rows: slice, cols: slice, alpha: Tensor, own: Tensor | None) -> None:
        """Add the gradients of a block that `weigh` kept; alpha is (rows, P), own None leaves own pairs out."""

    def sweep(self, rows: slice, cols: slice, ref: Tensor | None, alpha: Tensor, own: Tensor) -> Tensor:
        """score + map + accumulate in one, nothing kept; returns the sum of psi, (rows, P)."""

    def whole(self, kappa: float) -> tuple[Tensor, Scores] | None:
        """`mean_loss` in the backend's own hands, of a whole batch at once; None where that is no better."""

    def rescale(self, factor: Tensor) -> None:
        """Multiply every gradient accumulated so far by a 0-d factor."""

    def accumulate_own(self, own: Tensor) -> None:
        """Add the gradients of all own-image pairs, (N, P, L), that `accumulate` left out."""


def measure(tiles: Tiles, plan: Plan, kappa: float) -> Scores:
    """The scores' statistics without any gradient: one GEMM."""
    p = plan.problem
    total = _Sums(plan)
    for cols in plan.col_blocks():
        for rows in plan.row_blocks():
            total.add(rows, *tiles.measure(rows, cols))
    return Scores(tiles.positives(slice(0, p.N)), finish(p, total.value, kappa))


def differentiate(tiles: Tiles, plan: Plan, negatives: Tensor, d_positives: Tensor, d_negatives: Tensor) -> None:
    """Accumulate the gradients of sum(d_positives * positives) + sum(d_negatives * negatives)."""
    ref, alpha = weights_of(plan.problem, negatives, d_negatives)
    for cols in plan.col_blocks():
        for rows in plan.row_blocks():
            tiles.sweep(rows, cols, None if ref is None else ref[rows], alpha[rows], d_positives[rows])


def mean_loss(tiles: Tiles, plan: Plan, kappa: float) -> tuple[Tensor, Scores]:
    """The mean of the item losses, the statistics, and the gradients that are needed, accumulated in the same pass."""
    whole = tiles.whole(kappa)
    if whole is not None:
        return whole
    run = _in_blocks if plan.problem.needs_grad else measure
    scores = run(tiles, plan, kappa)
    return item_losses(plan.problem.row, *scores).mean(), scores


def _in_blocks(tiles: Tiles, plan: Plan, kappa: float) -> Scores:
    if plan.order == "rows outside":
        return _rows_outside(tiles, plan, kappa)
    if plan.problem.row.family == "pointwise":
        return _one_sweep(tiles, plan)
    scores = measure(tiles, plan, kappa)
    p = plan.problem
    differentiate(tiles, plan, scores.negatives, *mean_loss_weights(p.row, *scores, p.rows))
    return scores


def _one_sweep(tiles: Tiles, plan: Plan) -> Scores:
    """Pointwise estimators: alpha needs no statistic, so the sums are made on the way."""
    p = plan.problem
    positives = tiles.positives(slice(0, p.N))
    sums = torch.zeros(p.N, p.P, dtype=wide(p), device=p.device)
    d_positives, d_negatives = mean_loss_weights(p.row, positives, sums, p.rows)
    _, alpha = weights_of(p, sums, d_negatives)
    for cols in plan.col_blocks():
        for rows in plan.row_blocks():
            sums[rows] += tiles.sweep(rows, cols, None, alpha[rows], d_positives[rows])
    return Scores(positives, finish(p, sums, 0.0))


def _rows_outside(tiles: Tiles, plan: Plan, kappa: float) -> Scores:
    """A row block is finished, and its gradients final, before the next one is scored."""
    p = plan.problem
    if p.row.family == "global_lse" and plan.row_images < p.N:
        return _rows_outside_one_sum(tiles, plan)
    positives: list[Tensor] = []
    negatives = torch.empty(p.N, p.P, dtype=wide(p), device=p.device)
    for rows in plan.row_blocks():
        blocks = [(cols, *tiles.weigh(rows, cols)) for cols in plan.col_blocks()]
        negatives[rows] = finish(p, _merge([_log_sum(ref, sums) for _, ref, sums in blocks]), kappa)
        positives.append(tiles.positives(rows))
        own, d_negatives = mean_loss_weights(p.row, positives[-1], negatives[rows], p.rows)
        row_ref, alpha = weights_of(p, negatives[rows], d_negatives)
        for cols, ref, sums in blocks:
            tiles.accumulate(rows, cols, alpha * _gain(ref, sums, row_ref), own)
    return Scores(torch.cat(positives), negatives)


def _rows_outside_one_sum(tiles: Tiles, plan: Plan) -> Scores:
    """DV in several row blocks: gradients stay relative to a running reference until the one sum is complete."""
    p = plan.problem
    log_sums = torch.empty(p.N, p.P, dtype=wide(p), device=p.device)
    anchor = torch.full((), torch.finfo(wide(p)).min, dtype=wide(p), device=p.device)
    for rows in plan.row_blocks():
        blocks = [(cols, *tiles.weigh(rows, cols)) for cols in plan.col_blocks()]
        log_sums[rows] = _merge([_log_sum(ref, sums) for _, ref, sums in blocks])
        higher = torch.maximum(anchor, log_sums[rows].max())
        if rows.start > 0:
            tiles.rescale((anchor - higher).exp())
        anchor = higher
        for cols, ref, sums in blocks:
            tiles.accumulate(rows, cols, _gain(ref, sums, anchor), None)
    positives, negatives = tiles.positives(slice(0, p.N)), finish(p, log_sums, 0.0)
    d_positives, d_negatives = mean_loss_weights(p.row, positives, negatives, p.rows)
    row_ref, alpha = weights_of(p, negatives[:1, :1], d_negatives)
    assert row_ref is not None
    tiles.rescale(((anchor - row_ref).exp() * alpha[:1, :1]).reshape(()))
    tiles.accumulate_own(d_positives)
    return Scores(positives, negatives)


def finish(p: Problem, statistic: Tensor, kappa: float) -> Tensor:
    """Each row's negative term, (n, P), from its sum of psi (pointwise) or log-sum-exp (the other families)."""
    if p.row.family == "pointwise":
        return statistic / ((p.N - 1) * p.L)
    if p.row.family == "row_lse":
        return torch.logaddexp(statistic, torch.full_like(statistic, math.log(kappa))) if kappa else statistic
    return (statistic.flatten().logsumexp(0) - math.log(p.rows * (p.N - 1) * p.L)).expand_as(statistic)


def weights_of(p: Problem, negatives: Tensor, d_negatives: Tensor) -> tuple[Tensor | None, Tensor]:
    """(ref, alpha), each (n, P): the weight of a negative pair is alpha * phi(s; ref)."""
    if p.row.family == "pointwise":
        return None, d_negatives / ((p.N - 1) * p.L)
    if p.row.family == "row_lse":
        return _finite(negatives), d_negatives
    ref = _finite(negatives + math.log(p.rows * (p.N - 1) * p.L))
    return ref, d_negatives.sum().expand_as(d_negatives)


def wide(p: Problem) -> torch.dtype:
    """The dtype that row statistics are merged in: float64 where the device has it."""
    return torch.float32 if p.device.type == "mps" else torch.float64


class _Sums:
    """Row statistics merged over column blocks: sums of psi, or their logarithms."""

    def __init__(self, plan: Plan) -> None:
        p = plan.problem
        self._pointwise = p.row.family == "pointwise"
        start = 0.0 if self._pointwise else -math.inf
        self.value = torch.full((p.N, p.P), start, dtype=wide(p), device=p.device)

    def add(self, rows: slice, ref: Tensor, sums: Tensor) -> None:
        if self._pointwise:
            self.value[rows] += sums
        else:
            self.value[rows] = torch.logaddexp(self.value[rows], _log_sum(ref, sums).to(self.value.dtype))


def _log_sum(ref: Tensor, sums: Tensor) -> Tensor:
    dtype = torch.float32 if ref.device.type == "mps" else torch.float64
    return ref.to(dtype) + sums.to(dtype).log()


def _merge(log_sums: list[Tensor]) -> Tensor:
    return log_sums[0] if len(log_sums) == 1 else torch.stack(log_sums).logsumexp(0)


def _gain(ref: Tensor, sums: Tensor, to: Tensor | None) -> Tensor:
    """What turns weights relative to `ref` into weights relative to `to`; 0, never 0·inf, for an empty row."""
    assert to is not None
    return torch.where(sums == 0, 0.0, (ref - to).exp())


def _finite(reference: Tensor) -> Tensor:
    """Any finite reference serves an empty (-inf) row; an overflown one (+inf) has weights e^(s - inf): 0, or NaN."""
    return torch.where(reference == -torch.inf, 0.0, reference)
