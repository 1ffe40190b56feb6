"""The readers give back what was written, the split is fixed, and broken files are named."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dimkern.train import SettingError, TrainConfig
from dimkern.train.data import augmented, load_digits, load_fashion_mnist, load_folder, load_images, read_idx, split


def write_idx(path: Path, array: np.ndarray, *, zipped: bool = False) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data) if zipped else data)


def write_images(root: Path, names: list[str], size: tuple[int, int] = (20, 14)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    pixels = {name: rng.integers(0, 256, (*size, 3), np.uint8) for name in names}
    for name, array in pixels.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / name)
    return pixels


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("shape", [(7,), (3, 5, 4)])
def test_idx_gives_back_what_was_written(tmp_path, shape, zipped):
    array = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    write_idx(tmp_path / "file", array, zipped=zipped)
    assert torch.equal(read_idx(tmp_path / "file"), torch.from_numpy(array))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "nothing"),
        (b"\x89PNG\r\n", "89504e47"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 9]) + b"four", "9 bytes, but 4"),
        (bytes([0, 0, 8, 2, 0, 0]), "header"),
        (gzip.compress(b"x" * 99, mtime=0)[:20], "gzip"),
    ],
)
def test_broken_idx_is_named(tmp_path, data, says):
    (tmp_path / "broken").write_bytes(data)
    with pytest.raises(ValueError, match=f"broken.*{says}"):
        read_idx(tmp_path / "broken")


def test_fashion_mnist_reads_a_mixture_of_plain_and_gzipped_files(tmp_path):
    rng = np.random.default_rng(2)
    train, held_out = rng.integers(0, 256, (12, 28, 28), np.uint8), rng.integers(0, 256, (5, 28, 28), np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte", train)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(12, dtype=np.uint8), zipped=True)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", held_out, zipped=True)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(5, dtype=np.uint8))
    images = load_fashion_mnist(tmp_path)
    assert np.array_equal(images.train[:, 0].numpy(), train)
    assert np.array_equal(images.held_out[:, 0].numpy(), held_out)
    assert images.train_labels is not None
    assert images.train_labels.tolist() == list(range(12))

    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(4, dtype=np.uint8))
    with pytest.raises(SettingError, match=r"data_root.*do not match"):
        load_fashion_mnist(tmp_path)


def test_absent_fashion_mnist_says_where_it_looked_and_how_to_get_it(tmp_path):
    with pytest.raises(SettingError, match=f"{tmp_path}.*apt install dataset-fashion-mnist"):
        load_images(TrainConfig(data="fashion-mnist", data_root=str(tmp_path)))


def test_folder_of_classes_gives_labels_that_follow_their_images(tmp_path):
    for value, name in ((30, "dark"), (220, "light")):
        (tmp_path / name).mkdir()
        for i in range(8):
            Image.new("RGB", (10 + i, 17), (value, value, value)).save(tmp_path / name / f"{i}.png")
    images = load_folder(tmp_path, 16, "gray")
    assert images.train.shape[1:] == (1, 16, 16)
    assert (len(images.train), len(images.held_out)) == (12, 4)
    for pixels, labels in ((images.train, images.train_labels), (images.held_out, images.held_out_labels)):
        assert labels is not None
        assert torch.equal(labels, (pixels[:, 0, 0, 0] > 128).long())
        assert labels.float().mean() == 0.5  # stratified


def test_folder_without_classes_has_no_labels_and_keeps_every_pixel(tmp_path):
    pixels = write_images(tmp_path, [f"{i}.png" for i in range(9)], (16, 16))
    images = load_folder(tmp_path, 16, "rgb")
    assert images.train_labels is None
    seen = {image.permute(1, 2, 0).numpy().tobytes() for image in torch.cat([images.train, images.held_out])}
    assert seen == {array.tobytes() for array in pixels.values()}


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    deep = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)
    for i in range(8):
        Image.fromarray(deep).save(tmp_path / f"{i}.{'png' if i % 2 else 'tif'}")
    images = load_folder(tmp_path, 8, "gray")
    for image in torch.cat([images.train, images.held_out]):
        assert np.array_equal(image[0].numpy(), deep >> 8)
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "4.tif")
    with pytest.raises(SettingError, match=r"cannot read .*4\.tif.* mode F"):
        load_folder(tmp_path, 8, "gray")


def test_unusable_folders_are_named(tmp_path, monkeypatch):
    with pytest.raises(SettingError, match="absent is not a folder"):
        load_folder(tmp_path / "absent", 16, "rgb")
    with pytest.raises(SettingError, match="0 images"):
        load_folder(tmp_path, 16, "rgb")
    write_images(tmp_path, [f"a/{i}.png" for i in range(9)] + ["b/only.png"])
    with pytest.raises(SettingError, match=r"class b .*at least two"):
        load_folder(tmp_path, 16, "rgb")
    (tmp_path / "a" / "3.png").write_bytes(b"not an image")
    with pytest.raises(SettingError, match=r"cannot read .*3\.png"):
        load_folder(tmp_path, 16, "rgb")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # beyond twice that Pillow refuses
    with pytest.raises(SettingError, match=r"cannot read .*0\.png.*pixels"):
        load_folder(tmp_path, 16, "rgb")


def test_split_is_a_fixed_stratified_partition():
    labels = torch.arange(90) % 3
    images = torch.arange(90, dtype=torch.uint8).view(90, 1, 1, 1)
    torch.manual_seed(0)
    first = split("x", images, labels)
    torch.manual_seed(1)
    again = split("x", images, labels)
    assert torch.equal(first.train, again.train)
    assert torch.equal(first.held_out, again.held_out)
    assert sorted(torch.cat([first.train, first.held_out]).flatten().tolist()) == list(range(90))
    assert torch.bincount(first.held_out_labels).tolist() == [8, 8, 8]
    assert torch.equal(first.held_out.flatten().long() % 3, first.held_out_labels)
    assert len(set(first.held_out_labels[:6].tolist())) > 1  # the score maps show the first few: not of one class


def test_fingerprint_sees_one_pixel():
    images = load_digits()
    before = images.fingerprint()
    images.train[5, 0, 3, 3] ^= 1
    assert images.fingerprint() != before


def write_cifar(root: Path, files: dict[str, int], label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of random bytes, 7 (or as many as `files` says) in each file; the pixels and labels written."""
    rng = np.random.default_rng(3)
    root.mkdir(parents=True)
    written = {name: rng.integers(0, 256, (count, label_bytes + 3072), np.uint8) for name, count in files.items()}
    for name, records in written.items():
        (root / name).write_bytes(records.tobytes())
    records = np.concatenate(list(written.values()))
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar_gives_back_what_was_written(tmp_path, name, inside):
    folder = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}[name]
    place = tmp_path / "below" / folder if inside else tmp_path / "elsewhere"
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if name == "cifar10" else ["train.bin"]
    held_out = "test_batch.bin" if name == "cifar10" else "test.bin"
    pixels, labels = write_cifar(place, dict.fromkeys(train, 7) | {held_out: 4}, 1 if name == "cifar10" else 2)
    images = load_images(TrainConfig(data=name, data_root=str(tmp_path / "below" if inside else place)))
    assert np.array_equal(images.train.numpy(), pixels[:-4])
    assert np.array_equal(images.held_out.numpy(), pixels[-4:])
    assert images.train_labels.tolist() == labels[:-4].tolist()
    assert images.held_out_labels.tolist() == labels[-4:].tolist()

    (place / held_out).write_bytes(b"short")
    with pytest.raises(SettingError, match=rf"data_root: .*{held_out} has 5 bytes, which is no number of records"):
        load_images(TrainConfig(data=name, data_root=str(place)))
    (place / held_out).unlink()
    with pytest.raises(SettingError, match=rf"data_root: no {held_out} in"):
        load_images(TrainConfig(data=name, data_root=str(place)))


