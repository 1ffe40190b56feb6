"""Every setting of a training run: one field each, with its default, its help and what it accepts.

The command line is built from these fields, a checkpoint stores them, a resumed run is compared with them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from .errors import SettingError

ESTIMATORS = ("infonce", "jsd", "dv", "gan", "kl", "rkl", "h2", "x2", "w1")

# (alpha, beta, gamma) of DIM(G) and DIM(L) are the paper's; those of both together the defaults of DeepInfomaxPytorch.
PRESETS: dict[str, dict[str, Any]] = {
    "dim-g": {"objective": "global", "alpha": 1.0, "gamma": 1.0},
    "dim-l": {"objective": "local", "beta": 1.0, "gamma": 0.1},
    "dim-lg": {"objective": "both", "alpha": 0.5, "beta": 1.0, "gamma": 0.1},
}


def setting(
    default: Any,
    group: str,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: int | None = None,
    metavar: str | None = None,
    may_change: bool = False,
) -> Any:
    """A field of TrainConfig. `may_change`: a resumed run may have another value."""
    row = {"group": group, "help": help, "choices": choices, "least": least, "most": most}
    return dataclasses.field(default=default, metadata={**row, "metavar": metavar, "may_change": may_change})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one run, checked when made."""

    data: str = setting(
        "digits",
        "data",
        "digits, fashion-mnist, cifar10, cifar100, or folder:PATH for your own images",
        metavar="NAME",
        may_change=True,
    )
    data_root: str = setting(
        "",
        "data",
        "folder of the Fashion-MNIST IDX files (default: where Debian puts them), or of the CIFAR ones (data)",
        metavar="DIR",
        may_change=True,
    )
    image_size: int = setting(32, "data", "side to which images of a folder are cropped and resized", least=8)
    color: str = setting("rgb", "data", "how images of a folder are read", choices=("rgb", "gray"))
    train_images: int = setting(0, "data", "train on at most so many of the images, a fixed draw; 0 takes all", least=0)
    augment: str = setting(
        "none",
        "data",
        "crop: shift every image by up to an eighth of its side; crop-flip: and mirror half of them",
        choices=("none", "crop", "crop-flip"),
    )

    objective: str = setting(
        "local",
        "objective",
        "local: summary against every location, DIM(L); global: summary against the whole map, DIM(G); or both",
        choices=("local", "global", "both"),
    )
    alpha: float = setting(1.0, "objective", "weight of the global term, where the objective has it", least=0)
    beta: float = setting(1.0, "objective", "weight of the local term, where the objective has it", least=0)
    gamma: float = setting(0.0, "objective", "weight of prior matching; 0 leaves it out", least=0)
    estimator: str = setting("infonce", "objective", "estimator of mutual information", choices=ESTIMATORS)

    scale: float = setting(
        0.0,
        "objective",
        "factor of every score; 0 takes 1, or 1/sqrt(K) for kl, rkl and h2, whose losses are exponential in it",
        least=0,
    )
    critic: str = setting(
        "dot",
        "objective",
        "dot: product of the heads' outputs; concat: a network on the features side by side, without heads",
        choices=("dot", "concat"),
    )
    negatives: str = setting(
        "all",
        "objective",
        "all: every other image of the batch; permute or roll: one other image for each, a random or the next one",
        choices=("all", "permute", "roll"),
    )
    summaries: str = setting(
        "vector",
        "objective",
        "map: every location of the last map is a summary vector too, beside Y (multi-global, P > 1)",
        choices=("vector", "map"),
    )
    pool: int = setting(
        0, "objective", "images that share negatives, a part of the batch; 0 is the whole batch", least=0
    )

    prior: str = setting(
        "uniform", "prior", "of sigmoid(Y): uniform on [0, 1]; of Y: gaussian", choices=("uniform", "gaussian")
    )
    penalty: float = setting(1.0, "prior", "weight of the discriminator's gradient penalty", least=0)
    prior_updates: str = setting(
        "alternating",
        "prior",
        "alternating: the encoder meets the discriminator after its step; one-step: both step at once",
        choices=("alternating", "one-step"),
    )

    width: int = setting(
        32, "model", "channels of the first convolution, doubled by each further one (paper: 64)", least=1
    )
    fc: int = setting(256, "model", "units of the fully connected layer (paper: 1024)", least=1)
    units: int = setting(
        256,
        "model",
        "K, channels of the space in which pairs are scored, or hidden units of --critic concat (paper: 2048, 512)",
        least=1,
    )

    epochs: int = setting(20, "training", "passes over the training images", least=1, may_change=True)
    batch_size: int = setting(
        64,
        "training",
        "images in a batch, of each process where torchrun starts several; a batch's other images are the negatives",
        least=2,
    )
    chunk: int = setting(
        0,
        "training",
        "images encoded at a time, which bounds the memory of large batches (two passes over the encoder, one over the "
        "loss of the whole batch); 0 encodes the batch at once",
        least=0,
    )
    norm_batch: int = setting(
        0,
        "training",
        "images whose batch-norm statistics are counted together; the gradients do not depend on --chunk but on this; "
        "0 takes the chunk, or the whole batch where there is none",
        least=0,
    )
    lr: float = setting(3e-4, "training", "learning rate of Adam (paper: 1e-4)")
    seed: int = setting(
        0,
        "training",
        "seed of the initial weights and the batch order (never of the split)",
        least=0,
        most=2**63 - 1,  # what a torch.Generator takes
    )
    device: str = setting(
        "auto",
        "training",
        "where to train; auto takes CUDA if there is one",
        choices=("auto", "cpu", "cuda"),
        may_change=True,
    )
    threads: int = setting(
        0,
        "training",
        "CPU threads; 0 takes one for images below 16x16, PyTorch's own number above",
        least=0,
        most=1024,
        may_change=True,
    )
    amp: str = setting(
        "off",
        "training",
        "automatic mixed precision; float16 scales its gradients and needs CUDA",
        choices=("off", "bfloat16", "float16"),
    )

    probe_images: int = setting(
        5000, "output", "labelled training images that the probes may use", least=100, may_change=True
    )
    out: str = setting(
        "runs/dim", "output", "directory of the checkpoint, report and plots", metavar="DIR", may_change=True
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, accepts = getattr(self, field.name), field.metadata
            if accepts["choices"] and value not in accepts["choices"]:
                raise SettingError(field.name, f"got {value!r}, accepted are {', '.join(accepts['choices'])}")
            if accepts["least"] is not None and not value >= accepts["least"]:  # NaN is refused too
                raise SettingError(field.name, f"got {value}, must be at least {accepts['least']}")
            if accepts["most"] is not None and value > accepts["most"]:
                raise SettingError(field.name, f"got {value}, must be at most {accepts['most']}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise SettingError("lr", f"got {self.lr}, must be a positive number")
        for name in ("scale", "alpha", "beta", "gamma", "penalty"):
            if not math.isfinite(getattr(self, name)):
                raise SettingError(name, f"got {getattr(self, name)}, must be finite")
        if self.gamma == 0 and self.alpha * (self.objective != "local") + self.beta * (self.objective != "global") == 0:
            raise SettingError("objective", f"got {self.objective!r} at a weight of 0 and no prior: nothing to train")
        if self.critic == "concat" and self.summaries == "map":
            raise SettingError("summaries", "got map, which needs heads; --critic concat has none and accepts vector")
        group = self.norm_batch or self.chunk
        for name, part, whole in (
            ("pool", self.pool, self.batch_size),
            ("chunk", self.chunk, self.batch_size),
            ("norm_batch", group, self.chunk or self.batch_size),
        ):
            if part and (part == 1 or whole % part):
                raise SettingError(name, f"got {part}, must be 0 or at least 2, and divide {whole} (images)")


def refuse_changes(saved: dict[str, Any], now: TrainConfig) -> None:
    """Raise SettingError unless a run with the settings `saved` may go on with the settings `now`."""
    for field in dataclasses.fields(TrainConfig):
        was, value = saved.get(field.name, field.default), getattr(now, field.name)
        if was != value and not field.metadata["may_change"]:
            raise SettingError(field.name, f"the checkpoint was trained with {was!r}, this run asks for {value!r}")
    if now.epochs < saved["epochs"]:
        raise SettingError("epochs", f"the checkpoint's run has {saved['epochs']}, a resumed run may only have more")
