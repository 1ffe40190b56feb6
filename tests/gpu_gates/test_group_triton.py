"""The Triton kernels over a process group: gloo, and a simulated GPU for each process."""

import json

import pytest

pytest.importorskip("triton", reason="needs Triton (its compiler runs without a GPU)")

import group_cases
import torch.multiprocessing


@pytest.mark.parametrize("world", [2, 3])
def test_cases(world, tmp_path, monkeypatch):
    """Every property of group_triton.py on every process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(group_cases.run, (world, str(tmp_path), "group_triton"), world)
    failed = [json.loads((tmp_path / f"failed{rank}").read_text()) for rank in range(world)]
    assert not any(failed), "\n".join(f"{name}: {text}" for of_rank in failed for name, text in of_rank.items())
