"""Times in interleaved rounds, and the peak memory of one call in a process of its own."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch

from .cases import DTYPES, Case
from .contenders import contenders

_SAMPLE_SECONDS = 0.03  # a sample repeats short calls for about as long, or the clock and the caches are all it sees
_MOST_REPEATS = 50


# "cpu" counts what this process was given, for a machine that others use too: of one thread, lest waiting counts
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def once(call: Callable[[], object], clock: str = "wall") -> float:
    """Seconds of one call. What it returns is freed after the clock has stopped."""
    start = CLOCKS[clock]()
    result = call()
    seconds = CLOCKS[clock]() - start
    del result
    return seconds


def interleaved(
    calls: dict[str, Callable[[], object]],
    foreseen: dict[str, float],
    rounds: int,
    patience: float,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Samples in seconds of each call, in rounds A B C A B C so that a noisy neighbour disturbs all alike.

    Args:
        calls: warmed up.
        foreseen: seconds of one call each; a short call is repeated within its turn and the median counts, a long
            one takes part in only as many rounds as `patience` seconds admit, one at the least.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    turns = {name: max(1, min(rounds, int(patience / foreseen[name]))) for name in calls}
    repeats = {name: max(1, min(_MOST_REPEATS, int(_SAMPLE_SECONDS / foreseen[name]))) for name in calls}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name, call in calls.items():
                if (i + 1) * turns[name] // rounds > i * turns[name] // rounds:  # turns spread evenly over the rounds
                    samples[name].append(median(once(call, clock) for _ in range(repeats[name])))
    finally:
        gc.enable()
    return samples


class Memory:
    """Peak memory of a contender's forward and backward beyond its inputs and outputs.

    Each measurement is a fresh process (forked, where the system forks, from one that has imported torch and run
    nothing): inputs are made, a call at a tiny shape loads the libraries, then the process's peak resident size
    during one call at the real shape, less its size before and less the bytes of the two gradients. A compiled
    contender is called at the real shape first, so that the compiler does not count. Where Linux lets a process
    reset its peak (/proc/self/clear_refs) that is done; elsewhere an earlier peak can only hide, never invent, memory.
    """

    def __init__(self) -> None:
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self._context = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload([contenders.__module__])

    def peak(self, name: str, estimator: str, case: Case, dtype: str, threads: int) -> int | None:
        """Bytes, or None if the process died: most likely for want of memory."""
        receiver, sender = self._context.Pipe(duplex=False)
        child = self._context.Process(target=_peak, args=(sender, name, estimator, case, dtype, threads))
        child.start()
        sender.close()
        try:
            return receiver.recv()
        except EOFError:
            return None
        finally:
            child.join()


def _peak(sender: Connection, name: str, estimator: str, case: Case, dtype: str, threads: int) -> None:
    torch.set_num_threads(threads)
    contender = next(c for c in contenders() if c.name == name)
    l, m = case.inputs(DTYPES[dtype])
    call = contender.steps(estimator, l, m).both
    tiny = replace(case, N=8, L=min(case.L, 4), K=32)
    warm_up = call if contender.compiled else contender.steps(estimator, *tiny.inputs(DTYPES[dtype])).both
    warm_up()
    gc.collect()
    _reset_peak()
    before = _resident()
    outputs = call()
    extra = _peak_resident() - before - sum(x.numel() * x.element_size() for x in outputs)
    sender.send(max(0, extra))


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident() -> int:
    try:
        return _status("VmRSS")
    except OSError:
        import psutil

        return int(psutil.Process().memory_info().rss)


def _peak_resident() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
