"""Checkpoints: plain tensors and numbers, written whole or not at all, readable with weights_only=True."""

from __future__ import annotations

import dataclasses
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from .config import TrainConfig
from .errors import SettingError

NAME = "checkpoint.pt"
FORMAT = 2
PARTS = ("config", "images", "steps", "order", "history")  # what a run needs to go on


def place(out: Path, source: Path | None, overwrite: bool) -> Path:
    """Where the checkpoint of a run in `out` goes; makes the directory, so that a bad one is found before training.

    Another run's checkpoint (not `source`, the one resumed) is in the way, and removed only if `overwrite` says so.
    """
    writable(out)
    path = out / NAME
    if path.exists() and (source is None or not path.samefile(source)):
        if not overwrite:
            raise SettingError("out", f"{out} holds a run; --resume {out} goes on with it, --overwrite replaces it")
        path.unlink()
    return path


def writable(out: Path) -> None:
    """Make the directory `out`; raises SettingError where it cannot be made or written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError("out", f"cannot make {out}: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise SettingError("out", f"cannot write to {out}")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` beside `path`, then rename: an interrupted write leaves the previous checkpoint in place."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file and what `save` wrote to it; `path` is the file or its run directory.

    Raises:
        SettingError: nothing there, or not a whole checkpoint of this harness.
    """
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise SettingError("resume", f"no checkpoint at {file}; accepted is a run directory or its {NAME}")
    try:
        if not zipfile.is_zipfile(file):
            raise pickle.UnpicklingError("not a file that torch.save has written")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise SettingError("resume", f"cannot read {file}: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise SettingError("resume", f"{file} is not a checkpoint of `dimkern train` (format {FORMAT})")
    missing = [name for name in PARTS if name not in state]
    if missing:
        raise SettingError("resume", f"{file} is not a whole checkpoint: it lacks {', '.join(missing)}")
    if not isinstance(state["config"], dict) or "epochs" not in state["config"]:
        raise SettingError("resume", f"{file} is not a whole checkpoint: its config lacks epochs")
    unknown = state["config"].keys() - {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown:
        names = ", ".join(sorted(map(str, unknown)))
        raise SettingError("resume", f"{file} has settings that this version of dimkern does not know: {names}")
    return file, state


def settings(path: Path, given: dict[str, Any]) -> TrainConfig:
    """The settings of the run at `path`, except where `given` has others; its directory is where it is now."""
    file, state = load(path)
    return TrainConfig(**{**state["config"], "out": str(file.parent), **given})
