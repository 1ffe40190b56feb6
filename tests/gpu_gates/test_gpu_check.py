"""benchmarks/gpu_check.py runs, here on the simulated GPU at toy size, so that it cannot rot."""

import json

import pytest

pytest.importorskip("triton", reason="needs Triton (its compiler runs without a GPU)")

import triton_losses  # noqa: F401, what cuBLAS does for a GPU's tensors
from simulator import simulated

from benchmarks import gpu_check


def test_it_runs(tmp_path, capsys):
    with simulated(90):
        assert gpu_check.main(["--device", "cpu", "--toy", "--json", str(tmp_path / "check.json")]) == 0
    result = json.loads((tmp_path / "check.json").read_text())
    served = {check["backend"] for check in result["correctness"]}
    assert {"triton", "triton-other", "streaming"} <= served
    assert all(check["ok"] and check["errors"] for check in result["correctness"])
    (times,) = result["times"]
    rows = {row["contender"]: row for row in times["rows"]}
    assert rows["dimkern-triton"]["seconds"] > 0
    assert rows["dimkern-triton"]["predicted_seconds"] > 0
    assert [rows[f"dimkern-{name}"]["weights"] for name in ("triton", "triton-other")] == ["stored", "in registers"]
    assert rows["floor"]["seconds"] > 0
    assert "x floor" in capsys.readouterr().out


def test_a_wrong_backend_is_found_and_not_timed(monkeypatch, tmp_path, capsys):
    right = gpu_check.loss_of
    monkeypatch.setattr(
        gpu_check, "loss_of", lambda e, l, m, backend: right(e, l, m, backend) * (1.05 if backend == "triton" else 1.0)
    )
    with simulated(90):
        assert gpu_check.main(["--device", "cpu", "--toy", "--json", str(tmp_path / "check.json")]) == 1
    (times,) = json.loads((tmp_path / "check.json").read_text())["times"]
    assert "dimkern-triton" not in {row["contender"] for row in times["rows"]}
    assert "WRONG" in capsys.readouterr().out
