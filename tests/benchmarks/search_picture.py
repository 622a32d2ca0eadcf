"""The picture of the search benchmark: hypervolume attained over device runs, per oracle.

One panel per oracle, one line per method (the mean over seeds) with the band in which the
middle half of the seeds lie. Which figures are drawn is `search.py`'s work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {
    # Okabe and Ito (2008), which stay apart for colour-blind readers; ours is the strongest.
    "ours": "#d55e00",
    "random": "#999999",
    "tpe": "#0072b2",
    "nsga2": "#56b4e9",
    "gp": "#009e73",
    "greedy": "#cc79a7",
    "table": "#e69f00",
}
_COLUMNS = 3


def draw(path: Path, shares: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> None:
    """Write the picture; `shares` has per oracle and method a row per seed, a value per run."""
    rows = math.ceil(len(shares) / _COLUMNS)
    figure = Figure(figsize=(4.6 * min(_COLUMNS, len(shares)), 3.6 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, min(_COLUMNS, len(shares)), squeeze=False)).ravel()
    for axis, (oracle, methods) in zip(axes, shares.items(), strict=False):
        for name, curves in methods.items():
            values = _aligned(curves)
            runs = np.arange(1, values.shape[1] + 1)
            low, high = np.percentile(values, [25, 75], axis=0)
            width = 2.2 if name == "ours" else 1.2
            colour = COLOURS.get(name)
            axis.plot(runs, values.mean(axis=0), color=colour, linewidth=width, label=name)
            axis.fill_between(runs, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_title(oracle, fontsize=10)
        axis.set_xscale("log")
        axis.set_xlabel("device runs")
        axis.set_ylabel("share of the true hypervolume")
        axis.set_ylim(top=1.005)
        axis.grid(color="#e3e6eb", linewidth=0.6)
    for axis in axes[len(shares) :]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle("Mean over seeds; bands: the middle half of the seeds", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def _aligned(curves: Sequence[Sequence[float]]) -> np.ndarray:
    """As one array; a search that ended early keeps what it had."""
    longest = max(len(curve) for curve in curves)
    return np.array([[*curve, *[curve[-1]] * (longest - len(curve))] for curve in curves])
