"""The command line: every bad value gives one line that names the flag, and status 2."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

import dimkern
from dimkern import cli, train
from dimkern.reproduce import BUDGETS
from dimkern.train import TrainConfig, TrainingStopped, probes


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--epochs none", "--epochs: invalid int value: 'none'"),
        ("--epochs 0", "--epochs: got 0, must be at least 1"),
        ("--batch-size 1", "--batch-size: got 1, must be at least 2"),
        ("--batch-size 99999", "--batch-size: got 99999"),
        ("--lr 0", "--lr: got 0.0, must be a positive number"),
        ("--lr nan", "--lr: got nan, must be a positive number"),
        ("--scale nan", "--scale: got nan, must be at least 0"),
        ("--scale inf", "--scale: got inf, must be finite"),
        ("--seed -1", "--seed: got -1, must be at least 0"),
        (f"--seed {2**63}", f"--seed: got {2**63}, must be at most {2**63 - 1}"),
        ("--threads 1025", "--threads: got 1025, must be at most 1024"),
        ("--amp float16 --device cpu --data folder:/absent", "--amp: float16 needs CUDA"),
        ("--estimator mine", "--estimator: got 'mine', accepted are infonce, jsd"),
        ("--objective all", "--objective: got 'all', accepted are local, global, both"),
        ("--preset dim", "--preset: invalid choice: 'dim'"),
        ("--gamma inf", "--gamma: got inf, must be finite"),
        ("--objective global --alpha 0", "--objective: got 'global' at a weight of 0 and no prior: nothing to train"),
        ("--chunk 48", "--chunk: got 48, must be 0 or at least 2, and divide 64"),
        ("--chunk 32 --norm-batch 64", "--norm-batch: got 64, must be 0 or at least 2, and divide 32"),
        ("--critic concat --summaries map", "--summaries: got map, which needs heads; --critic concat has none"),
        ("--negatives some", "--negatives: got 'some', accepted are all, permute, roll"),
        ("--pool 1", "--pool: got 1, must be 0 or at least 2"),
        ("--train-images 50", "--batch-size: got 64, there are 50 training images"),
        ("--data cifar10 --data-root /absent", "--data-root: no data_batch_1.bin in /absent or /absent/cifar-10-bat"),
        ("--device tpu", "--device: got 'tpu', accepted are auto, cpu, cuda"),
        ("--amp int8", "--amp: got 'int8', accepted are off, bfloat16, float16"),
        ("--data cifar", "--data: got 'cifar', accepted are digits, fashion-mnist, cifar10, cifar100 and"),
        ("--data folder:/absent", "--data: /absent is not a folder"),
        ("--data fashion-mnist --data-root /absent", "--data-root: no train-images-idx3-ubyte"),
        ("--resume /absent", "--resume: no checkpoint at /absent"),
        ("--out /dev/null/x", "--out: cannot make /dev/null/x"),
        ("--nonsense 3", "unrecognized arguments: --nonsense"),
        ("--epochs", "--epochs: expected one argument"),
    ],
)
def test_bad_flags_are_named(flags, says, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *flags.split()])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in said
    assert said.count("\n") == 1


def test_an_absent_device_is_named_before_the_data_is_read(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        cli.main(["train", "--device", "cuda", "--data", "folder:/absent"])
    assert "--device: got cuda, but PyTorch finds none here" in capsys.readouterr().err


def test_flags_reach_the_settings(monkeypatch):
    got = []
    monkeypatch.setattr(train, "run", lambda config, resume, overwrite: got.append((config, resume, overwrite)))
    other = TrainConfig(epochs=3, lr=0.5, batch_size=7, estimator="jsd", data="folder:x", amp="bfloat16", out="there")
    flags = [
        text
        for field in dataclasses.fields(TrainConfig)
        for text in (cli.flag(field.name), str(getattr(other, field.name)))
    ]
    assert cli.main(["train", *flags, "--overwrite"]) == 0
    assert cli.main(["train"]) == 0
    assert got == [(other, None, True), (TrainConfig(), None, False)]


def test_a_preset_sets_the_weights_and_flags_beside_it_win(monkeypatch, capsys):
    got = []
    monkeypatch.setattr(train, "run", lambda config, resume, overwrite: got.append(config))
    assert cli.main(["train", "--preset", "dim-lg"]) == cli.main(["train", "--gamma", "0.3", "--preset", "dim-g"]) == 0
    assert got == [TrainConfig(objective="both", alpha=0.5, gamma=0.1), TrainConfig(objective="global", gamma=0.3)]


def test_help_shows_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for field in dataclasses.fields(TrainConfig):
        assert cli.flag(field.name) in said
        assert field.default == "" or f"(default: {field.default})" in said


def test_help_lists_the_budgets(capsys):
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "--help"])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said and budget.about in said for name, budget in BUDGETS.items())


def test_resume_from_the_command_line_refuses_a_changed_setting(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probes, "STEPS", 1)
    monkeypatch.setattr(probes, "EPOCHS", 1)
    small = ["--width", "4", "--fc", "8", "--units", "8", "--epochs", "1", "--out", str(tmp_path)]
    assert cli.main(["train", *small]) == 0
    with pytest.raises(SystemExit):
        cli.main(["train", "--resume", str(tmp_path), "--lr", "0.5"])
    assert "--lr: the checkpoint was trained with 0.0003, this run asks for 0.5" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(tmp_path), "--epochs", "2"]) == 0
    assert "trained 2 epochs" in capsys.readouterr().out


def test_a_stopped_run_says_so_without_a_traceback(monkeypatch, capsys):
    def stop(config, resume, overwrite):
        raise TrainingStopped("the loss is nan in epoch 1")

    monkeypatch.setattr(train, "run", stop)
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == "dimkern train: stopped: the loss is nan in epoch 1\n"


@pytest.mark.parametrize("absent", ["sklearn", "threadpoolctl"])
def test_missing_packages_say_what_to_install(monkeypatch, capsys, absent):
    monkeypatch.setattr(train, "find_spec", lambda name: None if name == absent else object())
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == f"dimkern train: error: training needs {absent}: pip install 'dimkern[train]'\n"


def test_import_and_version_need_none_of_the_extra():
    code = (
        "import sys\n"
        "for name in ('sklearn', 'matplotlib', 'tqdm', 'PIL', 'threadpoolctl'): sys.modules[name] = None\n"
        "import dimkern.train\n"
        "from dimkern.cli import main\n"
        "main(['--version'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"dimkern {dimkern.__version__}\n", "")


def test_python_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "dimkern"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "dimkern: error: the following arguments are required: COMMAND (see dimkern --help)\n"
