"""The comparison: every row once, from where it was, and tables that say what the results say."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dimkern import cli
from dimkern.reproduce import BUDGETS, jobs, tables
from dimkern.reproduce.budgets import ROWS
from dimkern.train import SettingError, TrainingStopped, loop, probes


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A budget of two rows and no curve, probed in few steps; the names of the rows trained, as it goes."""
    trained: list[str] = []
    honest = jobs.trained

    def counted(job: jobs.Job, images: Any) -> Any:
        trained.append(job.row)
        return honest(job, images)

    monkeypatch.setattr(probes, "STEPS", 30)
    monkeypatch.setattr(probes, "EPOCHS", 1)
    monkeypatch.setattr(jobs, "trained", counted)
    monkeypatch.setattr(jobs, "ROWS", {name: ROWS[name] for name in ("untrained", "DIM(L) JSD, prior")})
    smoke = BUDGETS["smoke"]
    settings = smoke.settings | {"width": 4, "fc": 16, "units": 8}
    monkeypatch.setitem(BUDGETS, "smoke", dataclasses.replace(smoke, pools=(), settings=settings))
    return trained


def results(out: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (out / "results").glob("*.json")}


@pytest.mark.slow
def test_the_smoke_budget_makes_everything_from_one_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probes, "STEPS", 100)
    assert cli.main(["reproduce", "--budget", "smoke", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    rows = {one["row"] for one in results(tmp_path).values() if one["pool"] is None}
    ways = {
        f"{objective} {estimator}{prior}"
        for objective in ("DIM(G)", "DIM(L)")
        for estimator in ("DV", "JSD", "InfoNCE")
        for prior in ("", ", prior")
    }
    assert rows == ways | {"untrained", "DIM(L) JSD, concat critic, permuted negatives"}
    curve = {(one["row"], one["pool"]) for one in results(tmp_path).values() if one["pool"] is not None}
    assert curve == {(row, pool) for row in ("InfoNCE", "JSD") for pool in (2, 64)}
    for name in ("table.md", "table.csv", "table.png", "negatives.png"):
        assert (tmp_path / name).stat().st_size > 500
        assert str(tmp_path / name) in said
    assert "[18/18]" in said
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]
    y = {one["row"]: one["probes"]["Y"]["linear_10"] for one in results(tmp_path).values() if one["pool"] is None}
    assert y["DIM(L) JSD"] > y["untrained"] + 0.03  # it learnt something


def test_what_is_done_is_not_done_again_and_what_is_missing_is(tmp_path, short):
    jobs.reproduce("smoke", tmp_path, {}, (0, 1))
    before = results(tmp_path)
    assert short == ["untrained", "DIM(L) JSD, prior"] * 2
    jobs.reproduce("smoke", tmp_path, {}, (0, 1))
    assert len(short) == 4
    (tmp_path / "results" / "dim-l-jsd-prior-seed1.json").unlink()
    jobs.reproduce("smoke", tmp_path, {}, (0, 1))
    assert short[4:] == ["DIM(L) JSD, prior"]
    again = results(tmp_path)
    assert all(again[name]["probes"] == before[name]["probes"] for name in before)


def test_an_interrupted_row_goes_on_from_its_checkpoint(tmp_path, short, monkeypatch):
    jobs.reproduce("smoke", tmp_path / "straight", {})
    honest, calls = loop.Steps.step, []

    def step(self: loop.Steps, images: torch.Tensor) -> dict[str, float]:
        calls.append(None)
        if len(calls) == 30:  # in the second of three epochs of 20 steps
            raise KeyboardInterrupt
        return honest(self, images)

    monkeypatch.setattr(loop.Steps, "step", step)
    with pytest.raises(KeyboardInterrupt):
        jobs.reproduce("smoke", tmp_path / "cut", {})
    jobs.reproduce("smoke", tmp_path / "cut", {})
    assert len(calls) == 30 + 40  # the first epoch was kept
    straight, cut = (results(tmp_path / name) for name in ("straight", "cut"))
    for name, one in straight.items():
        assert cut[name]["probes"] == one["probes"]
        assert cut[name].get("history", {}).get("loss") == one.get("history", {}).get("loss")


def test_processes_share_the_rows_and_never_the_same_one(tmp_path, short, capsys):
    todo = jobs.jobs_of(BUDGETS["smoke"], {}, tmp_path, (0,))
    (tmp_path / "work").mkdir()
    with jobs.claimed(todo[0]) as mine, jobs.claimed(todo[0]) as again:
        assert (mine, again) == (True, False)
        jobs.reproduce("smoke", tmp_path, {})
        assert short == ["DIM(L) JSD, prior"]
        assert "untrained, seed 0: another process is at it" in capsys.readouterr().out
    jobs.reproduce("smoke", tmp_path, {})
    assert short == ["DIM(L) JSD, prior", "untrained"]


def test_results_of_other_settings_are_refused_and_named(tmp_path, short, monkeypatch, capsys):
    jobs.reproduce("smoke", tmp_path, {})
    with pytest.raises(SettingError, match=r"^out: .*seed0.json is of another comparison .*digits.*cifar10"):
        jobs.reproduce("smoke", tmp_path, {"data": "cifar10"})
    BUDGETS["smoke"].settings["fc"] = 17
    with pytest.raises(SettingError, match=r"^out: .*untrained-seed0.json is of another comparison \(fc: .*16.*17\)"):
        jobs.reproduce("smoke", tmp_path, {})
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "--budget", "smoke", "--out", str(tmp_path)])
    assert "dimkern reproduce: error: --out: " in capsys.readouterr().err


