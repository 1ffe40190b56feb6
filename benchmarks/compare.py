"""The comparison of dimkern with its peers: a table in the terminal, JSON, pictures.

Every contender's loss and gradients are first compared with float64; one that is wrong is shown as WRONG and gets no
time, ours included (the exit status is then 1). Times are medians of interleaved rounds; a first call, and with it any
compilation, is excluded. The floor is the three matrix products alone, in the same run on the same tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import dimkern

from . import oracle
from .cases import DTYPES, ESTIMATORS, GRIDS, Case
from .contenders import Contender, Steps, chosen, contenders
from .measure import CLOCKS, Memory, interleaved, once

_MEMORY_SHARE = 0.7  # of what is free: a contender expected to need more is not tried

Row = dict[str, Any]


@dataclass
class Session:
    """One run: who takes part, and how patiently they are timed."""

    field: list[Contender]
    threads: int
    rounds: int
    patience: float
    memory: Memory | None
    clock: str = "wall"
    # seconds for each unit of cost at the last shape, by contender, dtype and estimator
    pace: dict[tuple[str, str, str], float] = field(default_factory=dict)

    def run(self, grid: Sequence[Case], estimators: list[str], dtypes: list[str]) -> list[Row]:
        """One row for each case, dtype, estimator and contender."""
        torch.set_num_threads(self.threads)
        problems = [(case, dtype, estimator) for estimator in estimators for dtype in dtypes for case in grid]
        rows: list[Row] = []
        with tqdm(total=len(problems), unit="shape") as bar:
            for case, dtype, estimator in problems:
                bar.set_description(f"{estimator} {dtype} {case.name}")
                rows += self._problem(case, dtype, estimator, bar)
                bar.update()
        return rows

    def _problem(self, case: Case, dtype: str, estimator: str, bar: tqdm) -> list[Row]:
        l, m = case.inputs(DTYPES[dtype])
        true = oracle.truth(estimator, l, m)
        entries = {c.name: Entry(c, case, dtype, estimator) for c in self.field}
        eager = None
        # closed-form eager passes the gate first, as its errors are the others' yardstick
        for entry in sorted(entries.values(), key=lambda entry: entry.contender.name != "eager"):
            bar.set_postfix_str(f"checking {entry.contender.name}")
            entry.reason = entry.contender.reason(estimator, case, DTYPES[dtype]) or self._too_much(entry)
            if entry.reason is None:
                errors = entry.admit(l, m, true, oracle.budget(DTYPES[dtype], eager), self.patience)
                eager = errors if entry.contender.name == "eager" else eager
            if entry.status == "ok" and entry.contender.cost is not None:
                self.pace[entry.contender.name, dtype, estimator] = entry.foreseen / entry.contender.cost(case)
        del true

        ready = {name: entry for name, entry in entries.items() if entry.status == "ok"}
        bar.set_postfix_str("timing")
        for pass_ in ("both", "forward"):
            calls = {name: getattr(entry.steps, pass_) for name, entry in ready.items()}
            foreseen = {name: entry.foreseen for name, entry in ready.items()}
            samples = interleaved(calls, foreseen, self.rounds, self.patience, self.clock)
            for name, entry in ready.items():
                seconds = median(samples[name])
                ratio = seconds / median(samples["floor"])
                entry.numbers[pass_] = {"seconds": seconds, "ratio": ratio, "samples": samples[name]}
        for name, entry in ready.items():
            if self.memory is not None:
                bar.set_postfix_str(f"memory of {name}")
                entry.numbers["peak_bytes"] = self.memory.peak(name, estimator, case, dtype, self.threads)
        return [entry.row() for entry in entries.values()]

    def _too_much(self, entry: Entry) -> str | None:
        """Why the contender is not tried: memory it would not get, or a call longer than anyone would wait for."""
        scratch = entry.contender.scratch(entry.case)
        if scratch > _MEMORY_SHARE * _free_memory():
            return f"needs about {scratch / 1e9:.0f} GB"
        if entry.contender.cost is not None:
            pace = self.pace.get((entry.contender.name, entry.dtype, entry.estimator), 0.0)
            seconds = pace * entry.contender.cost(entry.case)
            if seconds > self.patience:
                return f"about {seconds:.0f} s a call (--patience {self.patience:g})"
        return None


@dataclass
class Entry:
    """One contender at one problem, and what became of it."""

    contender: Contender
    case: Case
    dtype: str
    estimator: str
    status: str = "skipped"  # or "ok", "WRONG", "failed"
    reason: str | None = None  # for anything but "ok"
    foreseen: float = 0.0  # seconds of one call
    steps: Steps | None = None
    numbers: Row = field(default_factory=dict)

    def admit(self, l: Tensor, m: Tensor, true: oracle.Truth, budget: float, patience: float) -> oracle.Errors | None:
        """Warm up and pass the gate; the errors, if there is a result to have any."""
        try:
            self.steps = self.contender.steps(self.estimator, l, m)
            start = time.perf_counter()
            outputs = self.steps.both()
            first = time.perf_counter() - start
            value = self.steps.forward()
            first_forward = time.perf_counter() - start - first
            again = first < patience / 2 or self.contender.compiled
            self.foreseen = once(self.steps.both) if again else first
        except Exception as error:  # a contender's failure is a result, neither to hide nor to stop for
            self.status, self.reason = "failed", f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return None
        if self.contender.compiled:
            self.numbers["compile_seconds"] = first + first_forward
        self.status = "ok"
        if self.contender.name == "floor":
            return None
        errors = oracle.errors(true, *outputs)
        alone = oracle.errors(true, value, *outputs[1:])
        self.numbers.update(errors=errors._asdict(), error_budget=budget)
        if not (errors.within(budget) and alone.within(budget)):
            worst = max(*errors, alone.loss)
            self.status, self.reason = "WRONG", f"an error of {worst:.2g}, where {budget:.2g} is allowed"
        return errors

    def row(self) -> Row:
        problem = {"case": asdict(self.case), "dtype": self.dtype, "estimator": self.estimator}
        return {
            **problem,
            "contender": self.contender.name,
            "status": self.status,
            "reason": self.reason,
            **self.numbers,
        }


def _field(only: list[str] | None) -> list[Contender]:
    """All contenders, or those whose names start so; the floor always."""
    return [c for c in contenders() if only is None or c.name.startswith(("floor", *only))]


def _free_memory() -> float:
    try:
        import psutil
    except ImportError:
        return math.inf
    return psutil.virtual_memory().available


def tables(rows: list[Row]) -> str:
    """For each estimator and dtype: both passes, the forward alone, memory; then what was left out and why."""
    text = []
    groups = dict.fromkeys((row["estimator"], row["dtype"]) for row in rows)
    for estimator, dtype in groups:
        group = [row for row in rows if (row["estimator"], row["dtype"]) == (estimator, dtype)]
        for pass_, title in (("both", "forward + backward"), ("forward", "forward")):
            text.append(f"\n{estimator}, {dtype}, {title}: ms (× the floor's)\n{_times(group, pass_)}")
        if any("peak_bytes" in row for row in group):
            text.append(
                f"\n{estimator}, {dtype}, peak memory of forward + backward beyond inputs and gradients: MB\n"
                + _table(group, lambda row: "?" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e6:.0f}")
            )
    seconds = [row["compile_seconds"] for row in rows if "compile_seconds" in row]
    if seconds:
        text.append(f"\ntorch.compile took {median(seconds):.1f} s a shape (median, both passes), not counted above.")
    notes: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            notes.setdefault((row["contender"], row["status"], row["reason"]), []).append(_name(row))
    problems = len(rows) / len({row["contender"] for row in rows})
    for (contender, status, reason), names in notes.items():
        where = "everywhere" if len(names) == problems else " ".join(dict.fromkeys(names))
        text.append(f"{contender} {status}: {reason} [{where}]")
    return "\n".join(text)


def _times(group: list[Row], pass_: str) -> str:
    def cell(row: Row) -> str:
        return f"{row[pass_]['seconds'] * 1e3:.4g} ({row[pass_]['ratio']:.2f})"

    def summary(title: str, of: Any) -> list[str]:
        line = [title]
        for name in _columns(group):
            ratios = [r[pass_]["ratio"] for r in group if r["contender"] == name and r["status"] == "ok"]
            line.append(f"({of(ratios):.2f})" if ratios else "")
        return line

    return _table(group, cell, [summary("geometric mean", geometric_mean), summary("worst", max)])


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _columns(group: list[Row]) -> list[str]:
    """Contenders that have a number somewhere, or ought to."""
    return list(dict.fromkeys(row["contender"] for row in group if row["status"] != "skipped"))


def _table(group: list[Row], cell: Any, summaries: list[list[str]] | None = None) -> str:
    columns = _columns(group)
    lines = [["(N,L,K)", *columns]]
    for case in dict.fromkeys(_name(row) for row in group):
        by_contender = {row["contender"]: row for row in group if _name(row) == case}
        line = [case]
        for name in columns:
            row = by_contender[name]
            line.append({"ok": cell, "skipped": lambda _: "–"}.get(row["status"], lambda r: r["status"])(row))
        lines.append(line)
    lines += summaries or []
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line) for line in lines)


def _name(row: Row) -> str:
    return Case(**row["case"]).name


def about(threads: int, rounds: int, grid: str, clock: str) -> Row:
    """What the numbers were made with."""
    return {
        "grid": grid,
        "clock": clock,
        "threads": threads,
        "rounds": rounds,
        "ours": chosen(),
        "dimkern": dimkern.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("--grid", choices=GRIDS, default="quick", help="the shapes (default: %(default)s)")
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=["infonce"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: both; float32 for the readme grid")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved; medians count (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders, by the start of their names")
    parser.add_argument(
        "--patience", type=float, default=10.0, metavar="S",
        help="seconds a contender may take for its rounds of a shape; slower ones get fewer rounds, and the "
        "reference formula and KeOps are skipped where one call is foreseen to take longer (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall",
        help="cpu: seconds that this process was given, where others use the machine too; meant for --threads 1 "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples, errors and versions")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the README's pictures of this run")
    args = parser.parse_args(argv)

    # an empty cache makes compile times those of a first run; the compiler's workers would outlive the timing
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        dtypes = args.dtypes or (["float32"] if args.grid == "readme" else list(DTYPES))
        start = time.perf_counter()
        gauge = None if args.no_memory else Memory()
        session = Session(_field(args.only), args.threads, args.rounds, args.patience, gauge, args.clock)
        rows = session.run(GRIDS[args.grid], args.estimators, dtypes)
    result = {"about": about(args.threads, args.rounds, args.grid, args.clock), "rows": rows}
    print(" · ".join(f"{key} {value}" for key, value in result["about"].items()))
    print(tables(rows))
    print(f"\n{time.perf_counter() - start:.0f} s")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plots:
        from .plot import draw

        for path in draw(result, args.plots):
            print(path)
    return any(row["contender"].startswith("dimkern") and row["status"] in ("WRONG", "failed") for row in rows)


if __name__ == "__main__":
    sys.exit(main())
