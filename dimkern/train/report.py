"""report.json and the plots of a run.

Plots: curves.png (loss and MI estimate), probes.png (accuracies), score_map.png (where a summary finds itself).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .data import to_float
from .loop import Run, versions
from .probes import PROBES, calibrated

TITLES = {
    "linear": "linear, all labels",
    "mlp": "MLP, all labels",
    "knn": "5-NN, all labels",
    "linear_100": "linear, 100 labels a class",
    "linear_10": "linear, 10 labels a class",
    "knn_10": "5-NN, 10 labels a class",
}
CURVES = {
    "loss": "loss",
    "mi": "MI estimate",
    "prior": "prior, encoder's loss",
    "discriminator": "prior, discriminator's",
}
UNTRAINED, TRAINED, RAW = "#b9c4cf", "#1f6f8b", "#c0562f"
WAYS = ("untrained", "trained")
PLOTS = ("curves.png", "probes.png", "score_map.png")
SHOWN = 6


def write_report(run: Run, table: dict[str, Any] | None, probe_seconds: float) -> list[Path]:
    """Write everything to `run.config.out`; the paths, report.json first."""
    out = Path(run.config.out)
    report = {
        "config": dataclasses.asdict(run.config),
        "versions": versions() | {"matplotlib": matplotlib.__version__, "numpy": np.__version__},
        "device": str(run.device),
        "threads": run.threads,
        "images": run.images.fingerprint(),
        "train_images": len(run.images.train),
        "held_out_images": len(run.images.held_out),
        "timing": {"train_seconds": sum(run.history["seconds"]), "probe_seconds": probe_seconds},
        "epochs": {key: plain(epoch_means(run, key)) for key in run.history},
        "steps": {key: plain(run.history[key]) for key in run.history if key != "seconds"},
        "probes": table,
    }
    written = [out / "report.json"]
    partial = out / "report.json.partial"
    partial.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    os.replace(partial, written[0])

    figures = {"curves.png": draw_curves(run)}
    if table is not None:
        figures["probes.png"] = draw_probes(table, run)
    if run.config.objective != "global" and run.config.critic == "dot":
        figures["score_map.png"] = draw_score_map(run)
    for name in PLOTS:
        (out / name).unlink(missing_ok=True)  # another run's, which this one may not draw
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=150)
        written.append(out / name)
    return written


def epoch_means(run: Run, key: str) -> list[float]:
    means: list[float] = np.reshape(run.history[key], (len(run.history["seconds"]), -1)).mean(axis=1).tolist()
    return means


def plain(values: list[float]) -> list[float | None]:
    """JSON has no NaN: where an estimator gives no MI the report says null."""
    return [None if math.isnan(value) else value for value in values]


def title_of(run: Run) -> str:
    dim = {"local": "DIM(L)", "global": "DIM(G)", "both": "DIM(L+G)"}[run.config.objective]
    prior = f" and a {run.config.prior} prior" if run.config.gamma else ""
    return f"{dim}, {run.config.estimator}{prior}, on {run.images.name}"


def draw_curves(run: Run) -> Figure:
    """Loss and MI (and the losses of prior matching) of every step, and their means over epochs."""
    shown = {key: title for key, title in CURVES.items() if key in run.history}
    figure = Figure(figsize=(4.5 * len(shown), 3.6), layout="constrained")
    figure.suptitle(title_of(run))
    epochs = len(run.history["seconds"])
    for axes, (key, title) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        values = np.array(run.history[key])
        steps = np.arange(1, len(values) + 1) * epochs / len(values)
        if not np.isfinite(values).any():
            axes.text(0.5, 0.5, f"{run.config.estimator} gave no estimate", ha="center", transform=axes.transAxes)
        axes.plot(steps, values, color=UNTRAINED, linewidth=0.8, label="step")
        axes.plot(
            np.arange(epochs) + 0.5, epoch_means(run, key), "o-", color=TRAINED, markersize=3, label="mean of epoch"
        )
        # The first steps can be far from all others: they may leave the picture, not flatten the rest.
        low, high = np.nanpercentile(values, [0.5, 99.5]) if np.isfinite(values).any() else (0, 1)
        axes.set_ylim(low - 0.08 * (high - low) - 1e-6, high + 0.08 * (high - low) + 1e-6)
        axes.set(title=title, xlabel="epoch", ylabel="nats", xlim=(0, epochs))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
    axes.legend(frameon=False, loc="lower right")
    return figure


def draw_probes(table: dict[str, Any], run: Run) -> Figure:
    """A panel per probe; a group of bars per feature; raw pixels as a line across."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    figure.suptitle(f"Held-out accuracy, {title_of(run)}")
    every = [*table["raw"].values(), *(v for w in WAYS for values in table[w].values() for v in values.values())]
    floor = max(0.0, 10 * np.floor(10 * min(every) - 0.5))  # one for all panels, so that bars compare across them
    for axes, probe in zip(figure.subplots(2, 3, sharey=True).flat, PROBES, strict=True):
        names = list(table["trained"])
        raw = 100 * table["raw"][probe]
        axes.axhline(raw, color=RAW, linewidth=1.5, linestyle="--", label="raw pixels", zorder=3)
        for way, shift, colour, ink in zip(WAYS, (-0.2, 0.2), (UNTRAINED, TRAINED), ("black", "white"), strict=True):
            heights = [100 * table[way][name][probe] for name in names]
            axes.bar(np.arange(len(names)) + shift, heights, 0.38, color=colour, label=f"{way} encoder")
            for i, height in enumerate(heights):  # at the foot of the bar, clear of the line of raw pixels
                axes.annotate(
                    f"{height:.1f}", (i + shift, floor), (0, 4), textcoords="offset points", ha="center", color=ink
                )
        axes.set_xticks(np.arange(len(names)), ["Y (summary)" if name == "Y" else name for name in names])
        axes.set(title=f"{TITLES[probe]} (raw pixels {raw:.1f})", ylim=(floor, 100))
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("accuracy, %" + (f" (axis from {floor:.0f})" if floor else ""))
        tidy(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_score_map(run: Run) -> Figure:
    """Held-out images; the scores (before --scale) of each one's summary with its own locations and another image's."""
    count = min(SHOWN, len(run.images.held_out))
    images = run.images.held_out[:count]
    with torch.no_grad():
        pairs = calibrated(run.model, run.images.train)(to_float(images, run.device))
    l, m = pairs["local_l"], pairs["local_m"]  # (n, K, M, M), (n, K) or (n, K, P)
    m = m[:, :, 0] if m.ndim == 3 else m
    scores = torch.einsum("nk,jkhw->njhw", m, l).float().cpu().numpy()  # summaries x images x map

    figure = Figure(figsize=(8.4, 0.9 + 1.62 * count), layout="constrained")
    figure.suptitle(f"Score of image A's summary with every location, {title_of(run)}")
    titles = ("image A", "A's summary on A", "A's summary on B", "image B")
    for i, row in enumerate(np.atleast_2d(figure.subplots(count, 4))):
        other = (i + 1) % count
        pair = scores[i, [i, other]]
        for axes, index in ((row[0], i), (row[3], other)):
            pixels = images[index].permute(1, 2, 0).numpy()
            axes.imshow(pixels if pixels.shape[2] == 3 else pixels[:, :, 0], cmap="gray")
        for axes, values in zip(row[1:3], pair, strict=True):
            shown = axes.imshow(values, cmap="viridis", vmin=pair.min(), vmax=pair.max())
            axes.set_xlabel(f"mean {values.mean():.1f}", fontsize=9)
        figure.colorbar(shown, ax=list(row), shrink=0.85, pad=0.02, aspect=12)
        for axes, title in zip(row, titles, strict=True):
            axes.set(xticks=[], yticks=[])
            if i == 0:
                axes.set_title(title, fontsize=11)
    return figure


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)


def table_text(table: dict[str, Any]) -> str:
    """The probe table for a terminal: features down, probes across, accuracies in per cent."""
    rows = [("raw pixels", table["raw"])]
    rows += [(f"{way} {name}", table[way][name]) for name in table["trained"] for way in WAYS]
    heads = {name: name.replace("knn", "5-NN").replace("mlp", "MLP").replace("_", ", ") for name in PROBES}
    heads = {name: head + ("/class" if "," in head else "") for name, head in heads.items()}
    lines = [f"{'held-out accuracy, %':22s}" + "".join(f"{heads[probe]:>18s}" for probe in PROBES)]
    lines += [f"{name:22s}" + "".join(f"{100 * values[probe]:18.1f}" for probe in PROBES) for name, values in rows]
    return "\n".join(lines)


def outcome(table: dict[str, Any]) -> str:
    """One sentence: what training did to the summary Y."""
    before, after = table["untrained"]["Y"], table["trained"]["Y"]
    changes = [f"{name} {100 * before[probe]:.1f} -> {100 * after[probe]:.1f} %"
               for probe, name in (("linear", "all labels"), ("linear_10", "10 labels a class"))]  # fmt: skip
    return f"linear probe on the summary Y, untrained -> trained: {', '.join(changes)}"
