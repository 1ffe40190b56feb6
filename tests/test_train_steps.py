"""A step in chunks is the plain step, in bounded memory; the objective is the sum that its weights say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import dimkern
from dimkern.train import PRESETS, TrainConfig, loop
from dimkern.train.data import Images, load_digits, to_float
from dimkern.train.objective import Objective
from dimkern.train.steps import Steps

SMALL = {"width": 8, "fc": 16, "units": 16, "batch_size": 48, "lr": 1e-3}


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_digits()


def steps_of(images: Images, **settings: Any) -> Steps:
    torch.manual_seed(0)
    config = TrainConfig(**(SMALL | settings))
    steps = Steps(loop.make_model(config, images).double(), config, torch.device("cpu"))
    steps.objective.double()
    return steps


def objective_of(config: TrainConfig, images: Images) -> tuple[Objective, dict[str, torch.Tensor]]:
    """The objective, and what its model says about 48 images."""
    torch.manual_seed(0)
    model, generator = loop.make_model(config, images), torch.Generator().manual_seed(0)
    return Objective(config, model.encoder, generator), model(to_float(images.train[:48], torch.device("cpu")))


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "infonce"},
        {"estimator": "dv", "objective": "global"},
        {"estimator": "jsd", "objective": "both", "summaries": "map", "gamma": 0.3, "pool": 24},
        {"estimator": "jsd", "critic": "concat", "negatives": "permute"},
    ],
)
@pytest.mark.parametrize("chunk", [12, 24])
def test_a_chunked_step_is_the_plain_one(digits, settings, chunk):
    """Same batch-norm groups, same batch: loss, every gradient, every statistic and weight, in float64."""
    images = to_float(digits.train[:48], torch.device("cpu")).double()
    plain, chunked = (steps_of(digits, **settings, norm_batch=12, chunk=size) for size in (0, chunk))
    before = copy.deepcopy(plain.model.state_dict())
    said, again = plain.step(images), chunked.step(images)
    assert again == pytest.approx(said, rel=1e-6)
    for part in ("model", "objective"):
        modules = [getattr(steps, part) for steps in (plain, chunked)]
        for (name, one), other in zip(modules[0].named_parameters(), modules[1].parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-9), name
        for one, other in zip(modules[0].buffers(), modules[1].buffers(), strict=True):
            assert torch.allclose(one, other, rtol=1e-9)
    assert not all(torch.equal(before[name], value) for name, value in plain.model.state_dict().items())


def test_without_norm_groups_the_statistics_are_those_of_the_chunk(digits):
    assert [loop.make_model(TrainConfig(**(SMALL | s)), digits).norm_batch for s in ({}, {"chunk": 24})] == [0, 24]


def test_a_chunked_step_never_runs_the_encoder_on_more_than_a_chunk(digits):
    """Twice on every image: that is what bounds its memory, and what it costs."""
    steps = steps_of(digits, chunk=12)
    seen: list[int] = []
    steps.model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    steps.step(to_float(digits.train[:48], torch.device("cpu")).double())
    assert seen == [12] * 8


@pytest.mark.parametrize("preset", PRESETS)
def test_the_objective_is_the_weighted_sum_of_its_terms(digits, preset):
    config = TrainConfig(**(SMALL | PRESETS[preset]))
    objective, pairs = objective_of(config, digits)
    loss, mi = objective(pairs)
    weights = {"dim-g": (1.0, 0.0), "dim-l": (0.0, 1.0), "dim-lg": (0.5, 1.0)}[preset]
    expected = 0.0
    for name, weight in zip(("global", "local"), weights, strict=True):
        if weight:
            expected += weight * dimkern.infonce_loss(pairs[f"{name}_l"], pairs[f"{name}_m"])
    assert torch.allclose(loss, expected, rtol=1e-6)
    first = "global" if preset == "dim-g" else "local"
    assert mi == dimkern.infonce_loss(pairs[f"{first}_l"], pairs[f"{first}_m"], return_parts=True).mi


def test_a_pool_shares_negatives_with_nobody(digits):
    config = TrainConfig(**(SMALL | {"pool": 16}))
    objective, pairs = objective_of(config, digits)
    loss, _ = objective(pairs)
    l, m = pairs["local_l"], pairs["local_m"]
    alone = [dimkern.infonce_loss(l[i : i + 16], m[i : i + 16]) for i in (0, 16, 32)]
    assert torch.allclose(loss, torch.stack(alone).mean(), rtol=1e-6)


@pytest.mark.parametrize("negatives", ["all", "permute", "roll"])
def test_the_concat_critic_scores_the_encoders_own_features_and_is_trained(digits, negatives):
    config = TrainConfig(**(SMALL | {"critic": "concat", "negatives": negatives, "estimator": "jsd"}))
    objective, pairs = objective_of(config, digits)
    critic = objective.losses["local"].critic
    generator = torch.Generator().manual_seed(0) if negatives == "permute" else None
    expected = dimkern.fenchel_dual_loss(
        pairs["local_l"], pairs["code"], "JSD", critic=critic, negatives=negatives, generator=generator
    )
    assert torch.equal(objective(pairs)[0], expected)
    steps = steps_of(digits, critic="concat", negatives=negatives, estimator="jsd", lr=3e-3)
    before = [p.clone() for p in steps.objective.parameters()]
    images = to_float(digits.train[:48], torch.device("cpu")).double()
    losses = [steps.step(images)["loss"] for _ in range(25)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.1
    assert all(not torch.equal(p, q) for p, q in zip(before, steps.objective.parameters(), strict=True))
