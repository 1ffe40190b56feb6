"""The paper's comparison at the size of this machine: `dimkern reproduce`.

A job is one encoder, trained (or not) and probed: a row of the table, or a point of the curve over negatives, with one
seed. It leaves one JSON file; a job whose file is there is not done again, and one that was interrupted goes on from
its checkpoint. Several processes may share the work: each takes the jobs that no other is at. The tables and plots
(tables.py) are made from these files alone.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..train import checkpoint, loop, probes
from ..train.config import TrainConfig, refuse_changes
from ..train.data import Images, load_images
from ..train.errors import SettingError, TrainingStopped
from ..train.report import epoch_means, plain
from . import tables
from .budgets import BUDGETS, CONCAT, CURVE, NAMES, ROWS, UNTRAINED, Budget

PROBED = ("linear", "mlp", "linear_100", "linear_10")


@dataclass(frozen=True)
class Job:
    """One encoder to train and probe; `pool` is None for a row of the table."""

    row: str
    seed: int
    pool: int | None
    config: TrainConfig
    path: Path  # of its JSON


def jobs_of(budget: Budget, given: dict[str, Any], out: Path, seeds: tuple[int, ...]) -> list[Job]:
    """Every job in order: a seed's whole table, its part of the curve, then the next seed."""
    todo = []
    for seed in seeds:
        wanted: list[tuple[str, int | None, dict[str, Any]]] = [
            (row, None, budget.settings | own | given) for row, own in ROWS.items() if row != CONCAT or seed == seeds[0]
        ]
        common = CURVE | budget.curve | {"threads": given.get("threads", 0)}
        for pool in budget.pools:
            for estimator in ("infonce", "jsd"):
                wanted.append((NAMES[estimator], pool, common | {"estimator": estimator, "pool": pool}))
        for row, group, settings in wanted:
            slug = re.sub(r"[^a-z0-9]+", "-", row.lower()).strip("-") + (f"-pool{group}" if group else "")
            work = out / "work" / f"{slug}-seed{seed}"
            config = TrainConfig(**settings, seed=seed, out=str(work))
            todo.append(Job(row, seed, group, config, out / "results" / f"{work.name}.json"))
    return todo


def reproduce(budget: str, out: Path, given: dict[str, Any], seeds: tuple[int, ...] = ()) -> list[Path]:
    """Do what is left of a budget's jobs, rewriting tables in `out` after each, plots after each seed; their paths.

    Args:
        given: settings of every row in place of the budget's, such as data, data_root, threads.
        seeds: in place of the budget's.

    Raises:
        SettingError: unusable settings, files that are absent, or results in `out` that other settings made.
    """
    if min(seeds, default=0) < 0:
        raise SettingError("seeds", f"got {min(seeds)}, must be at least 0")
    todo = jobs_of(BUDGETS[budget], given, out, tuple(dict.fromkeys(seeds)) or BUDGETS[budget].seeds)
    for folder in ("results", "work"):
        checkpoint.writable(out / folder)
    left = [job for job in todo if not is_done(job)]
    print(f"{budget}: {BUDGETS[budget].about}; {len(todo)} jobs, {len(todo) - len(left)} of them done", flush=True)
    loaded: dict[tuple[str, int], Images] = {}
    started, did = time.perf_counter(), 0
    for i, job in enumerate(left):
        what = f"[{i + 1}/{len(left)}] {job.row}{f', pool {job.pool}' if job.pool else ''}, seed {job.seed}"
        with claimed(job) as mine:
            if not mine or is_done(job):
                print(f"{what}: another process {'did' if mine else 'is at'} it", flush=True)
                continue
            wanted = job.config.data, job.config.train_images
            if wanted not in loaded:
                loaded[wanted] = load_images(job.config)
                if loaded[wanted].train_labels is None:
                    raise SettingError("data", "the comparison needs labels: each class in a subfolder of its own")
            with loop.cpu_threads(job.config, loaded[wanted]):
                said = do(job, loaded[wanted])
        did += 1
        tables.write(out, budget, plots=i + 1 < len(left) and left[i + 1].seed != job.seed)
        minutes = (time.perf_counter() - started) / 60 / did * (len(left) - i - 1)
        print(f"{what}: {said}; about {minutes:.0f} minutes left", flush=True)
    return tables.write(out, budget)


@contextmanager
def claimed(job: Job) -> Iterator[bool]:
    """Whether this process has the job to itself, for as long as the context lasts (or the process lives)."""
    with Path(f"{job.config.out}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def is_done(job: Job) -> bool:
    """Whether the job's result is there; raises SettingError where other settings made it."""
    if not job.path.exists():
        return False
    saved = json.loads(job.path.read_text())["config"]
    try:
        refuse_changes(saved, job.config)
        if saved["data"] != job.config.data:
            raise SettingError(
                "data", f"the checkpoint was trained on {saved['data']}, this run asks for {job.config.data}"
            )
    except SettingError as error:
        why = error.why.replace("the checkpoint", "it")
        raise SettingError("out", f"{job.path} is of another comparison ({error.setting}: {why})") from error
    return True


def do(job: Job, images: Images) -> str:
    """Train, probe, and write the job's JSON; a line about it. A run that diverges is a result as well."""
    result: dict[str, Any] = {"row": job.row, "seed": job.seed, "pool": job.pool, "probes": None, "stopped": None}
    started = time.perf_counter()
    try:
        encoder, history = trained(job, images)
        result["history"] = history
    except TrainingStopped as error:
        result["stopped"] = str(error)
    middle = time.perf_counter()
    if result["stopped"] is None:
        result["probes"] = probes.probe_encoder(images, encoder, len(images.train), PROBED, job.seed)
    result["seconds"] = {"train": middle - started, "probe": time.perf_counter() - middle}
    result |= {"config": dataclasses.asdict(job.config), "images": images.fingerprint(), "versions": loop.versions()}
    result["config"]["out"] = result["config"]["data_root"] = ""  # places on the machine that made it
    tables.replace(job.path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    shutil.rmtree(job.config.out, ignore_errors=True)
    if result["stopped"]:
        return str(result["stopped"])
    y = result["probes"]["Y"]
    took = " + ".join(f"{name} {seconds:.0f} s" for name, seconds in result["seconds"].items())
    return f"{took}; linear on Y {100 * y['linear']:.1f} %, with 10 labels a class {100 * y['linear_10']:.1f} %"


def trained(job: Job, images: Images) -> tuple[Any, dict[str, Any]]:
    """The job's encoder, and the means of every epoch: from its checkpoint on, if it was interrupted."""
    if job.row == UNTRAINED:
        torch.manual_seed(job.seed)
        return loop.make_model(job.config, images).encoder, {}
    begun = Path(job.config.out) if (Path(job.config.out) / checkpoint.NAME).exists() else None
    run = loop.train(job.config, images, begun)
    epochs = {key: plain(epoch_means(run, key)) for key in run.history}
    return run.model.encoder, epochs
