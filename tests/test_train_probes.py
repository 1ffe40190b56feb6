"""Probes read what is there and nothing else, and the report says what was measured."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from dimkern.train import TrainConfig, loop, probes, report, run
from dimkern.train.data import Images, load_digits, to_float
from dimkern.train.encoder import Encoder


def test_probes_find_a_linear_code_and_only_chance_in_noise():
    rng = np.random.default_rng(0)
    labels, test_labels = np.arange(400) % 4, np.arange(200) % 4
    noise, test_noise = rng.normal(size=(400, 5)).astype("f4"), rng.normal(size=(200, 5)).astype("f4")
    assert max(probes.probe(noise, labels, test_noise, test_labels).values()) < 0.4
    code, test_code = (
        np.eye(4, dtype="f4")[y] * 1000 + x[:, :4] for y, x in ((labels, noise), (test_labels, test_noise))
    )
    assert min(probes.probe(code, labels, test_code, test_labels).values()) == 1.0


def test_few_labels_are_few_of_every_class():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 4)
    rows = probes.few_of_each(labels, 10, draw=0)
    assert np.bincount(labels[rows]).tolist() == [10, 10, 4]
    assert len(set(rows)) == 24
    assert not np.array_equal(rows, probes.few_of_each(labels, 10, draw=1))


def test_where_only_one_class_was_drawn_every_probe_says_that_class():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(20, 3)).astype("f4"), rng.normal(size=(8, 3)).astype("f4")
    test_labels = np.array([2, 2, 2, 2, 2, 2, 5, 5])
    found = probes.probe(train, np.full(20, 2), test, test_labels)
    assert found == dict.fromkeys(probes.PROBES, 0.75)


def test_calibration_counts_the_training_images_and_leaves_the_encoder_alone():
    torch.manual_seed(0)
    images = load_digits().train[:1000]
    encoder = Encoder(1, 8, width=4, fc=8)
    before = copy.deepcopy(encoder.state_dict())
    ready = probes.calibrated(encoder, images)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    maps = encoder.to_local[0][0](to_float(images, torch.device("cpu")))  # what the first batch norm sees
    assert torch.allclose(ready.to_local[0][1].running_mean, maps.mean((0, 2, 3)), atol=1e-5)
    assert torch.equal(
        ready(maps.new_zeros(1, 1, 8, 8)).fc, ready(maps.new_zeros(2, 1, 8, 8)).fc[:1]
    )  # evaluation mode


def test_a_run_reports_what_it_did(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probes, "STEPS", 200)
    threads = torch.get_num_threads()
    config = TrainConfig(width=8, fc=16, units=16, epochs=2, out=str(tmp_path), probe_images=300, threads=threads + 1,
                         objective="both", gamma=0.1)  # fmt: skip
    paths = run(config)
    said = capsys.readouterr().out
    assert {path.name for path in paths} == {"report.json", "curves.png", "probes.png", "score_map.png"}
    assert all(path.stat().st_size > 1000 and str(path) in said for path in paths)
    content = json.loads(paths[0].read_text())
    assert (content["threads"], torch.get_num_threads()) == (threads + 1, threads)
    assert content["config"]["epochs"] == len(content["epochs"]["seconds"]) == 2
    assert content["steps"].keys() == {"loss", "mi", "prior", "discriminator"}
    assert np.mean(content["steps"]["loss"][:20]) == pytest.approx(content["epochs"]["loss"][0])
    assert f"{100 * content['probes']['trained']['Y']['linear']:.1f}" in said
    assert content["probes"]["raw"]["linear"] > 0.9


def test_only_the_mlp_reads_what_is_not_linear():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 2)).astype("f4")
    labels = (x[:, 0] * x[:, 1] > 0).astype(int)
    seen = probes.probe(x[:2000], labels[:2000], x[2000:], labels[2000:], ("linear", "mlp"))
    assert seen["linear"] < 0.65
    assert seen["mlp"] > 0.93


def test_probes_of_a_seed_repeat_and_leave_the_generator_alone():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(300, 8)).astype("f4"), np.arange(300) % 3
    before = torch.get_rng_state()
    first, again, other = (probes.fitted("mlp", x, labels, seed)(x[:200] + 1) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("objective", ["local", "global"])
def test_without_labels_there_are_no_probes_but_a_report(tmp_path, objective):
    digits = load_digits()
    images = Images("mine", digits.train[:80], digits.held_out[:3], None, None)
    config = TrainConfig(width=4, fc=8, units=8, epochs=1, out=str(tmp_path), objective=objective, estimator="w1")
    done = loop.train(config, images)
    assert probes.probe_all(images, done.untrained, done.model.encoder, 100) is None
    names = {path.name for path in report.write_report(done, None, 0.0)}
    assert names == {"report.json", "curves.png"} | ({"score_map.png"} if objective == "local" else set())
    assert json.loads((tmp_path / "report.json").read_text())["steps"]["mi"] == [
        None
    ]  # W1 implies none; JSON has no NaN
    assert done.model.training  # drawing the scores in evaluation mode leaves the model as it was
