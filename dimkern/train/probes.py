"""What can be read off features by simple classifiers: linear, MLP and k-NN probes, with all labels and with few.

Protocol, the same for raw pixels, the untrained and the trained encoder:
- Features are taken in evaluation mode from a copy of the encoder whose batch-norm statistics were computed anew, as
  plain averages over the training images. An untrained encoder has no statistics yet, a trained one has those of the
  last few batches: counting both afresh on the same images is what makes them comparable.
- Features are standardised with the mean and deviation of the training images (of all of them, also when few have
  labels: that uses no label). Nothing is ever fitted on held-out images; every accuracy is on all of them.
- linear: multinomial logistic regression. mlp: one hidden layer of 200 units (Hjelm et al. 2019, sec. 4.1) with batch
  norm, ReLU and dropout of 0.1. Both: cross-entropy, Adam from a rate of 3e-3 falling linearly to 0, batches of 128,
  10 epochs or 600 steps if those are more; the accuracy is that at the end, no epoch is picked.
- knn: 5 neighbours, Euclidean.
- linear_100, linear_10, knn_10: so many labelled images a class (fewer where a class has fewer), the mean over 3 fixed
  draws; the linear probe is then fitted to convergence (L-BFGS, at most 100 steps, L2 with C = 0.1).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn

from .data import Images, to_float
from .encoder import DeepInfoMax, Encoder

Model = TypeVar("Model", bound=nn.Module)
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
PROBES = ("linear", "mlp", "knn", "linear_100", "linear_10", "knn_10")
HIDDEN, DROPOUT, RATE, BATCH, EPOCHS, STEPS = 200, 0.1, 3e-3, 128, 10, 600
DRAWS = 3
CHUNK = 512  # images encoded at a time


def calibrated(model: Model, images: Tensor) -> Model:
    """A copy of `model` in evaluation mode, with batch-norm statistics averaged over `images` (n, C, H, W) uint8."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain average over the chunks
        if isinstance(module, DeepInfoMax):
            module.norm_batch = 0
    model.train()
    device = next(model.parameters()).device
    chunks = max(1, round(len(images) / CHUNK))  # equal chunks: a small last one would weigh as much as the rest
    with torch.no_grad():
        for chunk in images.tensor_split(chunks):
            model(to_float(chunk, device))
    return model.eval()


def features(encoder: Encoder, images: Tensor) -> dict[str, Floats]:
    """The three features probed, (n, d) each: Y (the summary), fc and conv (the last map, flattened)."""
    device = next(encoder.parameters()).device
    with torch.no_grad():
        seen = [encoder(to_float(chunk, device)) for chunk in torch.split(images, CHUNK)]
    names = {"Y": "summary", "fc": "fc", "conv": "conv"}
    return {key: torch.cat([getattr(f, name).flatten(1).cpu() for f in seen]).numpy() for key, name in names.items()}


def probe(
    train: Floats, labels: Ints, test: Floats, test_labels: Ints, which: Sequence[str] = PROBES, seed: int = 0
) -> dict[str, float]:
    """Held-out accuracy of every probe in `which`; features (n, d), labels (n,)."""
    mean, deviation = train.mean(0), train.std(0)
    deviation[deviation == 0] = 1
    train, test = (train - mean) / deviation, (test - mean) / deviation
    every = np.arange(len(labels))

    def accuracy(kind: str, rows: Ints) -> float:
        if kind != "knn" and rows is every:
            return float((fitted(kind, train, labels, seed)(test) == test_labels).mean())
        if len(np.unique(labels[rows])) == 1:  # the others are too rare to be drawn; scikit-learn refuses
            return float((test_labels == labels[rows[0]]).mean())
        model: Any = KNeighborsClassifier(min(5, len(rows)))
        if kind == "linear":
            model = LogisticRegression(C=0.1, max_iter=100)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 100 steps are part of the protocol
            return float(model.fit(train[rows], labels[rows]).score(test, test_labels))

    accuracies = {}
    # Small products gain nothing from threads, and on two busy cores were a hundred times slower with them.
    with threadpool_limits(1 if train.size < 2**21 else None):
        for name in which:
            kind, _, few = name.partition("_")
            draws = [few_of_each(labels, int(few), draw) for draw in range(DRAWS)] if few else [every]
            accuracies[name] = float(np.mean([accuracy(kind, rows) for rows in draws]))
    return accuracies


def fitted(kind: str, x: Floats, labels: Ints, seed: int) -> Callable[[Floats], Ints]:
    """The classifier "linear" or "mlp" trained on (n, d) features: a function from features to labels."""
    classes, targets = np.unique(labels, return_inverse=True)
    inputs, wanted = torch.from_numpy(x), torch.from_numpy(targets)
    batch = min(BATCH, len(x))
    epochs = max(EPOCHS, math.ceil(STEPS / (len(x) // batch)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Linear(x.shape[1], HIDDEN if kind == "mlp" else len(classes))]
        if kind == "mlp":
            layers += [nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, len(classes))]
        net = nn.Sequential(*layers)
        adam = torch.optim.Adam(net.parameters(), RATE, fused=True)
        falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, epochs * (len(x) // batch))
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(x)), batch)[: len(x) // batch]:
                adam.zero_grad()
                F.cross_entropy(net(inputs[rows]), wanted[rows]).backward()  # type: ignore[no-untyped-call]
                adam.step()
                falling.step()
    net.eval()

    def predict(features: Floats) -> Ints:
        with torch.no_grad():
            said: Ints = classes[net(torch.from_numpy(features)).argmax(1).numpy()]
            return said

    return predict


def few_of_each(labels: Ints, few: int, draw: int) -> Ints:
    """Indices of `few` images of every class, the same ones for every feature of a draw."""
    rng = np.random.default_rng(draw)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:few] for c in np.unique(labels)])


def probe_encoder(
    images: Images, encoder: Encoder, limit: int, which: Sequence[str] = PROBES, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Accuracies {"Y": {probe: ...}, "fc": ..., "conv": ...}; at most `limit` labels of training images are used."""
    ready, (used, labels, test_labels) = calibrated(encoder, images.train), labelled(images, limit)
    train, test = features(ready, images.train[used]), features(ready, images.held_out)
    return {name: probe(train[name], labels, test[name], test_labels, which, seed) for name in train}


def labelled(images: Images, limit: int) -> tuple[Tensor, Ints, Ints]:
    """Which training images (a fixed draw) have their labels used, those labels, and the held-out ones'."""
    assert images.train_labels is not None
    assert images.held_out_labels is not None
    used = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))[:limit]
    return used, images.train_labels[used].numpy(), images.held_out_labels.numpy()


def probe_all(images: Images, untrained: Encoder, trained: Encoder, limit: int) -> dict[str, Any] | None:
    """Probe accuracies {"raw": {...}, "untrained": {"Y": {...}, ...}, "trained": ...}, or None without labels."""
    if images.train_labels is None or images.held_out_labels is None:
        return None
    used, labels, test_labels = labelled(images, limit)
    raw, raw_test = (pixels.flatten(1).numpy().astype(np.float32) for pixels in (images.train[used], images.held_out))
    table: dict[str, Any] = {"raw": probe(raw, labels, raw_test, test_labels)}
    for name, encoder in (("untrained", untrained), ("trained", trained)):
        table[name] = probe_encoder(images, encoder, limit)
    return table
