"""The README's pictures, drawn from what `compare --json` wrote: `python -m benchmarks.plot`.

scaling.png: time and memory against batch size. grid.png: time relative to the bare matrix products, shape by shape.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .cases import Case

_RESULTS = Path(__file__).parent / "results"
_PICTURES = Path(__file__).parent.parent / "docs" / "img"

# Okabe and Ito's palette, told apart by the colour-blind
_STYLE = {
    "ours": {"color": "#0072B2", "marker": "o", "linewidth": 2.8, "zorder": 4},
    "floor": {"color": "#555555", "marker": None, "linewidth": 1.8, "linestyle": (0, (4, 2)), "zorder": 3},
    "eager": {"color": "#E69F00", "marker": "s", "linewidth": 2.0, "zorder": 2},
    "compile": {"color": "#009E73", "marker": "^", "linewidth": 2.0, "zorder": 2},
    "reference": {"color": "#D55E00", "marker": "D", "linewidth": 2.0, "zorder": 2},
}
_LINE_POINTS = 15  # between two labels
_LABELS = {
    "ours": "dimkern",
    "floor": "bare GEMMs (floor)",
    "eager": "closed-form eager",
    "compile": "closed form, torch.compile",
    "reference": "reference formula",
}

Result = dict[str, Any]


def draw(result: Result, directory: Path) -> list[Path]:
    """The picture that a run's grid gives, as PNG files."""
    directory.mkdir(parents=True, exist_ok=True)
    grid = result["about"]["grid"]
    path = directory / {"readme": "scaling.png", "full": "grid.png"}.get(grid, f"grid_{grid}.png")
    figure = _scaling(result) if grid == "readme" else _grid(result)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return [path]


def _rows(result: Result) -> list[Result]:
    """The float32 InfoNCE rows that have numbers, with the backend that "auto" chooses called "ours"."""
    name = {result["about"]["ours"]: "ours"}
    return [
        {**row, "contender": name.get(row["contender"], row["contender"])}
        for row in result["rows"]
        if (row["estimator"], row["dtype"], row["status"]) == ("infonce", "float32", "ok")
    ]


def _scaling(result: Result) -> plt.Figure:
    rows = _rows(result)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for axes, value in ((left, _time), (right, _memory)):
        ends = {}
        for name in ("reference", "eager", "floor", "ours"):
            points = [(row["case"]["N"], value(row)) for row in rows if row["contender"] == name and value(row)]
            if points:
                axes.plot(*zip(*points, strict=True), markersize=6, **_STYLE[name])
                ends[name] = points[-1]
        _axes(axes, rows, _seconds if value is _time else _bytes)
        figure.draw_without_rendering()  # settles the scales that labels are spread on
        _label(axes, ends, _stops(result))
        _gap(axes, rows, value)
    left.set_title("Time of loss and gradients", loc="left", fontsize=12, fontweight="bold")
    right.set_title("Peak memory beyond inputs and gradients", loc="left", fontsize=12, fontweight="bold")
    case = rows[0]["case"]
    figure.supxlabel(
        f"InfoNCE, float32, L={case['L']} locations, K={case['K']} channels · {_machine(result)} · reference "
        "formula in cortex_DIM's layout",
        fontsize=9, color="#555555",
    )  # fmt: skip
    return figure


def _machine(result: Result) -> str:
    about = result["about"]
    threads = f"{about['threads']} thread" + "s" * (about["threads"] > 1)
    return f"{about['cpu']}, {threads}, torch {about['torch'].split('+')[0]}"


def _time(row: Result) -> float:
    return row["both"]["seconds"]


def _memory(row: Result) -> float:
    return max(1e6, row.get("peak_bytes") or 0)  # below a megabyte the measurement is the allocator's noise


def _stops(result: Result) -> dict[str, str]:
    """Of a contender that ran out of memory: at which size, and what it would have needed."""
    stops: dict[str, str] = {}
    for row in result["rows"]:
        if row["status"] == "skipped" and row["reason"].startswith("needs"):
            stops.setdefault(row["contender"], f"N={row['case']['N']} {row['reason']}")
    return stops


