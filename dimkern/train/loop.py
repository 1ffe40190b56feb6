"""The training loop: batches, steps, checkpoints, and going on from one bit for bit.

All randomness after the initial weights comes from two generators whose states are in the checkpoint: `order` draws the
batches and their augmentation, `Steps.noise` the prior.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import dimkern

from . import checkpoint
from .config import TrainConfig, refuse_changes
from .data import Images, augmented, to_float
from .encoder import DeepInfoMax, Encoder
from .errors import SettingError, TrainingStopped
from .objective import terms
from .processes import Processes
from .steps import Steps


@dataclass
class Run:
    """A finished (or resumed) run: what the probes and the report need."""

    config: TrainConfig
    images: Images
    untrained: Encoder
    model: DeepInfoMax
    history: dict[str, list[float]]  # "seconds": one number an epoch; "loss", "mi" and the others: one a step
    device: torch.device
    threads: int  # of PyTorch, while it trained
    checkpoint: Path


def train(
    config: TrainConfig,
    images: Images,
    resume: Path | None = None,
    *,
    overwrite: bool = False,
    processes: Processes | None = None,
) -> Run:
    """Train as `config` says, writing a checkpoint to `config.out` after every epoch, and where a run resumed moves.

    Args:
        resume: a checkpoint, or the directory of a run, to go on from. On a CPU the result is, to the last bit, that
            of a run never interrupted (same build and --threads); CUDA may add in another order from run to run.
        overwrite: `config.out` may hold another run, which is replaced.
        processes: those that share every batch (of `config.batch_size` images); the first one writes.

    Raises:
        SettingError: settings that fit neither the data nor the device, or not the run resumed.
        TrainingStopped: the loss or the weights became NaN or infinite.
    """
    if config.batch_size > len(images.train):
        raise SettingError("batch_size", f"got {config.batch_size}, there are {len(images.train)} training images")
    device, several = pick_device(config), processes or Processes()
    refuse_sharing(config, several.world)
    with cpu_threads(config, images):
        return _train(config, images, device, resume, overwrite, several)


def _train(
    config: TrainConfig,
    images: Images,
    device: torch.device,
    resume: Path | None,
    overwrite: bool,
    processes: Processes,
) -> Run:
    torch.manual_seed(config.seed)
    model = make_model(config, images).to(device)
    untrained = copy.deepcopy(model.encoder)
    steps = Steps(model, config, device, processes)
    order = torch.Generator().manual_seed(config.seed)
    history: dict[str, list[float]] = {"loss": [], "mi": [], "seconds": []}
    fingerprint = images.fingerprint()

    last_good = None
    if resume is not None:
        last_good, saved = checkpoint.load(resume)
        refuse_changes(saved["config"], config)
        if saved["images"] != fingerprint:
            raise SettingError("data", f"the checkpoint was trained on {saved['images']}, these are {fingerprint}")
        steps.load_state_dict(saved["steps"])
        order.set_state(saved["order"])
        history = saved["history"]

    def save() -> None:
        state = {"config": dataclasses.asdict(config), "images": fingerprint, "versions": versions()}
        checkpoint.save(path, {**state, "steps": steps.state_dict(), "order": order.get_state(), "history": history})

    path = Path(config.out) / checkpoint.NAME
    processes.once(lambda: checkpoint.place(Path(config.out), last_good, overwrite))
    if last_good is not None and last_good != path:
        processes.once(save)
        last_good = path  # there may be no further epoch to do it, or none that ends well
    for epoch in range(len(history["seconds"]), config.epochs):
        started = time.perf_counter()
        batches = torch.split(torch.randperm(len(images.train), generator=order), config.batch_size)
        full = [batch for batch in batches if len(batch) == config.batch_size]  # the MI estimate depends on its size
        for batch in progress(full, epoch, config.epochs, history) if processes.first else full:
            drawn = augmented(images.train[batch], config.augment, order)
            said = steps.step(to_float(processes.share(drawn), device))
            if not math.isfinite(said["loss"]):
                what = f"the loss is {said['loss']}"
                raise TrainingStopped(stopped(what, epoch, len(history["loss"]), last_good, config))
            for name, value in said.items():
                history.setdefault(name, []).append(value)
        if not steps.finite():
            raise TrainingStopped(stopped("a weight is not finite", epoch, len(history["loss"]), last_good, config))
        history["seconds"].append(time.perf_counter() - started)
        processes.once(save)
        last_good = path
    if processes.group is not None:  # a model of one process again
        trained, model = model, make_model(config, images).to(device)
        model.load_state_dict(trained.state_dict())
    return Run(config, images, untrained, model, history, device, torch.get_num_threads(), last_good or path)


def refuse_sharing(config: TrainConfig, world: int) -> None:
    """Raise SettingError unless `world` processes can share the batches of a run."""
    if world == 1:
        return
    whole = "needs the whole batch in one process; here are"
    for name, alone in (("negatives", "all"), ("pool", 0)):
        if getattr(config, name) != alone:
            raise SettingError(name, f"got {getattr(config, name)}, which {whole} {world}; accepted is {alone}")
    part = config.chunk or config.norm_batch
    if config.batch_size < world or (part and config.batch_size % (part * world)):
        parts = f"{world} shares" + (f" of whole chunks or batch-norm groups of {part}" if part else "")
        raise SettingError("batch_size", f"{config.batch_size} images in all are no {parts}")


def make_model(config: TrainConfig, images: Images) -> DeepInfoMax:
    """The model of a run, its weights drawn from torch's own generator."""
    encoder = Encoder(images.train.shape[1], max(images.train.shape[2:]), config.width, config.fc)
    return DeepInfoMax(
        encoder,
        terms(config),
        config.units,
        multi_global=config.summaries == "map",
        heads=config.critic == "dot",
        norm_batch=config.norm_batch or config.chunk,
    )


