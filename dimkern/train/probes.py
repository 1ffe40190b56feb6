"""What can be read off features by simple classifiers: linear and k-NN probes, with all labels and with few.

Protocol, the same for raw pixels, the untrained and the trained encoder:
- Features are taken in evaluation mode from a copy of the encoder whose batch-norm statistics were computed anew, as
  plain averages over the training images. An untrained encoder has no statistics yet, a trained one has those of the
  last few batches: counting both afresh on the same images is what makes them comparable.
- Features are standardised with the mean and deviation of the training images (of all of them, also when few have
  labels: that uses no label). Nothing is ever fitted on held-out images; every accuracy is on all of them.
- linear: multinomial logistic regression, L2 with C = 0.1, not tuned per feature. k-NN: 5 neighbours, Euclidean.
- few labels: 10 labelled images per class (fewer where a class has fewer), the mean over 5 fixed draws.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn

from .data import Images, to_float
from .encoder import Encoder

Model = TypeVar("Model", bound=nn.Module)
PROBES = ("linear", "knn", "linear_few", "knn_few")
FEW, DRAWS = 10, 5
CHUNK = 512  # images encoded at a time


def calibrated(model: Model, images: Tensor) -> Model:
    """A copy of `model` in evaluation mode, with batch-norm statistics averaged over `images` (n, C, H, W) uint8."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain average over the chunks
    model.train()
    device = next(model.parameters()).device
    chunks = max(1, round(len(images) / CHUNK))  # equal chunks: a small last one would weigh as much as the rest
    with torch.no_grad():
        for chunk in images.tensor_split(chunks):
            model(to_float(chunk, device))
    return model.eval()


def features(encoder: Encoder, images: Tensor) -> dict[str, NDArray[np.float32]]:
    """The three features probed, (n, d) each: Y (the summary), fc and conv (the last map, flattened)."""
    device = next(encoder.parameters()).device
    with torch.no_grad():
        seen = [encoder(to_float(chunk, device)) for chunk in torch.split(images, CHUNK)]
    names = {"Y": "summary", "fc": "fc", "conv": "conv"}
    return {key: torch.cat([getattr(f, name).flatten(1).cpu() for f in seen]).numpy() for key, name in names.items()}


def probe(
    train: NDArray[np.float32], labels: NDArray[np.int64], test: NDArray[np.float32], test_labels: NDArray[np.int64]
) -> dict[str, float]:
    """Held-out accuracy of every probe in PROBES; features (n, d), labels (n,)."""
    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)

    def accuracies(rows: NDArray[np.int64]) -> tuple[float, float]:
        linear = LogisticRegression(C=0.1, max_iter=300)
        knn = KNeighborsClassifier(min(5, len(rows)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 300 steps are part of the protocol
            linear.fit(train[rows], labels[rows])
        knn.fit(train[rows], labels[rows])
        return float(linear.score(test, test_labels)), float(knn.score(test, test_labels))

    # Small products gain nothing from threads, and on two busy cores were a hundred times slower with them.
    with threadpool_limits(1 if train.size < 2**21 else None):
        every = accuracies(np.arange(len(labels)))
        few = np.mean([accuracies(few_of_each(labels, draw)) for draw in range(DRAWS)], axis=0)
    return dict(zip(PROBES, (*every, *map(float, few)), strict=True))


def few_of_each(labels: NDArray[np.int64], draw: int) -> NDArray[np.int64]:
    """Indices of FEW images of every class, the same ones for every feature of a draw."""
    rng = np.random.default_rng(draw)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:FEW] for c in np.unique(labels)])


def probe_all(images: Images, untrained: Encoder, trained: Encoder, limit: int) -> dict[str, Any] | None:
    """Probe accuracies {"raw": {...}, "untrained": {"Y": {...}, ...}, "trained": ...}, or None without labels.

    At most `limit` training images have their labels used.
    """
    if images.train_labels is None or images.held_out_labels is None:
        return None
    generator = torch.Generator().manual_seed(0)
    used = torch.randperm(len(images.train), generator=generator)[:limit]
    labels, test_labels = images.train_labels[used].numpy(), images.held_out_labels.numpy()
    raw, raw_test = (pixels.flatten(1).numpy().astype(np.float32) for pixels in (images.train[used], images.held_out))
    table: dict[str, Any] = {"raw": probe(raw, labels, raw_test, test_labels)}
    for name, encoder in (("untrained", untrained), ("trained", trained)):
        ready = calibrated(encoder, images.train)
        train, test = features(ready, images.train[used]), features(ready, images.held_out)
        table[name] = {key: probe(train[key], labels, test[key], test_labels) for key in train}
    return table