def test_unusable_flags_are_named_before_anything_is_trained(tmp_path, short, capsys):
    (tmp_path / "file").touch()
    for flags, says in (
        (["--out", str(tmp_path / "file")], "--out: cannot make"),
        (["--out", str(tmp_path), "--seeds", "0", "-1"], "--seeds: got -1"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["reproduce", "--budget", "smoke", *flags])
        assert says in capsys.readouterr().err
    assert short == []


def test_a_row_that_diverges_is_a_result(tmp_path, short, monkeypatch):
    def diverge(job: jobs.Job, images: Any) -> Any:
        raise TrainingStopped("the loss is nan in epoch 1")

    monkeypatch.setattr(jobs, "trained", diverge)
    jobs.reproduce("smoke", tmp_path, {})
    assert {one["stopped"] for one in results(tmp_path).values()} == {"the loss is nan in epoch 1"}
    assert "| untrained | – | – | – | – | – | – | 1, 1 diverged |" in (tmp_path / "table.md").read_text()


def test_tables_say_what_the_results_say(tmp_path, short):
    jobs.reproduce("smoke", tmp_path, {}, (3, 4))
    found = results(tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    heads = next(line for line in lines if "conv, linear" in line).split(" | ")
    for row, slug in (("untrained", "untrained"), ("DIM(L) JSD, prior", "dim-l-jsd-prior")):
        cells = next(line for line in lines if line.startswith(f"| {row} |")).split(" | ")
        for head, probe in (("Y, MLP", "mlp"), ("Y, linear", "linear")):
            values = [100 * found[f"{slug}-seed{seed}"]["probes"]["Y"][probe] for seed in (3, 4)]
            assert cells[heads.index(head)] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    with (tmp_path / "table.csv").open() as file:
        for line in csv.DictReader(file):
            slug = {"untrained": "untrained"}.get(line["row"], "dim-l-jsd-prior")
            accuracy = found[f"{slug}-seed{line['seed']}"]["probes"][line["feature"]][line["probe"]]
            assert float(line["accuracy"]) == pytest.approx(100 * accuracy, abs=0.0051)
    assert "digits, 1343 training images, 3 epochs" in lines[0]
    assert str(tmp_path) not in "".join(map(str, found.values()))  # a result names no place of the machine


def test_rows_are_trained_alike_but_for_what_they_are_named_after(tmp_path):
    todo = jobs.jobs_of(BUDGETS["hour"], {"threads": 1}, tmp_path, (0, 1, 2))
    rows = [job for job in todo if job.pool is None]
    assert [job.seed for job in todo] == sorted(job.seed for job in todo)
    assert len(rows) == 3 * 13 + 1
    own = {"objective", "estimator", "alpha", "beta", "gamma", "critic", "negatives", "out", "seed"}
    common = {json.dumps({k: v for k, v in dataclasses.asdict(job.config).items() if k not in own}) for job in rows}
    assert len(common) == 1
    assert {job.config.gamma for job in rows if "prior" in job.row} == {1.0, 0.1}
    assert {job.config.gamma for job in rows if "prior" not in job.row} == {0.0}
    assert len({job.path for job in todo}) == len(todo)
    assert {job.config.pool for job in todo if job.pool} == {2, 4, 8, 16, 32, 64}


def test_no_result_is_no_table(tmp_path):
    (tmp_path / "results").mkdir()
    assert tables.write(tmp_path, "smoke") == []
