"""One command for a machine with a GPU: is everything right, how fast is it, how much memory does it take?

    python -m benchmarks.gpu_check --json gpu_check.json

Correctness of every estimator, backend and dtype against float64; the same under compute-sanitizer where that is
installed; a CUDA graph; then times of forward and backward against the bare products, eager code and the packages that
are installed, with peak memory, utilisation and what the plan's model had predicted. A backend that is wrong is not
timed. No new case is begun once --seconds have passed, so that it ends within 8 minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from torch import Tensor

import dimkern
from dimkern import ops
from dimkern.config import memory_budget
from dimkern.estimators import REGISTRY
from dimkern.gpu import Chip, chip_of
from dimkern.gpu_plan import choices, mma_rate
from dimkern.plan import Plan, Problem, choose_backend, describe, plan_for, why_not
from dimkern.validate import as_locals, as_summaries

from .cases import Case
from .contenders import contenders

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}  # of a gradient, as a norm
SMALL = (Case(6, 11, 40, P=2), Case(7, 9, 64, layout="NKL"))
EVEN = (Case(128, 64, 256), Case(64, 49, 192, P=25))
TIMED = (
    Case(64, 64, 1024), Case(128, 64, 512), Case(512, 64, 1024), Case(512, 64, 64), Case(2048, 64, 128),
    Case(4096, 64, 64), Case(4096, 64, 1024), Case(8192, 1, 512),
)  # fmt: skip
TOY = (Case(4, 4, 16),)


def loss_of(estimator: str, l: Tensor, m: Tensor, backend: str) -> Tensor:
    if estimator == "infonce":
        return dimkern.infonce_loss(l, m, backend=backend)
    return dimkern.fenchel_dual_loss(l, m, estimator, backend=backend)


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.device("cpu"):  # the same numbers on every machine
        l, m = case.inputs(torch.float32)
    return l.to(device, dtype), m.to(device, dtype)


def differentiated(loss: Callable[[Tensor, Tensor], Tensor], l: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    leaves = l.detach().requires_grad_(), m.detach().requires_grad_()
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def error(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true).norm() / true.norm().clamp_min(1e-30))


def backends(device: torch.device) -> list[str]:
    """Those that serve here, the one to compare them with last."""
    return [name for name in dimkern.BACKENDS if name != "reference" and why_not(name, device) is None]


@lru_cache
def other_plan(problem: Problem, budget: int, backend: str) -> Plan:
    """The fastest plan with weights in registers where the chosen one stores them, or the other way round."""
    chosen = plan_for(problem, budget, backend)
    if chosen.gpu is None:
        return chosen
    stores = chosen.gpu.flash is None
    others = (x for x in choices(problem, chosen.gpu.chip, budget) if (x[-1].flash is None) != stores)
    found = min(others, key=lambda choice: choice[:2], default=None)
    if found is None:
        return chosen
    _, scratch, order, row_images, col_images, gpu = found
    return replace(chosen, order=order, row_images=row_images, col_images=col_images, scratch=scratch, gpu=gpu)


def ways(device: torch.device) -> dict[str, tuple[str, Callable[..., Plan]]]:
    """name: (backend, what plans for it). Triton's kernels for small K and for any are both run, whatever is chosen."""
    found = {name: (name, plan_for) for name in backends(device)}
    return found | ({"triton-other": ("triton", other_plan)} if "triton" in found else {})


def run(estimator: str, l: Tensor, m: Tensor, way: tuple[str, Callable[..., Plan]]) -> tuple[Tensor, ...]:
    backend, planned = way
    with mock.patch.object(ops, "plan_for", planned):
        return differentiated(partial(loss_of, estimator, backend=backend), l, m)


