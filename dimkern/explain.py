"""What was chosen and why, for people: `explain` for one call, `doctor` for the installation."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import distributed, grouped, pair_ops
from .config import memory_budget
from .critics import PairMLPCritic, check_critic
from .estimators import REGISTRY
from .gpu_plan import GpuChoice
from .native import instruction_sets
from .plan import (
    BACKENDS,
    Plan,
    choose_backend,
    describe,
    format_bytes,
    plan_for,
    score_dtype_of,
    unfit,
    why_not,
)
from .validate import as_locals, as_summaries, check_choice, check_clip, check_pair, check_reduction, check_scale

if TYPE_CHECKING:  # a build of torch may lack it
    from torch.distributed import ProcessGroup


def explain(
    l: Tensor,
    m: Tensor,
    *,
    loss: str = "infonce",
    scale: float | Tensor | None = None,
    clip: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    critic: PairMLPCritic | None = None,
    group: ProcessGroup | None = None,
) -> str:
    """How a loss would be computed on these inputs: backend, loop order, blocks, FLOPs, bytes and peak memory.

    Args:
        l, m: as for the loss; gradients are counted where they require them.
        loss: an estimator: "infonce", "dv", or a measure of `fenchel_dual_loss`, in either case.
        scale, clip, reduction, backend, critic: as for the loss.
        group: as for the loss. Nothing is sent: all processes are taken to have as many images as this one.

    Raises:
        ValueError, TypeError: as the loss would.
    """
    c, g = as_locals(l), as_summaries(m)
    check_critic(critic, c.device)
    others = distributed.members(group)
    check_pair(l, m, c, g, None if critic is None else critic.channels, 2 if others is None else 1)
    estimator = loss.lower() if isinstance(loss, str) else loss
    check_choice("loss", estimator, tuple(REGISTRY))
    check_reduction(estimator, reduction)
    if others is not None and critic is not None:
        grouped.check_critic_reduction(reduction)
    kind = "dot" if critic is None else "pair_mlp"
    dtype = score_dtype_of(c.dtype, g.dtype)
    chosen = choose_backend(backend, c.device, kind, dtype)
    clip, factor, known = check_clip(clip), check_scale(scale, c, g), torch.is_grad_enabled() and reduction == "none"
    if critic is None:
        grad = torch.is_grad_enabled()
        p = describe(
            estimator, c, g, clip=clip, grad_locals=grad and l.requires_grad,
            grad_summaries=grad and (m.requires_grad or factor.requires_grad), weights_known=known,
        )  # fmt: skip
    else:
        layers = critic.first_layer(c, g, factor)
        p = pair_ops.problem_of(layers, estimator, clip, pair_ops.needed(layers), known)
    if others is not None:
        first, world = others.rank() * p.N, others.size()
        p = p._replace(N=world * p.N, shard=(first, first + p.N))
        backend = grouped.planned_backend(backend, p)
        chosen = choose_backend(backend, c.device, kind, dtype)
    budget = memory_budget(c.device)
    plan = None if chosen == "reference" else plan_for(p, budget, backend)
    pairs, (letter, width, what) = p.rows * p.N * p.L, ("K", 1, "the pair tensor")
    if p.critic == "pair_mlp":
        letter, width, what = "H", p.K, "each hidden layer of all pairs"
    lines = [
        f"{estimator}: N={p.N} images, P={p.P} summaries and L={p.L} locations each, {letter}={p.K}, "
        f"{_short(c.dtype)} inputs",
        f"pairs: {pairs:,}; {what} would take {format_bytes(pairs * p.itemsize * width)} and is "
        + ("built, more than once" if chosen == "reference" else "never built"),
        f"backend: {plan.backend if plan else chosen}",
    ]
    reasons = {name: unfit(name, p, budget) for name in BACKENDS}
    if others is not None:
        alone = dict.fromkeys(set(BACKENDS) - set(grouped.SERVES), "it does not serve a group")
        reasons = {name: reason or alone.get(name) for name, reason in reasons.items()}
    lines += [f"  not {name}: {reason}" for name, reason in reasons.items() if reason]
    if plan is None:
        return "\n".join(lines)
    lines += _plan_lines(plan)
    if others is not None:
        sent = grouped.sent(plan)
        lines.append(
            f"group: {world} processes of {p.held} images; a call and its backward make {len(sent)} collectives, to "
            f"which a process contributes {format_bytes(sum(sent))}"
        )
    return "\n".join(lines)


def _plan_lines(plan: Plan) -> list[str]:
    p = plan.problem
    row_blocks, col_blocks = len(list(plan.row_blocks())), len(list(plan.col_blocks()))
    needed = (("l", p.grad_locals), ("m or scale", p.grad_summaries), ("the critic", p.grad_critic))
    gradients = [name for name, need in needed if need]
    why = {
        "rows outside": "a row block's weights are kept until the row sum is known",
        "columns outside": "weights are known when a tile is scored, or a first sweep finds the row sums",
    }[plan.order]
    if plan.gpu is not None and plan.gpu.flash is not None:
        why = "each gradient scores the pairs again, and its weights stay in registers"
    native = plan.backend == "cpu"
    copied = "panel by panel, in the cache" if native and p.strided else "block by block"
    in_place = p.in_place if plan.gpu else not (p.staged_panels if native else p.staged)
    staged = "read in place" if in_place else f"copied {copied}"
    if native and p.bf16_products:
        staged += ", multiplied in bfloat16"
    # known weights mean reduction="none": its forward is a product of its own, and its backward sweeps the pairs again
    gemms = plan.gemms + (p.weights_known and p.needs_grad)
    traffic = (
        (row_blocks * (2 + 2 * p.grad_locals) * p.held * p.L + p.rows * 2)
        * p.K
        * (p.operand_dtype if plan.gpu else p.score_dtype).itemsize
    )
    lines = [
        f"order: {plan.order} ({why})",
        f"blocks: {row_blocks} of {plan.row_images * p.P} rows x {col_blocks} of {plan.col_images * p.L} columns, "
        f"scores in {_short(p.score_dtype)}; local features {staged}",
        f"work: {gemms} matrix products over all pairs, {plan.flops * gemms / plan.gemms / 1e9:,.3g} GFLOP; "
        f"gradients: {', '.join(gradients) or 'none'}",
        f"memory: reads and writes about {format_bytes(traffic)} of features and gradients; peak beyond inputs, "
        f"outputs and gradients {format_bytes(plan.scratch)} of a budget of {format_bytes(plan.budget)}",
    ]
    return lines if plan.gpu is None else lines + _gpu_lines(plan, plan.gpu)


def _gpu_lines(plan: Plan, gpu: GpuChoice) -> list[str]:
    tile, operands, weights = gpu.flash or gpu.tile, _short(plan.problem.operand_dtype), _short(plan.weight_dtype)
    shape = f"{tile.BM} rows x {tile.BN} columns" if gpu.flash is None else f"{tile.BM} x {tile.BN} pairs, either way"
    return [
        f"GPU: {gpu.chip.name} with {gpu.chip.multiprocessors} multiprocessors; tiles of {shape}, "
        f"{tile.BK} channels at a time; {operands} operands, {weights} weights",
        f"predicted by a model, not measured: {gpu.seconds * 1e3:.3g} ms, {gpu.seconds / gpu.floor:.3g} times the "
        "products alone",
    ]


def doctor() -> str:
    """Versions, devices and which backends serve them, as text to paste into a bug report."""
    from . import __version__

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator or torch.device("cpu")
    lines = [
        f"dimkern {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"CPU: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; native library:",
        *(f"  {name}: {fate}" for name, fate in instruction_sets().items()),
        f"accelerator: {accelerator or 'none'}",
        f"memory budget on the CPU: {format_bytes(memory_budget(torch.device('cpu')))}",
        "backends:",
    ]
    lines += [f"  {name}: {why_not(name, device) or 'available'}" for name in BACKENDS]
    return "\n".join(lines)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
