"""Training learns, stops when it must, and goes on from a checkpoint as if it had never stopped."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from dimkern.train import SettingError, TrainConfig, TrainingStopped, checkpoint, loop
from dimkern.train.config import ESTIMATORS
from dimkern.train.data import Images, load_digits
from dimkern.train.objective import make_loss


@pytest.fixture(scope="module")
def digits() -> Images:
    whole = load_digits()
    return dataclasses.replace(whole, train=whole.train[:256], train_labels=whole.train_labels[:256])


def small(out: Any, **settings: Any) -> TrainConfig:
    return TrainConfig(**{"out": str(out), "width": 8, "fc": 32, "units": 16, "epochs": 2, "lr": 1e-3, **settings})


def weights(run: loop.Run) -> torch.Tensor:
    return torch.cat([t.flatten().double() for t in run.model.state_dict().values()])


@pytest.mark.parametrize("objective", ["local", "global", "both"])
def test_training_lowers_the_loss_and_lifts_the_mi_estimate(tmp_path, digits, objective):
    run = loop.train(small(tmp_path, objective=objective, epochs=5), digits)
    loss, mi = (torch.tensor(run.history[key]).view(5, -1).mean(1) for key in ("loss", "mi"))
    assert (loss.diff() < 0).all()
    assert (mi.diff() > 0).all()
    assert mi[-1] < math.log(64 * 16)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_lowers_its_loss(tmp_path, digits, estimator):
    history = loop.train(small(tmp_path, estimator=estimator, epochs=4), digits).history
    assert sum(history["loss"][-4:]) < sum(history["loss"][:4])
    assert len(history["loss"]) == 4 * (256 // 64)


def test_scale_is_one_unless_the_loss_is_exponential_in_it():
    def scale(name: str, **settings: Any) -> float:
        return make_loss(TrainConfig(estimator=name, units=64, **settings), None, torch.Generator()).scale

    scales = {name: scale(name) for name in ESTIMATORS}
    assert {name for name, scale in scales.items() if scale == 1 / 8} == {"kl", "rkl", "h2"}
    assert set(scales.values()) == {1, 1 / 8}
    assert scale("kl", scale=0.3) == 0.3
    assert scale("kl", critic="concat") == 1  # its scores start small


@pytest.mark.parametrize(
    "settings",
    [
        {"amp": "bfloat16"},
        {"estimator": "dv", "objective": "global"},
        {"objective": "both", "gamma": 0.1, "augment": "crop-flip", "chunk": 32, "norm_batch": 16},
        {"critic": "concat", "negatives": "permute", "estimator": "jsd"},
    ],
)
def test_resumed_run_equals_one_never_interrupted(tmp_path, digits, settings):
    straight = loop.train(small(tmp_path / "straight", epochs=4, **settings), digits)
    loop.train(small(tmp_path / "first", epochs=2, **settings), digits)
    torch.manual_seed(12345)  # whatever happened in between
    resumed = loop.train(small(tmp_path / "second", epochs=4, **settings), digits, tmp_path / "first")
    assert torch.equal(weights(straight), weights(resumed))
    assert straight.history.keys() == resumed.history.keys()
    for key in straight.history.keys() - {"seconds"}:
        assert straight.history[key] == resumed.history[key]
    assert len(straight.history["loss"]) == 16
    one, other = (checkpoint.load(tmp_path / name)[1]["steps"]["adam"]["state"] for name in ("straight", "second"))
    assert all(torch.equal(one[i][key], other[i][key]) for i in one for key in one[i])


def test_the_largest_seed_trains(tmp_path, digits):
    assert loop.train(small(tmp_path, epochs=1, seed=2**63 - 1), digits).history["loss"]


def test_seed_decides_the_run(tmp_path, digits):
    first, again, other = (
        weights(loop.train(small(tmp_path / str(i), epochs=1, seed=s), digits)) for i, s in enumerate((3, 3, 4))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_setting_is_either_compared_or_free(tmp_path, digits):
    loop.train(small(tmp_path, epochs=2), digits)
    changed = {"image_size": 40, "color": "gray", "train_images": 100, "augment": "crop"}
    changed |= {"objective": "global", "alpha": 2.0, "beta": 2.0, "gamma": 0.1, "estimator": "jsd", "scale": 2.0}
    changed |= {"critic": "concat", "negatives": "roll"}
    changed |= {"summaries": "map", "pool": 32, "prior": "gaussian", "penalty": 2.0, "prior_updates": "one-step"}
    changed |= {"width": 9, "fc": 33, "units": 17, "epochs": 1, "batch_size": 32, "chunk": 32, "norm_batch": 32}
    changed |= {"lr": 2e-3, "seed": 1, "amp": "bfloat16"}
    for name, value in changed.items():
        with pytest.raises(SettingError, match=f"^{name}: the checkpoint.*{getattr(small(tmp_path), name)}"):
            loop.train(small(tmp_path, **{name: value}), digits, tmp_path)
    free = {"data", "data_root", "device", "threads", "probe_images", "out"}  # data: its images are compared instead
    assert free | set(changed) == {field.name for field in dataclasses.fields(TrainConfig)}


def test_resume_refuses_other_images(tmp_path, digits):
    loop.train(small(tmp_path, epochs=1), digits)
    with pytest.raises(SettingError, match=r"^data: "):
        loop.train(small(tmp_path), dataclasses.replace(digits, train=digits.train.flip(3)), tmp_path)


def test_resume_takes_unnamed_settings_from_the_checkpoint(tmp_path, digits):
    loop.train(small(tmp_path, epochs=1), digits)
    assert checkpoint.settings(tmp_path, {"epochs": 9}) == small(tmp_path, epochs=9)


def test_a_run_that_was_moved_goes_on_where_it_is(tmp_path, digits):
    path = loop.train(small(tmp_path / "before", epochs=1), digits).checkpoint
    now = path.parent.rename(tmp_path / "now")
    for resume in (now, now / path.name):
        assert checkpoint.settings(resume, {}).out == str(now)
        assert checkpoint.settings(resume, {"out": "there"}).out == "there"
    loop.train(checkpoint.settings(now, {"epochs": 2}), digits, now)
    assert [child.name for child in tmp_path.iterdir()] == ["now"]


def test_a_finished_run_resumed_elsewhere_leaves_a_checkpoint_there(tmp_path, digits):
    first = loop.train(small(tmp_path / "r2", epochs=1), digits)
    again = loop.train(small(tmp_path / "r3", epochs=1), digits, tmp_path / "r2")
    assert again.checkpoint == tmp_path / "r3" / checkpoint.NAME
    assert torch.equal(
        weights(first), weights(loop.train(checkpoint.settings(tmp_path / "r3", {}), digits, tmp_path / "r3"))
    )
    one, other = (
        weights(loop.train(small(tmp_path / name, epochs=2), digits, tmp_path / name)) for name in ("r2", "r3")
    )
    assert torch.equal(one, other)


def test_another_run_is_replaced_only_when_asked(tmp_path, digits):
    path = loop.train(small(tmp_path / "a", epochs=1), digits).checkpoint
    loop.train(small(tmp_path / "b", epochs=1), digits)
    kept = path.read_bytes()
    for resume in (None, tmp_path / "b"):
        with pytest.raises(SettingError, match=r"^out: .*holds a run.*--overwrite"):
            loop.train(small(tmp_path / "a", epochs=2), digits, resume)
    assert path.read_bytes() == kept
    assert len(loop.train(small(tmp_path / "a", epochs=2), digits, path).history["seconds"]) == 2
    assert len(loop.train(small(tmp_path / "a", epochs=1), digits, overwrite=True).history["seconds"]) == 1


def test_checkpoint_is_safe_to_load_and_an_interrupted_write_keeps_the_last(tmp_path, digits, monkeypatch):
    path = loop.train(small(tmp_path, epochs=1), digits).checkpoint
    state = torch.load(path, weights_only=True)
    assert state["config"] == dataclasses.asdict(small(tmp_path, epochs=1))

    def full_disk(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"steps": None})
    assert torch.load(path, weights_only=True)["history"] == state["history"]


@pytest.mark.parametrize("content", [None, b"", b"junk", b"PK\x03\x04 cut short"])
def test_unreadable_checkpoint_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / checkpoint.NAME).write_bytes(content)
    with pytest.raises(SettingError, match=f"^resume: .*{tmp_path}"):
        checkpoint.load(tmp_path)


def test_foreign_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(SettingError, match="not a checkpoint of"):
        checkpoint.load(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: [state.pop(key) for key in set(state) - {"format"}], "lacks config, images, steps, order, hist"),
        (lambda state: state.pop("order"), "lacks order$"),
        (lambda state: state.update(config=None), "its config lacks epochs$"),
        (lambda state: state["config"].pop("epochs"), "its config lacks epochs$"),
        (lambda state: state["config"].update(warmup=3, cosine=1), "does not know: cosine, warmup$"),
    ],
)
def test_a_checkpoint_with_parts_missing_or_unknown_is_named(tmp_path, digits, change, says):
    path = loop.train(small(tmp_path, epochs=1), digits).checkpoint
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    for use in (lambda: checkpoint.settings(tmp_path, {}), lambda: loop.train(small(tmp_path), digits, path)):
        with pytest.raises(SettingError, match=f"^resume: {path} .*{says}"):
            use()


def test_nan_loss_stops_with_step_checkpoint_and_hint(tmp_path, digits, monkeypatch):
    honest, calls = loop.Steps.step, []

    def step(self: loop.Steps, images: torch.Tensor) -> dict[str, float]:
        calls.append(None)
        return honest(self, images * math.nan if len(calls) == 6 else images)

    monkeypatch.setattr(loop.Steps, "step", step)
    with pytest.raises(
        TrainingStopped, match=r"loss is nan in epoch 2, step 6; .*checkpoint\.pt\. Start again with a smaller --lr"
    ):
        loop.train(small(tmp_path), digits)
    assert len(checkpoint.load(tmp_path)[1]["history"]["loss"]) == 4  # of the good epoch, and loadable


def test_a_weight_gone_bad_is_never_saved(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(loop.Steps, "finite", lambda self: False)
    with pytest.raises(TrainingStopped, match="no checkpoint was written yet"):
        loop.train(small(tmp_path), digits)
    assert not (tmp_path / checkpoint.NAME).exists()


def test_the_threads_of_the_process_are_as_before(tmp_path, digits, monkeypatch):
    before = torch.get_num_threads()
    run = loop.train(small(tmp_path, epochs=1, threads=before + 1), digits)
    assert (run.threads, torch.get_num_threads()) == (before + 1, before)
    monkeypatch.setattr(loop.Steps, "finite", lambda self: False)
    with pytest.raises(TrainingStopped):
        loop.train(small(tmp_path / "bad", threads=before + 1), digits)
    assert torch.get_num_threads() == before


def test_bfloat16_stays_close_to_float32(tmp_path, digits):
    full, half = (
        loop.train(small(tmp_path / amp, epochs=1, amp=amp), digits).history["loss"] for amp in ("off", "bfloat16")
    )
    assert full != half  # it was on
    assert half == pytest.approx(full, rel=0.05)


def test_what_the_machine_or_the_data_cannot_do_is_refused(tmp_path, digits):
    with pytest.raises(SettingError, match=r"^batch_size: .*256"):
        loop.train(small(tmp_path, batch_size=257), digits)
    if not torch.cuda.is_available():
        with pytest.raises(SettingError, match=r"^device: "):
            loop.train(small(tmp_path, device="cuda"), digits)
        with pytest.raises(SettingError, match=r"^amp: "):
            loop.train(small(tmp_path, amp="float16"), digits)
