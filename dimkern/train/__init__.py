"""The thin training harness over the public losses of dimkern; `pip install 'dimkern[train]'`.

config     every setting, once                  loop    epochs, checkpoints, resume
data       images, split, fingerprint           steps   one step: whole, or in chunks
encoder    encoder, heads, DeepInfoMax          probes  linear, MLP and k-NN accuracies
objective  the losses of dimkern, weighted      report  report.json and plots
prior      the adversary of prior matching
processes  several of them under torchrun

`run` is the whole of `dimkern train`. This module and `config` import without the packages of the extra.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .config import PRESETS, TrainConfig
from .errors import SettingError, TrainingStopped

if TYPE_CHECKING:
    from .processes import Processes

__all__ = ["PRESETS", "SettingError", "TrainConfig", "TrainingStopped", "require_extra", "run"]

NEEDS = ("numpy", "sklearn", "matplotlib", "tqdm", "PIL", "threadpoolctl")


def run(config: TrainConfig, resume: Path | None = None, *, overwrite: bool = False) -> list[Path]:
    """Train, probe, plot; print the outcome. The paths written, `report.json` first.

    Processes that torchrun started share every batch, of `config.batch_size` images in all; the first one prints and
    writes, the others return no paths.

    Raises:
        SettingError: a setting that does not fit the data, the machine or the run resumed.
        TrainingStopped: the loss or a weight is no longer finite.
        ModuleNotFoundError: the packages of the extra are not installed (the message says what to install).
    """
    require_extra()
    from . import processes

    with processes.joined(config.device) as several:
        return _run(config, resume, overwrite, several)


def _run(config: TrainConfig, resume: Path | None, overwrite: bool, several: Processes) -> list[Path]:
    from . import data, loop, probes, report

    def say(text: str) -> None:
        if several.first:
            print(text, flush=True)

    loop.pick_device(config)  # refused before the data is read, which may take minutes
    images = data.load_images(config)
    shape, held_out = "x".join(map(str, images.train.shape[1:])), len(images.held_out)
    say(f"{images.name}: {len(images.train)} training and {held_out} held-out images of {shape}")
    with loop.cpu_threads(config, images):  # the probes and plots run the encoder too
        done = loop.train(config, images, resume, overwrite=overwrite, processes=several)
        seconds = sum(done.history["seconds"])
        where = f"{several.world} processes on {done.device.type}" if several.group else done.device.type
        say(f"trained {len(done.history['seconds'])} epochs in {seconds:.1f} s on {where}")
        if not several.first:
            return []

        started = time.perf_counter()
        table = probes.probe_all(images, done.untrained, done.model.encoder, config.probe_images)
        paths = report.write_report(done, table, time.perf_counter() - started)
    if table is None:
        say("no labels, so no probes: put each class in its own subfolder to have them")
    else:
        say("\n" + report.table_text(table) + "\n")
        say(report.outcome(table))
    for path in (done.checkpoint, *paths):
        say(f"wrote {path}")
    return paths


def require_extra() -> None:
    """Raise ModuleNotFoundError, saying what to install, unless the packages of the extra are there."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"training needs {', '.join(missing)}: pip install 'dimkern[train]'", name=missing[0])