def correctness(device: torch.device, cases: tuple[Case, ...], estimators: list[str]) -> list[dict[str, object]]:
    """Loss and gradients of every estimator, backend and dtype against the naive pair tensor in float64."""
    found = []
    for case in cases:
        for kind, dtype in DTYPES.items():
            l, m = inputs(case, dtype, device)
            for estimator in estimators:
                true = differentiated(partial(loss_of, estimator, backend="reference"), l.double(), m.double())
                for name, way in ways(device).items():
                    try:
                        got = run(estimator, l, m, way)
                        errors = [error(x, y) for x, y in zip(got, true, strict=True)]
                        # not max(errors): it overlooks NaN
                        ok, reason = all(x <= LIMITS[dtype] for x in errors), ""
                    except (RuntimeError, ValueError) as problem:
                        errors, ok, reason = [], "cannot" in str(problem), str(problem)
                    found.append({"case": case.name, "dtype": kind, "estimator": estimator, "backend": name,
                                  "errors": errors, "ok": ok, "reason": reason})  # fmt: skip
    return found


def graph(device: torch.device) -> dict[str, object]:
    """Forward and backward of a small batch captured in a CUDA graph give what they give outside; launches counted."""
    if device.type != "cuda":
        return {"ok": None, "reason": f"no CUDA graph on {device.type}"}
    l, m = (x.requires_grad_() for x in inputs(Case(64, 64, 256), torch.bfloat16, device))

    def step() -> tuple[Tensor, ...]:
        loss = dimkern.infonce_loss(l, m)
        return loss.detach(), *torch.autograd.grad(loss, (l, m))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    launches = sum(e.count for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = step()
    captured.replay()
    torch.cuda.synchronize()
    return {"ok": all(torch.equal(x, y) for x, y in zip(got, expected, strict=True)), "launches": launches}


def sanitized(device: torch.device) -> dict[str, object]:
    """The small cases again under compute-sanitizer, in a process of their own."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or device.type != "cuda":
        return {"ok": None, "reason": "compute-sanitizer is not installed" if tool is None else f"{device} is no GPU"}
    command = [tool, "--error-exitcode", "1", sys.executable, "-m", "benchmarks.gpu_check", "--only", "correctness"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    return {"ok": done.returncode == 0, "reason": "" if done.returncode == 0 else done.stdout[-2000:]}


def peers(case: Case) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Packages that compute InfoNCE at L = P = 1, without the phantom negatives: timed, not compared."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    if case.L > 1 or case.P > 1:
        return found
    if find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy

        found["CCE"] = lambda l, m: linear_cross_entropy(m[..., 0], l[..., 0], torch.arange(case.N, device=l.device))
    if find_spec("inf_cl") is not None and case.K % 256 == 0:
        from inf_cl import cal_inf_loss

        found["Inf-CL"] = lambda l, m: cal_inf_loss(m[..., 0].contiguous(), l[..., 0].contiguous(), scale=1.0)
    return found


def calls_for(
    estimator: str, case: Case, l: Tensor, m: Tensor, p: Problem, wrong: set[str]
) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {}
    for contender in contenders():
        wanted = contender.name in ("floor", "eager", "compile", "linear-ce")
        if wanted and contender.reason(estimator, case, l.dtype) is None and contender.scratch(case) < 16e9:
            calls[contender.name] = contender.steps(estimator, l, m).both
    terms = memory_budget(l.device), "triton"
    for name, way in ways(l.device).items():
        there_is_one = name != "triton-other" or way[1](p, *terms) != plan_for(p, *terms)
        if name not in wrong and there_is_one:
            calls[f"dimkern-{name}"] = partial(run, estimator, l, m, way)
    for name, loss in peers(case).items():
        calls[name] = partial(differentiated, loss, l, m)
    return calls


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def measure(
    estimator: str, case: Case, device: torch.device, rounds: int, wrong: set[str]
) -> tuple[list[dict[str, object]], str]:
    l, m = inputs(case, torch.bfloat16, device)
    p = describe(estimator, as_locals(l), as_summaries(m), clip=None, grad_locals=True, grad_summaries=True)
    calls = calls_for(estimator, case, l, m, p, wrong)
    rows: list[dict[str, object]] = []
    chip = chip_of(device)
    for name in list(calls):
        peak = 0
        try:
            calls[name]()  # compiled, and out of the timing
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
                calls[name]()
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated() - held
        except (RuntimeError, ValueError, torch.OutOfMemoryError) as problem:
            rows.append({"contender": name, "reason": str(problem)[:300]})
            del calls[name]
            continue
        rows.append({"contender": name, "peak_bytes": peak, "samples": []})
    for _ in range(rounds):
        for row in rows:
            if "samples" in row:
                row["samples"].append(timed(calls[str(row["contender"])], device))
    flops = 6 * case.pairs * case.K
    for row in rows:
        if "samples" in row:
            row["seconds"] = median(row.pop("samples"))
            if isinstance(chip, Chip):
                row["utilisation"] = flops / row["seconds"] / (2 * mma_rate(p, chip))
            way = ways(device).get(str(row["contender"]).removeprefix("dimkern-"))
            if way is not None and way[0] == "triton":
                plan = way[1](p, memory_budget(device), "triton")
                assert plan.gpu is not None
                row["predicted_seconds"] = plan.gpu.seconds
                row["weights"] = "stored" if plan.gpu.flash is None else "in registers"
    return rows, choose_backend("auto", device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where to run (default: cuda)")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--seconds", type=float, default=420, help="begin no new case after this long (default: 420)")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds, whose median counts (default: 15)")
    parser.add_argument("--only", choices=["correctness"], help="stop after this part")
    parser.add_argument("--toy", action="store_true", help="the smallest case and two estimators, once")
    options = parser.parse_args(arguments)
    device, start = torch.device(options.device), time.monotonic()
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu checks what can be checked without one", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    result: dict[str, object] = {"device": name, "torch": torch.__version__, "dimkern": dimkern.__version__}
    print(dimkern.doctor())
    with torch.device(device):
        cases = TOY if options.toy else SMALL if options.only else SMALL + EVEN
        checks = correctness(device, cases, ["infonce", "jsd"] if options.toy else list(REGISTRY))
        result["correctness"] = checks
        wrong = {str(check["backend"]) for check in checks if not check["ok"]}
        for check in checks:
            if not check["ok"]:
                print(f"WRONG: {check}")
        print(f"correctness: {sum(bool(c['ok']) for c in checks)} of {len(checks)} within their limits")
        if not options.only:
            result |= {"graph": graph(device), "sanitizer": sanitized(device)}
            print(f"CUDA graph: {result['graph']}\ncompute-sanitizer: {result['sanitizer']}")
            result["times"] = times = []
            for case in TOY if options.toy else TIMED:
                for estimator in ("infonce",) if options.toy else ("infonce", "jsd"):
                    if time.monotonic() - start > options.seconds:
                        print(f"left out for want of time: {estimator} {case.name}")
                        continue
                    rows, auto = measure(estimator, case, device, 1 if options.toy else options.rounds, wrong)
                    times.append({"case": case.name, "estimator": estimator, "auto": auto, "rows": rows})
                    print(table(f"{estimator} {case.name} bfloat16, forward and backward; auto is {auto}", rows))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return int(bool(wrong))


def table(title: str, rows: list[dict[str, object]]) -> str:
    """Milliseconds, the floor as 1, peak memory, utilisation of the chip's peak, the model's prediction."""
    floor = next((float(r["seconds"]) for r in rows if r["contender"] == "floor" and "seconds" in r), float("nan"))
    lines = [title]
    for r in rows:
        if "seconds" not in r:
            lines.append(f"  {r['contender']!s:20} {r['reason']}")
            continue
        seconds, used = float(r["seconds"]), r.get("utilisation")
        predicted = f", predicted {float(r['predicted_seconds']) * 1e3:.3g} ms" if r.get("predicted_seconds") else ""
        predicted += f", weights {r['weights']}" if "weights" in r else ""
        share = f", {float(used):.0%} of peak" if used is not None else ""
        lines.append(
            f"  {r['contender']!s:20} {seconds * 1e3:9.3f} ms  {seconds / floor:6.2f} x floor, "
            f"{float(r['peak_bytes']) / 1e6:8.1f} MB{share}{predicted}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
