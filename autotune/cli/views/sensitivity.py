"""Sensitivities: a matrix for people, one entry per row for programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autotune.api_types import Sensitivity
from autotune.cli.output import Column, Field, View
from autotune.export.sensitivity_table import Table, cell_text, table

ENTRIES: View[Sensitivity] = View(
    columns=[],
    fields=[
        Field(name="group", value=lambda e: e.group),
        Field(name="precision", value=lambda e: e.precision),
        Field(name="prune_ratio", value=lambda e: e.prune_ratio),
        Field(name="mean_kl_nats", value=lambda e: e.mean_kl),
        Field(name="is_estimate", value=lambda e: e.is_estimate),
        Field(name="accuracy_drop", value=lambda e: e.accuracy_drop),
        Field(name="samples", value=lambda e: e.samples),
        Field(name="sqnr_db", value=lambda e: e.sqnr_db),
        Field(name="removed_share", value=lambda e: e.removed_share),
        Field(name="wall_s", value=lambda e: e.wall_s),
    ],
    document=lambda e: e.model_dump(mode="json"),
)


def matrix(entries: Sequence[Sensitivity]) -> tuple[View[str], tuple[str, ...]]:
    """A view of the groups with one column per choice, and the groups in order."""
    found = table(entries)
    columns: list[Column[str]] = [Column(title="group", text=lambda name: name)]
    columns += [
        Column(title=title, text=_cell(found, title), right=True) for title in found.columns
    ]
    return View(columns=columns, fields=[], document=lambda name: {"group": name}), found.rows


def legend(entries: Sequence[Sensitivity]) -> str:
    """What the figures of the matrix are, with their n."""
    measured = [e for e in entries if e.mean_kl is not None and not e.is_estimate]
    counts = sorted({e.samples for e in measured})
    samples = f"n={' or '.join(map(str, counts))} samples" if counts else "none measured yet"
    estimated = sum(e.is_estimate for e in entries)
    return (
        f"mean KL divergence from FP32 in nats with that group alone changed; {samples}; "
        f"{len(measured)} measured, {estimated} estimated (~), "
        f"{len(entries) - len(measured) - estimated} not known (-)"
    )


def _cell(found: Table[Sensitivity], title: str) -> Callable[[str], str]:
    return lambda group: cell_text(found.cell(group, title))
