"""The portability matrix: a row per winner, a column per device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autotune.api_types import Interval, JobTarget, PortabilityCell, PortabilityRow
from autotune.cli import figures
from autotune.cli.output import Column, Field, View


def portability_view(targets: Sequence[JobTarget]) -> View[PortabilityRow]:
    """The view of a job on these devices; a cell holds ms, share of FP32's, x own winner."""
    names = {target.device_id: target.device_name for target in targets}

    def device(row: PortabilityRow) -> str:
        return names.get(row.device_id, row.device_id)

    return View(
        columns=[
            Column(title="winner of", text=device),
            Column(title="trial", text=lambda row: f"#{row.number}", right=True),
            *(_column(target) for target in targets),
        ],
        fields=[
            Field(name="winner_of", value=device),
            Field(name="trial", value=lambda row: row.winner),
            Field(name="number", value=lambda row: row.number),
            *(field for target in targets for field in _fields(target)),
        ],
        document=lambda row: row.model_dump(mode="json"),
    )


def _cell(row: PortabilityRow, target: JobTarget) -> PortabilityCell:
    return next(cell for cell in row.cells if cell.device_id == target.device_id)


def _column(target: JobTarget) -> Column[PortabilityRow]:
    def text(row: PortabilityRow) -> str:
        cell = _cell(row, target)
        if cell.latency_ns is None:
            return f"{figures.MISSING} ({cell.reason})"
        parts = [
            f"{figures.milliseconds(cell.latency_ns)} ms",
            f"{figures.interval(cell.fp32_ratio)} x FP32",
        ]
        if row.device_id != cell.device_id and cell.over_own_winner is not None:
            parts.append(f"{figures.interval(cell.over_own_winner)} x own winner")
        if cell.is_feasible is False:
            parts.append("over its budget")
        if not cell.is_confirmed:
            parts.append("not confirmed")
        return ", ".join(parts)

    return Column(title=f"on {target.device_name} [95 %]", text=text, right=True)


def _fields(target: JobTarget) -> list[Field[PortabilityRow]]:
    def part(
        pick: Callable[[PortabilityCell], Interval | None], bound: str
    ) -> Callable[[PortabilityRow], float | None]:
        def value(row: PortabilityRow) -> float | None:
            figure = pick(_cell(row, target))
            return None if figure is None else float(getattr(figure, bound))

        return value

    figures_of: dict[str, Callable[[PortabilityCell], Interval | None]] = {
        "latency_ns": lambda cell: cell.latency_ns,
        "fp32_ratio": lambda cell: cell.fp32_ratio,
        "over_own_winner": lambda cell: cell.over_own_winner,
    }
    bounds = {"": "value", "_low": "low", "_high": "high"}
    return [
        Field(name=f"{target.device_name}_{name}{suffix}", value=part(pick, bound))
        for name, pick in figures_of.items()
        for suffix, bound in bounds.items()
    ]
