"""The picture of a front: accuracy over latency, every trial with its error bars.

Owns the drawing with matplotlib, as a file of its own (`front_figure`) and as SVG to put into
a page (`inline_front`), where the page's style sheet gives the colours so that the picture
follows a light or dark theme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from autotune.export import figures
from storage.records import TrialRecord

# Text stays text (no font travels with the picture) and ids repeat from run to run.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edge-autotune",
    "font.family": "sans-serif",
    "font.size": 11,
}

# Each role has one colour that occurs nowhere else, so that in a page it can be replaced by
# the style sheet's variable of that name. Blue, vermilion, green and purple are those of Okabe
# and Ito (2008), which stay apart for colour-blind readers.
COLOURS = {
    "ink": "#1b1f27",
    "muted": "#6d7480",
    "grid": "#e3e6eb",
    "trial": "#9aa3b1",
    "line": "#0072b2",
    "winner": "#d55e00",
    "fp32": "#009e73",
    "int8": "#aa4499",
    "budget": "#b0261f",
}


# Trials that lose more than this many points lie under the picture's lower edge.
DEEPEST_POINTS = 15.0
# Accuracies that lie closer together than this are not blown up to the picture's height.
LEAST_POINTS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """How one kind of trial is drawn."""

    colour: str
    shape: str
    size: float
    order: int
    label: str


MARKS = {
    "trial": Mark(colour=COLOURS["trial"], shape="o", size=4.5, order=2, label="trial"),
    "front": Mark(colour=COLOURS["line"], shape="o", size=6.0, order=4, label="on the front"),
    "fp32": Mark(colour=COLOURS["fp32"], shape="s", size=8.5, order=5, label="FP32"),
    "int8": Mark(colour=COLOURS["int8"], shape="D", size=8.0, order=5, label="uniform INT8"),
    "winner": Mark(colour=COLOURS["winner"], shape="*", size=16.0, order=6, label="winner"),
}


def front_figure(
    trials: Sequence[TrialRecord],
    *,
    fp32: TrialRecord | None = None,
    int8: TrialRecord | None = None,
    winner: TrialRecord | None = None,
    budget_ns: float | None = None,
    title: str | None = None,
    form: Literal["svg", "png"] = "svg",
) -> bytes:
    """The picture as a file on a white ground.

    A trial without accuracy or without a steady latency is left out. With no trial to show the
    axes stay empty.
    """
    with mpl.rc_context(STYLE):
        figure = _draw(trials, fp32=fp32, int8=int8, winner=winner, budget_ns=budget_ns)
        if title is not None:
            figure.axes[0].set_title(title, loc="left", fontsize=12, color=COLOURS["ink"])
        figure.patch.set_facecolor("white")
        return _save(figure, form)


def inline_front(
    trials: Sequence[TrialRecord],
    *,
    fp32: TrialRecord | None = None,
    int8: TrialRecord | None = None,
    winner: TrialRecord | None = None,
    budget_ns: float | None = None,
    describe: Callable[[TrialRecord], str] = lambda trial: f"trial {trial.number}",
) -> str:
    """The picture as an `<svg>` element whose colours are the variables `--ROLE` of the page.

    `describe` gives the text that a browser shows over a point.
    """
    with mpl.rc_context(STYLE):
        figure = _draw(trials, fp32=fp32, int8=int8, winner=winner, budget_ns=budget_ns)
        figure.patch.set_alpha(0.0)
        text = _save(figure, "svg").decode()
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        r'<svg xmlns="http://www.w3.org/2000/svg" class="front" viewBox="\1" role="img" '
        r'aria-label="accuracy over latency">',
        svg,
    )
    # matplotlib's style rule would reach the whole page, and its links need no name space here.
    svg = svg.replace(">*{", ">svg.front *{").replace("xlink:href", "href")
    for role, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{role})")
    for trial in trials:
        tooltip = f"<title>{escape(describe(trial))}</title>"
        svg = svg.replace(f'<g id="{_gid(trial)}">', f'<g id="{_gid(trial)}">{tooltip}')
    return svg


def _draw(
    trials: Sequence[TrialRecord],
    *,
    fp32: TrialRecord | None,
    int8: TrialRecord | None,
    winner: TrialRecord | None,
    budget_ns: float | None,
) -> Figure:
    figure = Figure(figsize=(9.0, 5.2), layout="constrained")
    axes = figure.add_subplot()
    _dress(axes)
    ranked = [trial for trial in trials if figures.is_ranked(trial)]
    line = figures.front_line(ranked)
    if line:
        _draw_line(axes, line)
    named = {
        trial.id: kind
        for kind, trial in (("fp32", fp32), ("int8", int8), ("winner", winner))
        if trial is not None
    }
    on_front = {trial.id for trial in line}
    for trial in ranked:
        kind = named.get(trial.id, "front" if trial.id in on_front else "trial")
        _draw_trial(axes, trial, MARKS[kind])
    if budget_ns is not None:
        axes.axvline(
            budget_ns / 1e6,
            color=COLOURS["budget"],
            linestyle=(0, (5, 3)),
            linewidth=1.3,
            zorder=1,
            label=f"budget {figures.duration_text(budget_ns)}",
        )
    _frame(axes, ranked, budget_ns)
    _legend(figure, axes)
    return figure


def _dress(axes: Any) -> None:
    axes.set_facecolor("none")
    axes.grid(visible=True, color=COLOURS["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(COLOURS["muted"])
    axes.tick_params(colors=COLOURS["muted"], labelcolor=COLOURS["muted"])
    axes.set_xlabel("latency p50, ms (smaller is better)", color=COLOURS["ink"])
    axes.set_ylabel("accuracy on search data, % (larger is better)", color=COLOURS["ink"])
    axes.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(useOffset=False)


def _draw_line(axes: Any, line: Sequence[TrialRecord]) -> None:
    points = [_point(trial) for trial in line]
    axes.step(
        [x for x, _ in points],
        [y for _, y in points],
        where="post",
        color=COLOURS["line"],
        linewidth=1.6,
        zorder=3,
    )


def _draw_trial(axes: Any, trial: TrialRecord, mark: Mark) -> None:
    x, y = _point(trial)
    latency, accuracy = figures.latency_of(trial), trial.accuracy
    if latency is None or accuracy is None:
        return
    prominent = mark.order > 2
    container = axes.errorbar(
        [x],
        [y],
        xerr=[[x - latency.p50_low_ns / 1e6], [latency.p50_high_ns / 1e6 - x]],
        yerr=[[y - 100 * accuracy.value_low], [100 * accuracy.value_high - y]],
        fmt="none",
        ecolor=mark.colour,
        elinewidth=1.1 if prominent else 0.6,
        alpha=0.55 if prominent else 0.35,
        zorder=mark.order,
    )
    container.set_label("_")
    axes.plot(
        [x],
        [y],
        mark.shape,
        color=mark.colour,
        markersize=mark.size,
        markeredgewidth=0,
        zorder=mark.order + 0.5,
        label=mark.label,
        gid=_gid(trial),
    )


def _frame(axes: Any, ranked: Sequence[TrialRecord], budget_ns: float | None) -> None:
    """Show the useful region: a few ruined candidates must not squash the rest to a line."""
    if not ranked:
        return
    xs, ys = zip(*(_point(trial) for trial in ranked), strict=True)
    floor = max(min(ys), max(ys) - DEEPEST_POINTS)
    shown = [*xs, *([] if budget_ns is None else [budget_ns / 1e6])]
    x_margin = 0.06 * (max(shown) - min(shown) or max(shown))
    y_margin = max(0.08 * (max(ys) - floor), (LEAST_POINTS - (max(ys) - floor)) / 2)
    axes.set_xlim(max(min(shown) - x_margin, 0.0), max(shown) + x_margin)
    axes.set_ylim(max(floor - y_margin, 0.0), min(max(ys) + y_margin, 101.0))
    below = sum(y < floor - y_margin for y in ys)
    if below:
        axes.text(
            0.01,
            0.02,
            f"{below} more below {floor - y_margin:.0f} %",
            transform=axes.transAxes,
            color=COLOURS["muted"],
        )


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    first = dict(reversed(list(zip(labels, handles, strict=True))))
    order = [mark.label for mark in reversed(MARKS.values())]
    known = [label for label in order if label in first]
    others = [label for label in first if label not in order]
    shown = known + others
    if shown:
        figure.legend(
            [first[label] for label in shown],
            shown,
            loc="outside lower center",
            ncols=len(shown),
            columnspacing=1.4,
            handletextpad=0.4,
            frameon=False,
            labelcolor=COLOURS["ink"],
        )


def _point(trial: TrialRecord) -> tuple[float, float]:
    """Latency in ms and accuracy in percent."""
    latency_ns, accuracy = figures.point(trial)
    return latency_ns / 1e6, 100 * accuracy


def _gid(trial: TrialRecord) -> str:
    return f"trial-{trial.number}"


def _save(figure: Figure, form: Literal["svg", "png"]) -> bytes:
    buffer = io.BytesIO()
    if form == "png":
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=160)
    else:
        FigureCanvasSVG(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
