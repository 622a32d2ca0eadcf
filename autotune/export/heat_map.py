"""The picture of a job's sensitivities: groups against choices, coloured by divergence.

Owns the drawing with matplotlib, as a file (`heat_map`) and as SVG to put into a page
(`inline_heat_map`). What stands in which cell is `sensitivity_table.py`'s.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from autotune.export.front_plot import COLOURS, STYLE
from autotune.export.sensitivity_table import Table, cell_text, table
from storage.sensitivity import Sensitivity

LEAST_KL, LARGEST_KL = 1e-7, 1.0
"""The ends of the colours: below a tenth of what changes a probability by 0.1 % (Pinsker), and a
divergence at which a classifier is lost. One scale, so that two jobs' pictures compare."""

_COLOUR_MAP = "YlOrRd"
_DARK, _LIGHT, _EMPTY = "#1a1a1a", "#ffffff", "none"
_ROW_INCHES, _COLUMN_INCHES = 0.22, 0.82
_PIXELS_PER_INCH = 144

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>body {{ margin: 24px; font-family: sans-serif; background: #fff; }} svg {{ height: auto; }}
:root {{ --ink: {ink}; --muted: {muted}; --grid: {grid}; }}</style>
</head>
<body>
{svg}
</body>
</html>
"""


def heat_map(
    entries: Sequence[Sensitivity], *, title: str, form: Literal["svg", "png", "html"] = "svg"
) -> bytes:
    """The picture as a file on a white ground; `html` is one page that needs nothing else.

    `entries` are in order (`sensitivity_table.in_order`). With none the axes stay empty.
    """
    if form == "html":
        page = _PAGE.format(
            title=escape(title), svg=inline_heat_map(entries, title=title), **COLOURS
        )
        return page.encode()
    with mpl.rc_context(STYLE):
        figure = _draw(table(entries), title)
        figure.patch.set_facecolor("white")
        return _save(figure, form)


def inline_heat_map(entries: Sequence[Sensitivity], *, title: str | None = None) -> str:
    """The picture as an `<svg>` element whose texts have the page's colours `--ink`, `--muted`."""
    with mpl.rc_context(STYLE):
        figure = _draw(table(entries), title)
        figure.patch.set_alpha(0.0)
        text = _save(figure, "svg").decode()
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'^<svg [^>]*?viewBox="0 0 ([\d.]+) ([^"]*)"[^>]*>',
        r'<svg xmlns="http://www.w3.org/2000/svg" class="heat-map" viewBox="0 0 \1 \2" '
        r'style="width: \1pt; max-width: 100%" role="img" '
        r'aria-label="sensitivity of every group to every choice">',
        svg,
    )
    # matplotlib's style rule would reach the whole page, and its links need no name space here.
    svg = svg.replace(">*{", ">svg.heat-map *{").replace("xlink:href", "href")
    for role in ("ink", "muted", "grid"):
        svg = svg.replace(COLOURS[role], f"var(--{role})")
    return svg


def _draw(found: Table[Sensitivity], title: str | None) -> Figure:
    n_rows, n_columns = max(len(found.rows), 1), max(len(found.columns), 1)
    longest = max((len(name) for name in found.rows), default=0)
    figure = Figure(
        figsize=(1.6 + 0.085 * longest + _COLUMN_INCHES * n_columns, 1.5 + _ROW_INCHES * n_rows),
        layout="constrained",
    )
    axes = figure.add_subplot()
    kl = np.full((n_rows, n_columns), np.nan)
    for i, row in enumerate(found.rows):
        for j, column in enumerate(found.columns):
            entry = found.cell(row, column)
            if entry is not None and entry.mean_kl is not None:
                kl[i, j] = min(max(entry.mean_kl, LEAST_KL), LARGEST_KL)
    norm = LogNorm(LEAST_KL, LARGEST_KL)
    # Shapes, not an image: the picture stays sharp and a page needs no data: link.
    edges = np.arange(n_columns + 1) - 0.5, np.arange(n_rows + 1) - 0.5
    image = axes.pcolormesh(*edges, np.ma.masked_invalid(kl), cmap=_COLOUR_MAP, norm=norm)
    axes.invert_yaxis()
    _write_numbers(axes, found, kl, norm)
    _dress(axes, found)
    if title is not None:
        axes.set_title(title, loc="left", fontsize=11, color=COLOURS["ink"], pad=12)
    bar = figure.colorbar(image, ax=axes, location="bottom", fraction=0.03, aspect=40, pad=0.01)
    if bar.solids is not None:
        bar.solids.set(rasterized=False, edgecolor="face")
    bar.set_label(
        "mean KL divergence from FP32 in nats, that group alone changed (~ estimated)",
        color=COLOURS["ink"],
        fontsize=9,
    )
    bar.ax.tick_params(colors=COLOURS["muted"], labelcolor=COLOURS["muted"], labelsize=8)
    return figure


def _write_numbers(axes: Any, found: Table[Sensitivity], kl: np.ndarray, norm: LogNorm) -> None:
    for i, row in enumerate(found.rows):
        for j, column in enumerate(found.columns):
            entry = found.cell(row, column)
            if entry is None:
                continue
            is_dark = not np.isnan(kl[i, j]) and norm(kl[i, j]) > 0.65
            axes.text(
                j,
                i,
                cell_text(entry),
                ha="center",
                va="center",
                fontsize=8,
                fontstyle="italic" if entry.is_estimate else "normal",
                color=COLOURS["muted"] if np.isnan(kl[i, j]) else _LIGHT if is_dark else _DARK,
            )


def _dress(axes: Any, found: Table[Sensitivity]) -> None:
    axes.set_facecolor(_EMPTY)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(found.columns)), found.columns, fontsize=9)
    axes.set_yticks(range(len(found.rows)), found.rows, fontsize=8)
    axes.tick_params(length=0, labelcolor=COLOURS["ink"])
    if 0 < found.n_precisions < len(found.columns):
        axes.axvline(found.n_precisions - 0.5, color=COLOURS["grid"], linewidth=2.0)


def _save(figure: Figure, form: Literal["svg", "png"]) -> bytes:
    buffer = io.BytesIO()
    if form == "png":
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=_PIXELS_PER_INCH)
    else:
        FigureCanvasSVG(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
