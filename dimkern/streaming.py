"""The driver of MATHS.md §3: score -> map -> finish -> accumulate, over blocks of pairs.

Owns the loops, the row statistics and the moment at which a weight is known. Knows nothing of
critics, devices or how a tile is scored and mapped: that is `Tiles`, one for each backend. Statistics
of a row are merged here and nowhere else; where the columns of a row are spread over processes, `Reduce` joins them.

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
from .plan import Plan, Problem, within


class Tiles(Protocol):
    """One critic on one device, bound to its inputs and to the gradient buffers it adds to.

    `rows` and `cols` are slices of images: rows*P summaries against cols*L locations. Columns, and positives, are
    of the images whose local features are here (`Problem.here`; alone: all N). The statistics of `measure`, `weigh`
    and `sweep` leave own-image pairs out; their weights come as `own`, (images of rows that are here, P, L). A
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
        """Add the gradients of all own-image pairs here, (held, P, L), that `accumulate` left out."""


class Reduce(Protocol):
    """Joins statistics over the processes that share a batch; each has the columns of its own images."""

    def total(self, sums: Tensor) -> Tensor:
        """Elementwise sum."""

    def log_total(self, log_sums: Tensor) -> Tensor:
        """Elementwise log-sum-exp."""

    def rows(self, statistic: Tensor, rows: slice) -> Tensor:
        """(rows, P): each row's number from the process that has its image; given those of the images here."""


class Alone:
    """One process has everything."""

    def total(self, sums: Tensor) -> Tensor:
        return sums

    def log_total(self, log_sums: Tensor) -> Tensor:
        return log_sums

    def rows(self, statistic: Tensor, rows: slice) -> Tensor:
        return statistic


ALONE = Alone()


def measure(tiles: Tiles, plan: Plan, kappa: float, reduce: Reduce = ALONE) -> Scores:
    """The scores' statistics without any gradient: one GEMM. Positives of the images here, negatives of all rows."""
    p, total = plan.problem, _Sums(plan)
    for cols in plan.col_blocks():
        for rows in plan.row_blocks():
            total.add(rows, *tiles.measure(rows, cols))
    return Scores(tiles.positives(p.here), finish(p, total.value, kappa, reduce))


def differentiate(tiles: Tiles, plan: Plan, negatives: Tensor, d_positives: Tensor, d_negatives: Tensor) -> None:
    """Accumulate the gradients of sum(d_positives * positives) + sum(d_negatives * negatives)."""
    p = plan.problem
    ref, alpha = weights_of(p, negatives, d_negatives)
    for cols in plan.col_blocks():
        for rows in plan.row_blocks():
            own = d_positives[_here(p, rows)]
            tiles.sweep(rows, cols, None if ref is None else ref[rows], alpha[rows], own)


def mean_loss(tiles: Tiles, plan: Plan, kappa: float) -> tuple[Tensor, Scores]:
    """The mean of the item losses, the statistics, and the gradients that are needed, accumulated in the same pass."""
    whole = tiles.whole(kappa)
    if whole is not None:
        return whole
    positives, negatives = in_blocks(tiles, plan, kappa)
    loss = item_losses(plan.problem.row, positives, negatives).mean()
    dtype = plan.problem.score_dtype
    return loss.to(dtype), Scores(positives, negatives.to(dtype).contiguous())


def in_blocks(tiles: Tiles, plan: Plan, kappa: float, reduce: Reduce = ALONE) -> Scores:
    """The statistics, and the gradients of the mean of the item losses that are needed; also over several processes."""
    if not plan.problem.needs_grad:
        return measure(tiles, plan, kappa, reduce)
    if plan.order == "rows outside":
        return _rows_outside(tiles, plan, kappa, reduce)
    if plan.problem.row.family == "pointwise":
        return _one_sweep(tiles, plan, reduce)
    scores = measure(tiles, plan, kappa, reduce)
    differentiate(tiles, plan, scores.negatives, *_weights(plan.problem, *scores, slice(0, plan.problem.N), reduce))
    return scores