def test_absent_cifar_says_where_it_looked_and_how_to_get_it(tmp_path):
    with pytest.raises(SettingError, match=rf"no data_batch_1.bin in {tmp_path} or .*cifar-10-batches-bin; unpack"):
        load_images(TrainConfig(data="cifar10", data_root=str(tmp_path)))


def test_torchvisions_copy_serves_where_the_binary_files_are_absent(tmp_path, monkeypatch):
    rng = np.random.default_rng(4)

    class CIFAR10:
        def __init__(self, root: str, train: bool) -> None:
            assert root == str(tmp_path)
            self.data = rng.integers(0, 256, (9 if train else 5, 32, 32, 3), np.uint8)
            self.targets = list(range(len(self.data)))
            made.append(self)

    made: list[CIFAR10] = []
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=SimpleNamespace(CIFAR10=CIFAR10)))
    images = load_images(TrainConfig(data="cifar10", data_root=str(tmp_path)))
    assert np.array_equal(images.train.permute(0, 2, 3, 1).numpy(), made[0].data)
    assert images.held_out_labels.tolist() == [0, 1, 2, 3, 4]


def test_a_part_of_the_training_images_is_a_fixed_draw_with_its_labels():
    whole, part = load_digits(), load_images(TrainConfig(train_images=50))
    assert (len(part.train), len(part.held_out)) == (50, len(whole.held_out))
    assert torch.equal(part.train, load_images(TrainConfig(train_images=50, seed=9)).train)
    labels = {image.numpy().tobytes(): label for image, label in zip(whole.train, whole.train_labels, strict=True)}
    assert all(labels[i.numpy().tobytes()] == y for i, y in zip(part.train, part.train_labels, strict=True))
    assert len(torch.unique(part.train_labels)) > 5
    assert len(load_images(TrainConfig(train_images=5000)).train) == len(whole.train)


@pytest.mark.parametrize("kind", ["crop", "crop-flip"])
def test_augmentation_shifts_every_image_by_itself_and_repeats_its_border(kind):
    images = torch.arange(16 * 16, dtype=torch.uint8).view(1, 1, 16, 16).repeat(200, 2, 1, 1)
    out = augmented(images, kind, torch.Generator().manual_seed(0))
    assert (out.shape, out.dtype) == (images.shape, images.dtype)
    possible = {}
    for down in range(-2, 3):
        for right in range(-2, 3):
            rows, columns = ((torch.arange(16) + shift).clamp(0, 15) for shift in (down, right))
            moved = images[0][:, rows][:, :, columns]
            for mirrored in (moved, moved.flip(2)) if kind == "crop-flip" else (moved,):
                possible[mirrored.numpy().tobytes()] = len(possible)
    seen = {possible[image.contiguous().numpy().tobytes()] for image in out}
    assert len(seen) > 0.8 * len(possible)
    assert augmented(images, "none", torch.Generator()) is images
