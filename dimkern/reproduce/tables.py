"""Tables (Markdown, CSV) and plots of a comparison, from the JSON files of its jobs; knows nothing of training."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..train.report import tidy

FEATURES = {"conv": "#b9c4cf", "fc": "#1f6f8b", "Y": "#c0562f"}
HEADS = {"linear": "linear", "mlp": "MLP", "linear_100": "100 a class", "linear_10": "10 a class"}
TABLES = {
    "Accuracy, %, with all labels, as in the paper's table": ("linear", "mlp"),
    "Linear, %, with few labels": ("linear_100", "linear_10"),
}
Cells = dict[tuple[str, str, str], list[float]]  # (row, feature, probe) -> accuracies of all seeds, in %


def write(out: Path, budget: str, *, plots: bool = True) -> list[Path]:
    """Make everything in `out` from the results below it, or only the tables; the paths written."""
    results = [json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))]
    rows = [one for one in results if one["pool"] is None]
    points = [one for one in results if one["pool"] is not None]
    written = []
    if rows:
        rows.sort(key=lambda one: (one["row"] != "untrained", "concat" in one["row"], one["row"], one["seed"]))
        replace(out / "table.md", markdown(rows, budget))
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows([("row", "seed", "feature", "probe", "accuracy"), *flat(rows)])
        replace(out / "table.csv", lines.getvalue())
        written += [out / "table.md", out / "table.csv"]
    if rows and plots:
        draw_table(rows, budget).savefig(out / "table.png", dpi=150)
        written.append(out / "table.png")
    if points and plots:
        draw_curve(points).savefig(out / "negatives.png", dpi=150)
        written.append(out / "negatives.png")
    return written


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all; other processes may be at it as well."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


def flat(results: list[dict[str, Any]]) -> list[tuple[str, int, str, str, str]]:
    """A line for every accuracy: row, seed, feature, probe, per cent."""
    return [
        (one["row"], one["seed"], feature, probe, f"{100 * accuracy:.2f}")
        for one in results
        for feature, probes in (one["probes"] or {}).items()
        for probe, accuracy in probes.items()
    ]


def cells(results: list[dict[str, Any]]) -> Cells:
    found: Cells = {}
    for row, _, feature, probe, accuracy in flat(results):
        found.setdefault((row, feature, probe), []).append(float(accuracy))
    return found


def markdown(rows: list[dict[str, Any]], budget: str) -> str:
    """Both tables, means ± deviations over seeds, under a line that says what made them."""
    found, names = cells(rows), list(dict.fromkeys(one["row"] for one in rows))
    seeds = {name: [one for one in rows if one["row"] == name] for name in names}
    lines = [about(rows, budget), ""]
    for title, probes in TABLES.items():
        columns = [(feature, probe) for feature in FEATURES for probe in probes]
        heads = [f"{feature}, {HEADS[probe]}" for feature, probe in columns]
        lines += [f"**{title}**", "", f"| | {' | '.join(heads)} | seeds |", "|---" * (len(heads) + 2) + "|"]
        for name in names:
            values = [spread(found.get((name, *column), [])) for column in columns]
            stopped = sum(one["stopped"] is not None for one in seeds[name])
            count = f"{len(seeds[name])}" + (f", {stopped} diverged" if stopped else "")
            lines.append(f"| {name} | {' | '.join(values)} | {count} |")
        lines.append("")
    return "\n".join(lines)


def about(rows: list[dict[str, Any]], budget: str) -> str:
    """What made the rows: data, net, budget, versions, time."""
    config, images = rows[-1]["config"], rows[-1]["images"].split()
    minutes = sum(sum(one["seconds"].values()) for one in rows) / 60
    versions = ", ".join(f"{name} {version}" for name, version in rows[-1]["versions"].items())
    net = f"convolutions from {config['width']} channels, fc {config['fc']}, heads of {config['units']} units"
    return (
        f"{images[0]}, {images[1].split('x')[0]} training images, {config['epochs']} epochs, {net}, "
        f"batch size {config['batch_size']}, Adam {config['lr']:g}; budget `{budget}`, {minutes:.0f} minutes in all; "
        f"mean ± standard deviation over seeds; {versions}."
    )


def spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def draw_table(rows: list[dict[str, Any]], budget: str) -> Figure:
    """A panel for each probe, a line for each row, a point for each feature with its deviation over seeds."""
    found, names = cells(rows), list(dict.fromkeys(one["row"] for one in rows))[::-1]
    figure = Figure(figsize=(12, 1.4 + 0.36 * len(names)), layout="constrained")
    figure.suptitle(f"Held-out accuracy, {rows[-1]['images'].split()[0]}, budget {budget}")
    for axes, (probe, head) in zip(figure.subplots(1, len(HEADS), sharey=True), HEADS.items(), strict=True):
        for feature, colour in FEATURES.items():
            values = [found.get((name, feature, probe), [np.nan]) for name in names]
            means, errors = [np.mean(v) for v in values], [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
            axes.errorbar(means, range(len(names)), xerr=errors, fmt="o", color=colour, label=feature, capsize=2)
        axes.set(title=f"{head}, all labels" if probe in ("linear", "mlp") else f"linear, {head}", xlabel="%")
        axes.set_yticks(range(len(names)), names)
        tidy(axes)
        axes.grid(axis="both", color="#e6e6e6")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_curve(points: list[dict[str, Any]]) -> Figure:
    """Accuracy on Y against the number of negatives of a summary, all else equal."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(f"Accuracy on Y against negatives, {points[0]['images'].split()[0]}, batches of 64")
    for axes, probe in zip(figure.subplots(1, 2), ("linear", "linear_10"), strict=True):
        for row, colour in (("InfoNCE", FEATURES["fc"]), ("JSD", FEATURES["Y"])):
            seen: dict[int, list[float]] = {}
            for one in points:
                if one["row"] == row and one["probes"]:
                    seen.setdefault(one["pool"], []).append(100 * one["probes"]["Y"][probe])
            pools = sorted(seen)
            errors = [np.std(seen[pool], ddof=1) if len(seen[pool]) > 1 else 0 for pool in pools]
            axes.errorbar(
                pools, [np.mean(seen[pool]) for pool in pools], errors, fmt="o-", color=colour, label=row, capsize=2
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda pool, _: f"{pool - 1:.0f}"))
        axes.set(
            title=HEADS[probe] if "_" in probe else "all labels",
            ylabel="%",
            xlabel="other images in a summary's negatives",
        )
        tidy(axes)
    axes.legend(frameon=False)
    return figure
