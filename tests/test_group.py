"""The losses over a process group equal one process's on the whole batch: gloo, worlds of one to four processes."""

import json
import subprocess
import sys
import time
from pathlib import Path

import group_cases
import pytest
import torch.multiprocessing

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_cases(world, tmp_path, monkeypatch):
    """Every property of group_losses.py and group_training.py on every process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(group_cases.run, (world, str(tmp_path), "group_losses", "group_training"), world)
    failures = [
        f"rank {rank}, {name}: {text}"
        for rank in range(world)
        for name, text in json.loads((tmp_path / f"failed{rank}").read_text()).items()
    ]
    assert not failures, "\n".join(failures)


KILLED = """
import os, sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[3])
import group_cases, group_losses
from dimkern import grouped
rank = int(sys.argv[1])
group_cases.start(rank, 3, sys.argv[2])
if rank == 1:
    class Dying(group_losses.Failing):
        def __call__(self, *arguments):
            tiles = self.choose(*arguments)
            tiles.weigh = lambda *_: os._exit(3)
            return tiles
    grouped.ops._tiles = Dying(0)
loss, _ = group_cases.shared_loss("infonce", group_cases.F64_CASE, [2, 2, 2])
print("no error")
"""


def test_a_killed_process_ends_the_others_with_an_error(tmp_path):
    """Between two collectives of a step one process dies: the others raise within the timeout of the group."""
    started = time.monotonic()
    command = [sys.executable, "-c", KILLED]
    running = [
        subprocess.Popen(
            [*command, str(rank), tmp_path, HERE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(3)
    ]
    ended = [(*process.communicate(timeout=120), process.returncode) for process in running]
    assert time.monotonic() - started < 30 + group_cases.TIMEOUT.total_seconds()
    assert ended[1][2] == 3
    for out, error, status in (ended[0], ended[2]):
        assert status == 1, error
        assert "no error" not in out
        assert "Error" in error
        assert "RuntimeError" in error or "DistBackendError" in error or "DistNetworkError" in error, error
