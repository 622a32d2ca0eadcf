"""A front: the non-dominated trials beside the baselines, and the part each one plays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autotune.api_types import Interval, JobResult, JobTarget, Trial
from autotune.cli import figures
from autotune.cli.output import Column, Field, View
from autotune.cli.views.trials import TRIAL_FIELDS, group_counts, latency_text, prune_summary


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontRow:
    """A trial with the part it plays: `winner`, `answer`, `FP32`, `INT8`, `front` or several."""

    trial: Trial
    roles: tuple[str, ...] = ()


def _accuracy(row: FrontRow) -> Interval | None:
    return row.trial.held_out_accuracy or row.trial.accuracy


def _accuracy_samples(row: FrontRow) -> str:
    trial = row.trial
    n = trial.held_out_samples if trial.held_out_accuracy else trial.accuracy_samples
    return figures.MISSING if n is None else str(n)


def _drop(row: FrontRow) -> Interval | None:
    return row.trial.held_out_accuracy_drop or row.trial.accuracy_drop


def _p50(row: FrontRow) -> str:
    if row.trial.confirmed_latency_ns is not None:
        return figures.milliseconds(row.trial.confirmed_latency_ns)
    return latency_text(row.trial)


def _latency_samples(row: FrontRow) -> str:
    trial = row.trial
    confirmed = trial.confirmed_latency_ns is not None
    n = trial.confirmed_latency_samples if confirmed else trial.latency_samples
    return figures.MISSING if n is None else str(n)


def _basis(row: FrontRow) -> str:
    """Which figures the row shows: those of a confirmed trial, or the search's own."""
    return "confirmed" if row.trial.confirmed_latency_ns is not None else "search"


def _of_trial(field: Field[Trial]) -> Field[FrontRow]:
    return Field(name=field.name, value=lambda row: field.value(row.trial))


FRONT: View[FrontRow] = View(
    columns=[
        Column(title="", text=lambda row: ", ".join(row.roles)),
        Column(title="trial", text=lambda row: f"#{row.trial.number}", right=True),
        Column(title="figures", text=_basis, secondary=True),
        Column(
            title="accuracy % [95 %]",
            text=lambda row: figures.percent(_accuracy(row)),
            right=True,
        ),
        Column(
            title="lost points [95 %]",
            text=lambda row: figures.percent(_drop(row)),
            right=True,
            secondary=True,
        ),
        Column(title="samples", text=_accuracy_samples, right=True, secondary=True),
        Column(title="p50 ms [95 %]", text=_p50, right=True),
        Column(
            title="x FP32 [95 %]",
            text=lambda row: figures.interval(
                row.trial.confirmed_fp32_ratio or row.trial.fp32_ratio
            ),
            right=True,
        ),
        Column(title="runs", text=_latency_samples, right=True, secondary=True),
        Column(
            title="size",
            text=lambda row: figures.size(row.trial.artifact_size_bytes),
            right=True,
            secondary=True,
        ),
        Column(title="groups", text=lambda row: group_counts(row.trial)),
        Column(title="pruned", text=lambda row: prune_summary(row.trial), secondary=True),
    ],
    fields=[
        Field(name="roles", value=lambda row: " ".join(row.roles)),
        *map(_of_trial, TRIAL_FIELDS),
    ],
    document=lambda row: {"roles": list(row.roles), **row.trial.model_dump(mode="json")},
    style=lambda row: "bold green" if {"winner", "answer"} & set(row.roles) else None,
)
"""Confirmed latency and held-out accuracy where there are some, else the search's own: the
same rule as in the bundle and the report."""


def on_devices(view: View[FrontRow], targets: Sequence[JobTarget]) -> View[FrontRow]:
    """The view with the device that each trial's latency is about, in a job on several."""
    if len(targets) < 2:
        return view
    names = {target.device_id: target.device_name for target in targets}

    def device(row: FrontRow) -> str:
        return names.get(row.trial.device_id or "", figures.MISSING)

    place = next(i for i, column in enumerate(view.columns) if column.title.startswith("p50"))
    columns = list(view.columns)
    columns.insert(place, Column(title="worst on", text=device))
    return replace(
        view, columns=columns, fields=[*view.fields, Field(name="worst_device", value=device)]
    )


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
