"""The concat critic over all pairs: dimkern against eager PyTorch and against its bare products. A table, and JSON.

Every contender's loss and gradients are first compared with float64 at a small batch. Times are medians of interleaved
rounds, a first call excluded. The floor is the H×H products alone on tiles of the size that dimkern chose, in the
same run: three for each pair (scores, ∂W2, the gradient by the first layer).

    python -m benchmarks.pair_mlp --images 16 32 --json benchmarks/results/pair_mlp.json
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dimkern
from dimkern import pair_ops, plan
from dimkern.config import memory_budget

from . import measure
from .compare import about

Clock = Callable[[], float]
L, CHANNELS = 64, (128, 64)  # locations; channels of the local features and of the summaries


def _of_scores(s: Tensor, estimator: str) -> Tensor:
    """The loss of the pair tensor s (N, N, L), self_mask="exclude"."""
    own = torch.eye(len(s), dtype=torch.bool)
    positives, negatives = s[own], s[~own].view(len(s), -1)
    if estimator == "infonce":
        return F.softplus(negatives.logsumexp(1, keepdim=True) - positives).mean()
    return F.softplus(negatives).mean() + F.softplus(-positives).mean() - 2 * math.log(2)


def _factorised(a: Tensor, b: Tensor, critic: dimkern.PairMLPCritic) -> Tensor:
    return critic.outer(F.relu(critic.inner(F.relu(a + b[:, None, None])))).squeeze(-1)


def _first_layers(l: Tensor, m: Tensor, critic: dimkern.PairMLPCritic) -> tuple[Tensor, Tensor]:
    return critic.local(l.mT), critic.summary(m)


def eager_concat(l: Tensor, m: Tensor, critic: dimkern.PairMLPCritic, estimator: str) -> Tensor:
    """Every pair's two vectors concatenated."""
    keywords = {"critic": critic, "backend": "reference"}
    if estimator == "infonce":
        return dimkern.infonce_loss(l, m, self_mask="exclude", **keywords)
    return dimkern.fenchel_dual_loss(l, m, **keywords)


def eager(l: Tensor, m: Tensor, critic: dimkern.PairMLPCritic, estimator: str) -> Tensor:
    """The first layer factorised, the rest for all pairs at once."""
    return _of_scores(_factorised(*_first_layers(l, m, critic), critic), estimator)


def checkpointed(l: Tensor, m: Tensor, critic: dimkern.PairMLPCritic, estimator: str) -> Tensor:
    """The same for four summaries at a time, whose hidden layers are made again in the backward pass."""
    a, b = _first_layers(l, m, critic)
    rows = [checkpoint(_factorised, a, part, critic, use_reentrant=False) for part in b.split(4)]
    return _of_scores(torch.cat(rows), estimator)


def ours(l: Tensor, m: Tensor, critic: dimkern.PairMLPCritic, estimator: str) -> Tensor:
    if estimator == "infonce":
        return dimkern.infonce_loss(l, m, self_mask="exclude", critic=critic)
    return dimkern.fenchel_dual_loss(l, m, critic=critic)


CONTENDERS = {"dimkern": ours, "checkpointed": checkpointed, "eager": eager, "eager concat": eager_concat}
# bytes for each pair and hidden unit, about: two layers, their relu and gradients; and the concatenation
_EAGER = {"eager": 20, "eager concat": 24}


def _inputs(N: int, H: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dimkern.PairMLPCritic]:
    torch.manual_seed(0)
    critic = dimkern.PairMLPCritic(*CHANNELS, hidden=H).to(dtype)
    l, m = torch.randn(N, CHANNELS[0], L), torch.randn(N, CHANNELS[1])
    return l.to(dtype).requires_grad_(), m.to(dtype).requires_grad_(), critic


def _step(name: str, estimator: str, l: Tensor, m: Tensor, critic: dimkern.PairMLPCritic) -> list[Tensor]:
    """Loss and gradients."""
    loss = CONTENDERS[name](l, m, critic, estimator)
    return [loss.detach(), *torch.autograd.grad(loss, [l, m, *critic.parameters()])]


def _check(H: int) -> None:
    """Everybody's loss and gradients at 8 images are float64's."""
    for estimator in ("infonce", "jsd"):
        exact = _step("eager concat", estimator, *_inputs(8, H, torch.float64))
        for name in CONTENDERS:
            for x, y in zip(_step(name, estimator, *_inputs(8, H)), exact, strict=True):
                error = float((x.double() - y).norm() / y.norm().clamp(min=1e-3))  # of b3 it is 0
                if not error < 1e-3:
                    raise SystemExit(f"{name} is wrong: {estimator}, relative error {error:.2g}")