def _one_sweep(tiles: Tiles, plan: Plan, reduce: Reduce) -> Scores:
    """Pointwise estimators: alpha needs no statistic, so the sums are made on the way."""
    p = plan.problem
    positives = tiles.positives(p.here)
    sums = torch.zeros(p.N, p.P, dtype=wide(p), device=p.device)
    d_positives, d_negatives = _weights(p, positives, sums, slice(0, p.N), reduce)
    _, alpha = weights_of(p, sums, d_negatives)
    for cols in plan.col_blocks():
        for rows in plan.row_blocks():
            sums[rows] += tiles.sweep(rows, cols, None, alpha[rows], d_positives[_here(p, rows)])
    return Scores(positives, finish(p, sums, 0.0, reduce))


def _rows_outside(tiles: Tiles, plan: Plan, kappa: float, reduce: Reduce) -> Scores:
    """A row block is finished, and its gradients final, before the next one is scored."""
    p = plan.problem
    if p.row.family == "global_lse" and plan.row_images < p.N:
        return _rows_outside_one_sum(tiles, plan, reduce)
    positives: list[Tensor] = []
    negatives = torch.empty(p.N, p.P, dtype=wide(p), device=p.device)
    for rows in plan.row_blocks():
        blocks = [(cols, *tiles.weigh(rows, cols)) for cols in plan.col_blocks()]
        negatives[rows] = finish(p, _merge([_log_sum(ref, sums) for _, ref, sums in blocks]), kappa, reduce)
        positives.append(tiles.positives(_both(p, rows)))
        own, d_negatives = _weights(p, positives[-1], negatives[rows], rows, reduce)
        row_ref, alpha = weights_of(p, negatives[rows], d_negatives)
        for cols, ref, sums in blocks:
            tiles.accumulate(rows, cols, alpha * _gain(ref, sums, row_ref), own)
    return Scores(torch.cat(positives), negatives)


def _rows_outside_one_sum(tiles: Tiles, plan: Plan, reduce: Reduce) -> Scores:
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
    positives, negatives = tiles.positives(p.here), finish(p, log_sums, 0.0, reduce)
    d_positives, d_negatives = _weights(p, positives, negatives, slice(0, p.N), reduce)
    row_ref, alpha = weights_of(p, negatives[:1, :1], d_negatives)
    assert row_ref is not None
    tiles.rescale(((anchor - row_ref).exp() * alpha[:1, :1]).reshape(()))
    tiles.accumulate_own(d_positives)
    return Scores(positives, negatives)


def finish(p: Problem, statistic: Tensor, kappa: float, reduce: Reduce = ALONE) -> Tensor:
    """Each row's negative term, (n, P), from its sum of psi (pointwise) or log-sum-exp over the columns here."""
    if p.row.family == "pointwise":
        return reduce.total(statistic) / ((p.N - 1) * p.L)
    if p.row.family == "row_lse":
        statistic = reduce.log_total(statistic)
        return torch.logaddexp(statistic, torch.full_like(statistic, math.log(kappa))) if kappa else statistic
    everything = reduce.log_total(statistic.flatten().logsumexp(0))
    return (everything - math.log(p.rows * (p.N - 1) * p.L)).expand_as(statistic)


def _weights(p: Problem, positives: Tensor, negatives: Tensor, rows: slice, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """`mean_loss_weights` of the own-image pairs here, and of all `rows`, whose negative terms are given."""
    by_row = p.row.family == "row_lse"  # the other families' weights are the same number in every row
    given = negatives[within(_both(p, rows), rows)] if by_row else negatives
    own, d_negatives = mean_loss_weights(p.row, positives, given, p.rows)
    return own, reduce.rows(d_negatives, rows) if by_row else d_negatives


def weights_of(p: Problem, negatives: Tensor, d_negatives: Tensor) -> tuple[Tensor | None, Tensor]:
    """(ref, alpha), each (n, P): the weight of a negative pair is alpha * phi(s; ref)."""
    if p.row.family == "pointwise":
        return None, d_negatives / ((p.N - 1) * p.L)
    if p.row.family == "row_lse":
        return _finite(negatives), d_negatives
    ref = _finite(negatives + math.log(p.rows * (p.N - 1) * p.L))
    return ref, d_negatives.sum().expand_as(d_negatives)


def _both(p: Problem, rows: slice) -> slice:
    """The images of `rows` that are here; a slice of none if they are elsewhere."""
    first = min(max(rows.start, p.here.start), rows.stop)
    return slice(first, max(first, min(rows.stop, p.here.stop)))


def _here(p: Problem, rows: slice) -> slice:
    """Where the images of `rows` are among those here."""
    return within(_both(p, rows), p.here)


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
