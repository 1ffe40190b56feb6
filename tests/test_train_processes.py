"""`dimkern train` under torchrun: the run of one process, to rounding, and one report; any number of them goes on."""

import json
import os
import subprocess
import sys

import pytest

from dimkern.train import SettingError, TrainConfig, checkpoint
from dimkern.train.data import load_digits
from dimkern.train.loop import refuse_sharing, train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]

# without the probes, which take longer than the training
GO_ON = """
import sys
from pathlib import Path
from dimkern.train import checkpoint, loop, processes
from dimkern.train.data import load_digits
config = checkpoint.settings(Path(sys.argv[1]), {"epochs": 3})
with processes.joined("cpu") as several:
    loop.train(config, load_digits(), Path(sys.argv[1]), processes=several)
"""


def torchrun(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*TORCHRUN, *map(str, command)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    alone = train(TrainConfig(batch_size=64, epochs=3, out=str(tmp_path / "one")), load_digits()).history["loss"]
    two = tmp_path / "two"
    said = torchrun(
        "-m", "dimkern", "train", "--batch-size", 32, "--epochs", 1, "--probe-images", 100, "--out", two
    )  # fmt: skip
    assert said.count("wrote") == 5
    assert said.count("training and") == 1
    assert "2 processes" in said
    together = json.loads((two / "report.json").read_text())["steps"]["loss"]
    assert len(together) == len(alone) // 3
    # float32, and steps of Adam that make much of its rounding; to 1e-9 in float64 (group_training.py)
    assert together[:5] == pytest.approx(alone[:5], rel=1e-4)
    assert together == pytest.approx(alone[: len(together)], rel=1e-2)

    train(checkpoint.settings(two, {"epochs": 2}), load_digits(), two)  # alone
    (tmp_path / "go_on.py").write_text(GO_ON)
    torchrun(tmp_path / "go_on.py", two)
    _, saved = checkpoint.load(two)
    assert saved["config"]["batch_size"] == 64
    assert saved["history"]["loss"] == pytest.approx(alone, rel=3e-2)


def test_settings_that_need_the_whole_batch_are_refused():
    for settings in (
        {"negatives": "roll"},
        {"pool": 8},
        {"batch_size": 2},
        {"batch_size": 24, "chunk": 12},
    ):
        name = next(iter(settings))
        refuse_sharing(TrainConfig(**settings), 1)
        with pytest.raises(SettingError, match=name):
            refuse_sharing(TrainConfig(**settings), 3)