def _floor(N: int, H: int) -> Callable[[], None]:
    l, m, critic = _inputs(N, H)
    layers = critic.first_layer(l.mT.detach(), m.unsqueeze(1).detach(), torch.ones(()))
    problem = pair_ops.problem_of(layers, "jsd", None, (True, True, True))
    chosen = plan.plan_for(problem, memory_budget(l.device), "auto")
    pairs = chosen.row_images * chosen.col_images * L
    hidden, above, below = (torch.rand(pairs, H) for _ in range(3))
    weight, gradient = torch.randn(H, H) * H**-0.5, torch.zeros(H, H)

    def run() -> None:
        for _ in range(-(-N * N * L // pairs)):
            torch.mm(hidden, weight.t(), out=above)
            torch.mm(above, weight, out=below)
            gradient.addmm_(above.t(), hidden)

    return run


def _peak(sender: multiprocessing.connection.Connection, name: str, estimator: str, N: int, H: int) -> None:
    _step(name, estimator, *_inputs(2, 32))
    inputs = _inputs(N, H)
    measure._reset_peak()
    before = measure._resident()
    outputs = _step(name, estimator, *inputs)
    sender.send(measure._peak_resident() - before - sum(x.nbytes for x in outputs))


def peak_bytes(name: str, estimator: str, N: int, H: int) -> int:
    """Peak memory of one step in a fresh process, beyond inputs and gradients."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_peak, args=(sender, name, estimator, N, H))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        child.join()


def compare(
    N: int, H: int, estimator: str, names: list[str], rounds: int, room: float, clock: Clock | None, peaks: bool
) -> list[dict]:
    """One row for each contender at one shape."""
    inputs = _inputs(N, H)
    takes = {name: _EAGER.get(name, 0) * N * N * L * H for name in names}
    fits = [name for name in names if takes[name] <= room]
    samples: dict[str, list[float]] = {}
    if clock is not None:
        calls: dict[str, Callable[[], object]] = {"floor": _floor(N, H)}
        calls |= {name: lambda name=name: _step(name, estimator, *inputs) for name in fits}
        for i in range(rounds + 1):
            for name, call in calls.items():
                start = clock()
                result = call()
                seconds = clock() - start
                del result
                if i > 0:  # the first round warms up
                    samples.setdefault(name, []).append(seconds)
    rows = []
    for name in ("floor", *names):
        row: dict = {"N": N, "L": L, "H": H, "estimator": estimator, "contender": name}
        if name in samples:
            seconds = median(samples[name])
            row |= {"seconds": seconds, "ratio": seconds / median(samples["floor"]), "samples": samples[name]}
        if name in fits and peaks:
            row["peak_bytes"] = peak_bytes(name, estimator, N, H)
        if takes.get(name, 0) > room:
            row["reason"] = f"needs about {takes[name] / 1e9:.1f} GB"
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| (N, L, H) | loss | contender | ms | × floor | peak, MB |", "|---|---|---|---|---|---|"]
    for row in rows:
        numbers = row.get("reason") or (f"{row['seconds'] * 1e3:.0f}" if "seconds" in row else "")
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        peak = f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else ""
        shape = f"({row['N']}, {row['L']}, {row['H']})"
        lines.append(f"| {shape} | {row['estimator']} | {row['contender']} | {numbers} | {ratio} | {peak} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[16, 64], metavar="N", help="batch sizes")
    parser.add_argument("--hidden", type=int, default=512, metavar="H", help="units of a hidden layer")
    parser.add_argument("--estimators", nargs="+", default=["infonce", "jsd"], choices=["infonce", "jsd"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all")
    parser.add_argument("--room", type=float, default=2e9, help="bytes that an eager contender may take")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders")
    parser.add_argument("--no-times", action="store_true", help="measure memory alone: one step of each")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread: what a busy machine disturbs least")
    parser.add_argument("--no-peaks", action="store_true", help="no processes that measure memory")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="all samples and versions; what it holds of other shapes stays"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time adds up what all threads take; it goes with --threads 1")
    clock = None if options.no_times else time.process_time if options.cpu_time else time.perf_counter
    _check(options.hidden)
    rows: list[dict] = []
    for N in options.images:
        for estimator in options.estimators:
            peaks = not options.no_peaks
            rows += compare(N, options.hidden, estimator, options.only, options.rounds, options.room, clock, peaks)
    print(table(rows))
    if options.json:
        shapes = {(row["N"], row["H"]) for row in rows}
        held = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
        rows = [row for row in held if (row["N"], row["H"]) not in shapes] + rows
        result = {"about": about(options.threads, options.rounds, "pair MLP"), "rows": rows}
        result["about"]["clock"] = "processor time" if options.cpu_time else "wall"
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
