"""Images to train on: digits that come with scikit-learn, Fashion-MNIST from IDX files, CIFAR, a folder.

Images are uint8 (n, C, H, W) from end to end; a batch becomes float on its device (`to_float`).
The held-out split never depends on the training seed.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from .config import TrainConfig
from .errors import SettingError

FASHION_ROOT = Path("/usr/share/datasets/fashion-mnist")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# Of each: the folder that its binary archive unpacks to, the files to train on, those held out, the bytes of a label.
CIFAR = {
    "cifar10": ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1),
    "cifar100": ("cifar-100-binary", ["train.bin"], ["test.bin"], 2),
}
HELD_OUT = 0.25
SPLIT_SEED = 20190222


@dataclass(frozen=True)
class Images:
    """A data set, split. Labels are None when nothing says what the images show."""

    name: str
    train: Tensor  # (n, C, H, W) uint8
    held_out: Tensor  # (n', C, H, W) uint8
    train_labels: Tensor | None  # (n,) int64
    held_out_labels: Tensor | None  # (n',) int64

    def fingerprint(self) -> str:
        """Changes whenever the images trained on do; a resumed run must see the same ones."""
        shape = "x".join(map(str, self.train.shape))
        return f"{self.name} {shape} {hashlib.sha256(self.train.numpy().tobytes()).hexdigest()[:16]}"

    def drawn(self, count: int) -> Images:
        """With at most `count` of the training images, a fixed draw."""
        rows = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(SPLIT_SEED))[:count]
        labels = None if self.train_labels is None else self.train_labels[rows]
        return dataclasses.replace(self, train=self.train[rows], train_labels=labels)


def augmented(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """(n, C, H, W) images, each shifted by up to an eighth of its side (its border repeats), or also mirrored."""
    if kind == "none":
        return images
    count, _, height, width = images.shape
    reach = max(1, max(height, width) // 8)
    down, right = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + down).clamp(0, height - 1)  # (n, H)
    columns = (torch.arange(width) + right).clamp(0, width - 1)  # (n, W)
    if kind == "crop-flip":
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    picked = images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (n, H, W, C)
    return picked.permute(0, 3, 1, 2).contiguous()


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """(n, C, H, W) uint8 -> float32 in [-1, 1] on `device`."""
    return images.to(device).float().div_(127.5).sub_(1.0)


def load_images(config: TrainConfig) -> Images:
    """The images that `config.data` names.

    Raises:
        SettingError: an unknown name, or files that are absent or unreadable (the message names them).
    """
    images = _named(config)
    return images.drawn(config.train_images) if config.train_images else images


def _named(config: TrainConfig) -> Images:
    if config.data == "digits":
        return load_digits()
    if config.data == "fashion-mnist":
        return load_fashion_mnist(Path(config.data_root) if config.data_root else FASHION_ROOT)
    if config.data in CIFAR:
        return load_cifar(config.data, Path(config.data_root or "data").expanduser())
    if config.data.startswith("folder:"):
        return load_folder(Path(config.data.removeprefix("folder:")).expanduser(), config.image_size, config.color)
    names = ", ".join(("digits", "fashion-mnist", *CIFAR))
    raise SettingError("data", f"got {config.data!r}, accepted are {names} and folder:PATH")


def load_digits() -> Images:
    """The 1797 handwritten 8x8 digits in scikit-learn's wheel."""
    from sklearn.datasets import load_digits as sklearn_digits

    pixels, labels = sklearn_digits(return_X_y=True)  # pixels 0..16
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    return split("digits", images, torch.from_numpy(labels).long())


