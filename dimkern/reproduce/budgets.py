"""The rows of the paper's comparison and what may be spent on them; imports without the packages of the extra."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from ..train.config import PRESETS

NAMES = {"infonce": "InfoNCE", "jsd": "JSD", "dv": "DV"}
UNTRAINED = "untrained"
CONCAT = "DIM(L) JSD, concat critic, permuted negatives"  # with one seed: its pairs cost most
ROWS: dict[str, dict[str, Any]] = {UNTRAINED: {}}
for preset, estimator in product(("dim-g", "dim-l"), ("dv", "jsd", "infonce")):
    name = f"{preset.upper().replace('-', '(')}) {NAMES[estimator]}"
    ROWS[name] = PRESETS[preset] | {"estimator": estimator, "gamma": 0.0}
    ROWS[name + ", prior"] = PRESETS[preset] | {"estimator": estimator}
ROWS[CONCAT] = PRESETS["dim-l"] | {"estimator": "jsd", "gamma": 0.0, "critic": "concat", "negatives": "permute"}

# Of the curve: images that share negatives, of batches of 64 digits whose local map has 16 locations.
CURVE = {"data": "digits", "batch_size": 64, "width": 32, "fc": 256, "units": 256, "lr": 3e-4}


@dataclass(frozen=True)
class Budget:
    """How much is spent: `settings` of every row alike, `curve` those of every point of the curve."""

    about: str
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    curve: dict[str, Any]
    pools: tuple[int, ...] = (2, 4, 8, 16, 32, 64)


PAPERS = {"data": "fashion-mnist", "width": 64, "fc": 1024, "units": 128, "lr": 1e-3}  # the encoder is the paper's
BUDGETS = {
    "smoke": Budget(
        "a minute, on digits: checks that everything runs, says little about the methods",
        (0,),
        {"data": "digits", "width": 16, "fc": 64, "units": 32, "batch_size": 64, "lr": 1e-3, "epochs": 3},
        {"train_images": 512, "epochs": 2},
        pools=(2, 64),
    ),
    "hour": Budget(
        "within an hour on two cores: the paper's encoder, 10,000 of the training images, 3 epochs",
        (0, 1, 2),
        PAPERS | {"batch_size": 64, "train_images": 10_000, "epochs": 3},
        {"epochs": 10},
    ),
    "full": Budget(
        "several hours on two cores: the paper's encoder, all training images, 2 epochs",
        (0, 1, 2),
        PAPERS | {"batch_size": 256, "epochs": 2},
        {"epochs": 20},
    ),
}
