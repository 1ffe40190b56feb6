"""Losses over several processes: `python -m benchmarks.group scaling` measures here, `model` foresees many GPUs.

scaling: strong (one batch, shared) and weak (as many images for each process), one thread a process, on gloo; beside
each the bare matrix products of one process's share in the same rounds.
model: time and bytes of a step on 8 to 1,024 GPUs by the figures in `Machine`, against gathering all features and
against passing them round a ring. A model, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

import dimkern

from .cases import Case

RESULT = Path(__file__).parent / "results" / "group.json"
PICTURES = Path(__file__).parent.parent / "docs" / "img"
WORLDS = (1, 2, 4)
STRONG = Case(256, 64, 512)
WEAK = Case(64, 64, 512)  # of each process
ROUNDS = 9


# Measured.


def process(rank: int, world: int, folder: str) -> None:
    """One process: the loss with its gradients and the bare products of its share, in turns."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    rows = []
    for kind, N in (("strong", STRONG.N), ("weak", WEAK.N * world)):
        case = Case(N // world, STRONG.L, STRONG.K)
        l, m = (x.requires_grad_() for x in case.inputs(torch.float32, seed=rank))
        g, c = torch.randn(N, case.K), torch.randn(case.N * case.L, case.K)
        s, d_c, d_g = torch.empty(N, len(c)), torch.empty_like(c), torch.empty_like(g)

        def loss(l: torch.Tensor = l, m: torch.Tensor = m) -> None:
            torch.autograd.grad(dimkern.infonce_loss(l, m, group=dist.group.WORLD), (l, m))

        def floor(g=g, c=c, s=s, d_c=d_c, d_g=d_g) -> None:  # type: ignore[no-untyped-def]
            torch.mm(g, c.t(), out=s)
            torch.mm(s, c, out=d_g)
            torch.mm(s.t(), g, out=d_c)

        samples: dict[str, list[float]] = {"loss": [], "floor": []}
        for i in range(ROUNDS + 2):
            for name, call in (("loss", loss), ("floor", floor)):
                dist.barrier()
                start = time.perf_counter()
                call()
                if i >= 2:
                    samples[name].append(time.perf_counter() - start)
        slowest = [None] * world
        dist.all_gather_object(slowest, {name: median(values) for name, values in samples.items()})
        longest = {name: max(one[name] for one in slowest) for name in samples}  # type: ignore[index]
        rows.append({"kind": kind, "world": world, "N": N, "L": case.L, "K": case.K, **longest})
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def scaling() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    for world in WORLDS:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(process, (world, folder), world)
            rows += json.loads(Path(folder, "rows.json").read_text())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # others at work make the figures theirs
    about = {"machine": platform.machine(), "cores": cores, "load": load, "torch": torch.__version__, "rounds": ROUNDS}
    RESULT.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print(f"InfoNCE, loss and gradients, float32, gloo, one thread a process, {cores} cores, load {load:.1f}:")
    print("scaling  processes      N   loss, ms   bare products, ms   ratio   speed-up")
    for kind in ("strong", "weak"):
        mine = [row for row in rows if row["kind"] == kind]
        for row in mine:
            work = row["N"] ** 2 / mine[0]["N"] ** 2  # pairs, which the processes share
            gained = work * mine[0]["loss"] / row["loss"]
            over = " (more processes than cores)" if row["world"] > (cores or 1) else ""
            print(
                f"{kind:7s}  {row['world']:9d}  {row['N']:5d}  {1e3 * row['loss']:9.1f}  {1e3 * row['floor']:18.1f}"
                f"  {row['loss'] / row['floor']:6.2f}  {gained:9.2f}{over}"
            )


# Modelled.


@dataclass(frozen=True)
class Machine:
    """What the model knows of the GPUs and what joins them."""

    flops: float = 989e12  # H100 SXM, dense bfloat16
    reached: float = 0.6  # of it, by large matrix products
    nvlink: float = 450e9  # bytes a second and direction of a GPU, NVLink 4, within a node
    infiniband: float = 50e9  # of a GPU, one 400 Gb/s port each, between nodes
    node: int = 8
    latency: float = 10e-6  # seconds a hop; a small collective takes 2·log2(W) of them

    def moving(self, world: int, received: float) -> float:
        """Seconds of a ring collective in which each GPU receives so many bytes."""
        speed = self.nvlink if world <= self.node else self.infiniband
        return received / speed + 2 * self.latency * (world - 1).bit_length()


@dataclass(frozen=True)
class Step:
    """A step of one way: bytes that a GPU receives, seconds of products, seconds of communication, seconds in all."""

    received: float
    products: float
    moving: float
    seconds: float


def summaries(case: Case, world: int, at: Machine) -> Step:
    """Ours: summaries gathered, their float32 gradient scattered, three statistics a row; nothing overlaps."""
    others = (world - 1) / world
    R = case.rows * world
    gathered, scattered, statistics = (others * R * x for x in (2 * case.K, 4 * case.K, 2 * 3 * 8))
    products = 6 * R * case.N * case.L * case.K / (at.flops * at.reached)
    moving = sum(at.moving(world, x) for x in (gathered, scattered)) + 3 * at.moving(world, statistics / 3)
    return Step(gathered + scattered + statistics, products, moving, products + moving)


def features(case: Case, world: int, at: Machine) -> Step:
    """Every process gathers all features and sends back all their gradients, in bfloat16; nothing overlaps."""
    others = (world - 1) / world
    received = 2 * others * world * case.N * (case.L + case.P) * case.K * 2
    products = 6 * case.rows * case.N * world * case.L * case.K / (at.flops * at.reached)
    moving = 2 * at.moving(world, received / 2)
    return Step(received, products, moving, products + moving)


def ring(case: Case, world: int, at: Machine) -> Step:
    """Features go round, once for the row sums and once, with their float32 gradient, for the gradients: four products.

    Communication and products overlap entirely.
    """
    each = case.N * case.L * case.K
    received = (world - 1) * each * (2 + 2 + 4)
    products = 8 * case.rows * case.N * world * case.L * case.K / (at.flops * at.reached)
    speed = at.nvlink if world <= at.node else at.infiniband
    moving = received / speed + 2 * (world - 1) * at.latency
    return Step(received, products, moving, max(products, moving))


WAYS: dict[str, Callable[[Case, int, Machine], Step]] = {
    "summaries gathered (dimkern)": summaries,
    "all features gathered": features,
    "features round a ring": ring,
}
COLOURS = ("#0072B2", "#E69F00", "#009E73")  # Okabe and Ito's
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


def model() -> None:
    case, at = Case(64, 64, 1024), Machine()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    print(f"MODEL: {case.N} images a GPU, L={case.L}, K={case.K}, bfloat16; {asdict(at)}")
    print(f"{'way':30s} {'GPUs':>5s} {'received':>12s} {'products':>11s} {'moving':>11s} {'step':>11s}")
    for (name, way), colour in zip(WAYS.items(), COLOURS, strict=True):
        steps = [way(case, world, at) for world in GPUS]
        for world, step in zip(GPUS, steps, strict=True):
            times = "".join(f"{1e3 * x:9.2f} ms" for x in (step.products, step.moving, step.seconds))
            print(f"{name:30s} {world:5d} {step.received / 1e6:9.1f} MB {times}")
        left.plot(GPUS, [1e3 * step.seconds for step in steps], "o-", color=colour, label=name, markersize=4)
        right.plot(GPUS, [step.received / 1e6 for step in steps], "o-", color=colour, label=name, markersize=4)
    products = [1e3 * summaries(case, world, at).products for world in GPUS]
    left.plot(GPUS, products, color="#555555", linestyle=(0, (4, 2)), label="three products alone")
    for axes, title, label in ((left, "time of a step", "ms"), (right, "received by a GPU", "MB")):
        axes.set(xscale="log", yscale="log", title=title, xlabel="GPUs", ylabel=label)
        axes.xaxis.set_major_locator(FixedLocator(GPUS))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.grid(color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"A model, not a measurement: InfoNCE with gradients, {case.N} images a GPU, L={case.L}, K={case.K}, bfloat16\n"
        "H100 at 60 % of 989 TFLOP/s, NVLink 450 GB/s within 8 GPUs, InfiniBand 50 GB/s a GPU beyond",
        fontsize=10,
    )
    path = PICTURES / "distributed_model.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.group", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("scaling", "model"))
    {"scaling": scaling, "model": model}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