@contextmanager
def cpu_threads(config: TrainConfig, images: Images) -> Iterator[None]:
    """The CPU threads of a run, for as long as the context lasts: their number is the whole process's."""
    before = torch.get_num_threads()
    # The products of 8x8 images are too small to share: two threads on two busy cores were 20 times slower than one.
    if config.threads or images.train.shape[-1] < 16:
        torch.set_num_threads(config.threads or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(config: TrainConfig) -> torch.device:
    """Where to train; raises SettingError where this machine cannot do what --device and --amp ask for."""
    found = torch.cuda.is_available()
    if config.device == "cuda" and not found:
        raise SettingError("device", "got cuda, but PyTorch finds none here; accepted are auto and cpu")
    device = torch.device("cuda" if config.device != "cpu" and found else "cpu")
    if config.amp == "float16" and device.type != "cuda":
        raise SettingError("amp", "float16 needs CUDA; accepted on a CPU are off and bfloat16")
    return device


def progress(batches: list[Tensor], epoch: int, epochs: int, history: dict[str, list[float]]) -> Iterator[Tensor]:
    """The batches, under a bar with loss and MI where there is a terminal, and one line at the end of the epoch."""
    with tqdm(batches, desc=f"epoch {epoch + 1}/{epochs}", leave=False, disable=not sys.stderr.isatty()) as bar:
        for batch in bar:
            yield batch
            bar.set_postfix_str(describe(history["loss"][-1], history["mi"][-1]), refresh=False)
    if epoch + 1 == epochs or epoch % max(1, epochs // 10) == 0:
        loss, mi = (sum(history[key][-len(batches) :]) / len(batches) for key in ("loss", "mi"))
        tqdm.write(f"epoch {epoch + 1:3d}/{epochs}  {describe(loss, mi)}", file=sys.stderr)


def describe(loss: float, mi: float) -> str:
    return f"loss {loss:8.4f}" + ("" if math.isnan(mi) else f"  MI {mi:7.4f} nats")


def stopped(what: str, epoch: int, step: int, last_good: Path | None, config: TrainConfig) -> str:
    hints = [f"a smaller --lr than {config.lr:g}"]
    if config.estimator not in ("infonce", "jsd"):
        hints.append(f"--estimator infonce or jsd (the loss of {config.estimator} can grow without bound)")
    if config.amp == "float16":
        hints.append("--amp bfloat16")
    kept = f"the last good checkpoint is {last_good}" if last_good else "no checkpoint was written yet"
    return f"{what} in epoch {epoch + 1}, step {step + 1}; {kept}. Start again with {', or '.join(hints)}."


def versions() -> dict[str, str]:
    return {"dimkern": dimkern.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