def split(name: str, images: Tensor, labels: Tensor | None) -> Images:
    """Hold out a fixed quarter of `images` (n, C, H, W), of every class where there are labels."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(images), generator=generator)
    groups = [order] if labels is None else [order[labels[order] == c] for c in torch.unique(labels)]
    counts = [math.ceil(HELD_OUT * len(group)) for group in groups]
    train = torch.cat([group[count:] for group, count in zip(groups, counts, strict=True)]).sort().values
    held_out = torch.cat([group[:count] for group, count in zip(groups, counts, strict=True)])
    held_out = held_out[torch.randperm(len(held_out), generator=generator)]  # classes mixed: plots show the first few
    if labels is None:
        return Images(name, images[train], images[held_out], None, None)
    return Images(name, images[train], images[held_out], labels[train], labels[held_out])


def read_idx(path: Path) -> Tensor:
    """The uint8 tensor of an IDX file, plain or gzipped (by content, not by name).

    Raises:
        ValueError: not an IDX file of unsigned bytes, or shorter or longer than its header says.
    """
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError) as error:
            raise ValueError(f"{path}: broken gzip data ({error})") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes (starts with {data[:4].hex() or 'nothing'})")
    rank = data[3]
    if len(data) < 4 + 4 * rank:
        raise ValueError(f"{path}: ends in its header, which should give {rank} sizes")
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    body = data[4 + 4 * rank :]
    if len(body) != math.prod(shape):
        raise ValueError(f"{path}: the header says {shape}, {math.prod(shape)} bytes, but {len(body)} follow")
    return torch.from_numpy(np.frombuffer(body, np.uint8).copy()).view(shape)


def load_fashion_mnist(root: Path) -> Images:
    """Fashion-MNIST (or anything in the same four IDX files) under `root`; its own test set is the held-out one."""
    tensors = []
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        found = [path for path in (root / f"{stem}-ubyte{end}" for end in ("", ".gz")) if path.is_file()]
        if not found:
            raise SettingError(
                "data_root",
                f"no {stem}-ubyte or {stem}-ubyte.gz in {root}; on Debian, `apt install dataset-fashion-mnist` "
                f"puts them in {FASHION_ROOT}; elsewhere, give the folder that holds them",
            )
        try:
            tensors.append(read_idx(found[0]))
        except ValueError as error:
            raise SettingError("data_root", str(error)) from error
    train, train_labels, held_out, held_out_labels = tensors
    for images, labels in ((train, train_labels), (held_out, held_out_labels)):
        matching = images.dim() == 3 and images.shape[1:] == train.shape[1:] and labels.shape == images.shape[:1]
        if not matching:
            raise SettingError(
                "data_root", f"images {tuple(images.shape)} and labels {tuple(labels.shape)} in {root} do not match"
            )
    return Images("fashion-mnist", train[:, None], held_out[:, None], train_labels.long(), held_out_labels.long())


def load_cifar(name: str, root: Path) -> Images:
    """CIFAR-10 or CIFAR-100 from the published binary files, in `root` or where their archive unpacks to below it.

    Where they are absent, torchvision reads its own copy below `root`, if both are there.
    """
    folder, train, held_out, label_bytes = CIFAR[name]
    found = [place for place in (root, root / folder) if (place / train[0]).is_file()]
    if not found:
        return _torchvision_cifar(name, root)
    parts = []
    for files in (train, held_out):
        read = [read_cifar(found[0] / file, label_bytes) for file in files]
        parts.append([torch.cat(kind) for kind in zip(*read, strict=True)])
    return Images(name, parts[0][0], parts[1][0], parts[0][1], parts[1][1])


def read_cifar(path: Path, label_bytes: int) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) and labels (n,) of records of `label_bytes` (the last one counts) and 3072 pixels."""
    record = label_bytes + 3 * 32 * 32
    if not path.is_file():
        raise SettingError("data_root", f"no {path.name} in {path.parent}, where the other files of the set are")
    data = np.fromfile(path, np.uint8)
    if len(data) == 0 or len(data) % record:
        raise SettingError("data_root", f"{path} has {len(data)} bytes, which is no number of records of {record}")
    records = torch.from_numpy(data).view(-1, record)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1].long()


def _torchvision_cifar(name: str, root: Path) -> Images:
    folder, (first, *_), *_ = CIFAR[name]
    where = f"no {first} in {root} or {root / folder}"
    how = f"unpack the binary version from www.cs.toronto.edu/~kriz/cifar.html there, or give its folder for {name}"
    try:
        from torchvision import datasets

        sets = [getattr(datasets, name.upper())(str(root), train=train) for train in (True, False)]
    except (ImportError, RuntimeError) as error:  # not installed, or no copy of its own
        raise SettingError("data_root", f"{where}; {how} (torchvision: {str(error).splitlines()[0]})") from error
    train, held_out = (torch.from_numpy(one.data).permute(0, 3, 1, 2).contiguous() for one in sets)
    return Images(name, train, held_out, *(torch.tensor(one.targets) for one in sets))


def load_folder(root: Path, size: int, color: str) -> Images:
    """The images under `root`, cropped to a square and resized.

    The subfolders of `root` are the classes, unless there is only one or images lie in `root` itself.
    """
    from PIL import Image

    if not root.is_dir():
        raise SettingError("data", f"{root} is not a folder; accepted is folder:PATH with images in or below PATH")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if len(paths) < 8:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise SettingError("data", f"{len(paths)} images in {root} (looked for {kinds}); at least 8 are needed")

    images = np.empty((len(paths), size, size, 3 if color == "rgb" else 1), np.uint8)
    read = tqdm(paths, desc=f"reading {root.name}", unit=" images", leave=False, disable=not sys.stderr.isatty())
    for row, path in zip(images, read, strict=True):
        try:
            row[:] = read_image(path, size, color).reshape(row.shape)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise SettingError("data", f"cannot read {path} as an image: {error}") from error

    tops = [path.relative_to(root).parts[0] for path in paths]
    classes = sorted(set(tops))
    labelled = all(path.parent != root for path in paths) and len(classes) > 1
    labels = torch.tensor([classes.index(top) for top in tops]) if labelled else None
    for name in classes if labelled else ():
        if tops.count(name) < 2:
            raise SettingError(
                "data", f"class {name} of {root} has one image; a class needs at least two, one to hold out"
            )
    return split(root.resolve().name, torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels)


def read_image(path: Path, size: int, color: str) -> NDArray[np.uint8]:
    """The middle square of an image, (size, size) or (size, size, 3); of 16 bits the upper 8.

    Raises:
        OSError, ValueError, DecompressionBombError: unreadable, or of numbers that say nothing of their range.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        if image.mode in ("I", "F"):
            raise ValueError(f"its pixels have mode {image.mode}; accepted are 8 and 16 bits a channel")
        if image.mode.startswith("I;16"):  # Pillow would clip to 255, which makes nearly all of it white
            upright = Image.fromarray((np.asarray(ImageOps.exif_transpose(image)) >> 8).astype(np.uint8))
        else:
            upright = ImageOps.exif_transpose(image)
        return np.asarray(ImageOps.fit(upright.convert("RGB" if color == "rgb" else "L"), (size, size)))