def _label(axes: Axes, ends: dict[str, tuple[int, float]], stops: dict[str, str]) -> None:
    """Each line's name at its end: over one that stops early, else beside it and spread so that all can be read."""
    last, below = max(size for size, _ in ends.values()), -math.inf
    for name, (size, value) in sorted(ends.items(), key=lambda item: item[1][1]):
        style = {"color": _STYLE[name]["color"], "annotation_clip": False, "textcoords": "offset points"}
        if size < last:
            axes.annotate(_LABELS[name], (size, value), xytext=(0, 22), ha="center", fontsize=11, **style)
            axes.annotate(stops.get(name, ""), (size, value), xytext=(0, 10), ha="center", fontsize=9, **style)
            continue
        _, height = axes.transData.transform((size, value)) * 72 / axes.figure.dpi  # points
        below = max(height, below + _LINE_POINTS)
        weight = "bold" if name == "ours" else "normal"
        axes.annotate(
            _LABELS[name], (size, value), xytext=(9, below - height), va="center", fontsize=11, weight=weight, **style
        )


def _gap(axes: Axes, rows: list[Result], value: Callable[[Result], float]) -> None:
    """An arrow from the reference formula's last point down to ours, with what lies between them."""
    theirs = [row for row in rows if row["contender"] == "reference"]
    if not theirs:
        return
    N = theirs[-1]["case"]["N"]
    ours = next((row for row in rows if row["contender"] == "ours" and row["case"]["N"] == N), None)
    if ours is None:
        return
    high, low = value(theirs[-1]), value(ours)
    arrow = {"arrowstyle": "<->", "color": "#333333", "shrinkA": 6, "shrinkB": 6}
    axes.annotate("", (N, high), (N, low), arrowprops=arrow)
    axes.annotate(
        f"{high / low:.0f}×", (N, high**0.25 * low**0.75), xytext=(-5, 0), textcoords="offset points", va="center",
        ha="right", fontsize=13, fontweight="bold", color="#333333",
    )  # fmt: skip


def _axes(axes: Axes, rows: list[Result], unit: Any) -> None:
    sizes = sorted({row["case"]["N"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="images in the batch, N")
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(unit))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(sizes[0] * 0.9, sizes[-1] * 1.1)
    axes.set_ylim(axes.get_ylim()[0], axes.get_ylim()[1] * 2.5)  # room for the topmost label


def _seconds(value: float, _: object = None) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def _bytes(value: float, _: object = None) -> str:
    return f"{value / 1e9:g} GB" if value >= 1e9 else f"{value / 1e6:g} MB"


def _grid(result: Result) -> plt.Figure:
    rows = _rows(result)
    rows.sort(key=lambda row: (row["case"]["K"], row["case"]["N"]))
    cases = list(dict.fromkeys(Case(**row["case"]).name for row in rows))
    names = [name for name in ("ours", "compile", "eager") if any(row["contender"] == name for row in rows)]
    figure, axes = plt.subplots(figsize=(10, 4.4), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        ratios = {Case(**row["case"]).name: row["both"]["ratio"] for row in rows if row["contender"] == name}
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(cases))]
        axes.bar(
            places, [ratios.get(case, 0.0) for case in cases], width * 0.92, color=_STYLE[name]["color"],
            label=_LABELS[name], zorder=2,
        )  # fmt: skip
    axes.axhline(1.0, color=_STYLE["floor"]["color"], linewidth=1.6, linestyle=(0, (4, 2)), zorder=3)
    axes.annotate(
        "bare\nGEMMs", (1.0, 1.0), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
        va="center", color=_STYLE["floor"]["color"], fontsize=9,
    )  # fmt: skip
    axes.set_xticks(
        range(len(cases)), [case.replace(") ", ")\n") for case in cases], rotation=40, ha="right", fontsize=9
    )
    axes.set_title(
        "Time of InfoNCE and its gradients, relative to its three matrix products alone", loc="left", fontsize=12,
        fontweight="bold",
    )  # fmt: skip
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}×"))
    axes.grid(axis="y", color="#dddddd", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(names), loc="upper left", fontsize=10)
    axes.margins(x=0.01)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
    axes.set_xlabel(
        f"(N, L, K), float32 · {_machine(result)}",
        fontsize=9, color="#555555",
    )  # fmt: skip
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "json", nargs="*", type=Path, help="files of compare --json (default: scaling and peers of benchmarks/results)"
    )
    parser.add_argument("--out", type=Path, default=_PICTURES, metavar="DIR", help="default: docs/img")
    args = parser.parse_args(argv)
    for file in args.json or [_RESULTS / "scaling.json", _RESULTS / "peers.json"]:
        for path in draw(json.loads(file.read_text()), args.out):
            print(f"{file.name} -> {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
