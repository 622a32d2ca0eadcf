"""A front: the non-dominated trials beside the baselines, and the part each one plays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autotune.api_types import Interval, JobResult, Trial
from autotune.cli import figures
from autotune.cli.output import Column, Field, View
from autotune.cli.views.trials import TRIAL_FIELDS, group_counts, latency_text, prune_summary


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontRow:
    """A trial with the part it plays: `winner`, `answer`, `FP32`, `INT8`, `front` or several."""

    trial: Trial
    roles: tuple[str, ...] = ()


def front_view(rows: Sequence[FrontRow]) -> View[FrontRow]:
    """The columns of a front.

    All rows are shown on the same footing: confirmed latency and held-out accuracy where
    every row has them, otherwise the search's own figures, and the titles say which.
    """
    held_out = bool(rows) and all(row.trial.held_out_accuracy for row in rows)
    confirmed = bool(rows) and all(row.trial.confirmed_latency_ns for row in rows)
    samples = {
        row.trial.held_out_samples if held_out else row.trial.accuracy_samples for row in rows
    }
    n = f", n={samples.pop()}" if len(samples) == 1 and None not in samples else ""

    def accuracy(row: FrontRow) -> Interval | None:
        return row.trial.held_out_accuracy if held_out else row.trial.accuracy

    def drop(row: FrontRow) -> Interval | None:
        return row.trial.held_out_accuracy_drop if held_out else row.trial.accuracy_drop

    def p50(row: FrontRow) -> str:
        if confirmed:
            return figures.milliseconds(row.trial.confirmed_latency_ns)
        return latency_text(row.trial)

    def ratio(row: FrontRow) -> str:
        if confirmed and row.trial.confirmed_fp32_ratio is not None:
            return figures.interval(row.trial.confirmed_fp32_ratio)
        return figures.interval(row.trial.fp32_ratio)

    return View(
        columns=[
            Column(title="", text=lambda row: ", ".join(row.roles)),
            Column(title="trial", text=lambda row: f"#{row.trial.number}", right=True),
            Column(
                title=f"{'held-out' if held_out else 'search'} accuracy % [95 %{n}]",
                text=lambda row: figures.percent(accuracy(row)),
                right=True,
            ),
            Column(
                title="drop, points [95 %]", text=lambda row: figures.percent(drop(row)), right=True
            ),
            Column(title=f"{'confirmed ' if confirmed else ''}p50 ms [95 %]", text=p50, right=True),
            Column(title="x FP32 [95 %]", text=ratio, right=True),
            Column(
                title="size",
                text=lambda row: figures.size(row.trial.artifact_size_bytes),
                right=True,
            ),
            Column(title="groups", text=lambda row: group_counts(row.trial)),
            Column(title="pruned", text=lambda row: prune_summary(row.trial)),
        ],
        fields=[
            Field(name="roles", value=lambda row: " ".join(row.roles)),
            *map(_of_trial, TRIAL_FIELDS),
        ],
        document=lambda row: {"roles": list(row.roles), **row.trial.model_dump(mode="json")},
        style=lambda row: "bold green" if "winner" in row.roles or "answer" in row.roles else None,
    )


def _of_trial(field: Field[Trial]) -> Field[FrontRow]:
    return Field(name=field.name, value=lambda row: field.value(row.trial))


def front_rows(
    front: Sequence[Trial],
    trials: Sequence[Trial],
    *,
    result: JobResult | None,
    answer: Trial | None = None,
) -> list[FrontRow]:
    """The front's trials beside the FP32 and the uniform INT8 baseline, fastest first."""
    roles: dict[str, list[str]] = {trial.id: ["front"] for trial in front}
    if answer is not None:
        roles.setdefault(answer.id, []).insert(0, "answer")
    if result is not None:
        for role, trial_id in (
            ("winner", None if answer is not None else result.winner),
            ("FP32", result.fp32_trial),
            ("INT8", result.int8_trial),
        ):
            if trial_id is not None:
                roles.setdefault(trial_id, []).insert(0 if role == "winner" else 1, role)
    known = {trial.id: trial for trial in [*trials, *front, *([answer] if answer else [])]}
    rows = [
        FrontRow(trial=known[trial_id], roles=tuple(names))
        for trial_id, names in roles.items()
        if trial_id in known
    ]
    return sorted(rows, key=_speed)


def _speed(row: FrontRow) -> tuple[float, int]:
    figure = row.trial.confirmed_latency_ns or row.trial.latency_ns
    return (figure.value if figure is not None else float("inf"), row.trial.number)
