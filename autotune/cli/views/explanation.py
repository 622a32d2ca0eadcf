"""An explanation: the groups' choices as rows, the rest as lines for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autotune.api_explanation import Choice, Estimate, Explanation, GroupExplanation
from autotune.cli import figures
from autotune.cli.output import Column, Field, Scalar, View


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRow:
    """One choice of a group."""

    group: GroupExplanation
    choice: Choice


def choice_rows(groups: Sequence[GroupExplanation], *, with_fp32: bool) -> list[ChoiceRow]:
    """Each group's own choice, then the others; FP32, which is nothing by definition, on demand."""
    return [
        ChoiceRow(group=group, choice=choice)
        for group in groups
        for choice in sorted(group.choices, key=lambda choice: not choice.is_chosen)
        if with_fp32 or choice.is_chosen or choice.precision != "fp32"
    ]


def with_error(figure: Estimate, *, scale: float = 1.0) -> str:
    """`value ± half width` of the 95 % interval, both times `scale`."""
    half = (figure.high - figure.low) / 2 * abs(scale)
    # A choice against itself has no error.
    if half <= 0:
        return "0"
    value = figures.number(figure.value * scale, spread=half)
    return (
        f"{value.lstrip('-') if float(value) == 0 else value} ± {figures.number(half, spread=half)}"
    )


def _of_chosen(text: Callable[[GroupExplanation], str]) -> Callable[[ChoiceRow], str]:
    return lambda row: text(row.group) if row.choice.is_chosen else ""


def _runs_as(group: GroupExplanation) -> str:
    unknown = figures.MISSING if group.effective_reason is None else "unknown"
    return group.effective or unknown


def _kl(row: ChoiceRow) -> str:
    if row.choice.kl_nats is None:
        return figures.MISSING
    return f"{'~' if row.choice.is_kl_estimate else ''}{row.choice.kl_nats:.1e}"


def _bounds(name: str, figure: Callable[[ChoiceRow], Estimate | None]) -> list[Field[ChoiceRow]]:
    def part(of: str) -> Callable[[ChoiceRow], Scalar]:
        def value(row: ChoiceRow) -> Scalar:
            found = figure(row)
            return None if found is None else getattr(found, of)

        return value

    return [
        Field(name=name, value=part("value")),
        Field(name=f"{name}_low", value=part("low")),
        Field(name=f"{name}_high", value=part("high")),
        Field(name=f"{name}_measured_share", value=part("measured_share")),
    ]


CHOICES: View[ChoiceRow] = View(
    columns=[
        Column(title="group", text=_of_chosen(lambda group: group.group)),
        Column(
            title="choice",
            text=lambda row: (
                row.choice.precision if row.choice.is_chosen else f"or {row.choice.precision}"
            ),
        ),
        Column(title="runs as", text=_of_chosen(_runs_as), secondary=True),
        Column(
            title="saves ms [95 %]",
            text=lambda row: with_error(row.choice.saved_ns, scale=1e-6),
            right=True,
        ),
        Column(
            title="boundaries ms",
            text=_of_chosen(lambda group: with_error(group.boundary_ns, scale=1e-6)),
            right=True,
            secondary=True,
        ),
        Column(
            title="loses points",
            text=lambda row: with_error(row.choice.lost, scale=100),
            right=True,
        ),
        Column(title="KL nats", text=_kl, right=True, secondary=True),
        Column(
            title="told",
            text=lambda row: f"{row.choice.saved_ns.measured_share:.0%}",
            right=True,
        ),
        Column(title="why", text=_of_chosen(lambda group: group.why)),
    ],
    fields=[
        Field(name="group", value=lambda row: row.group.group),
        Field(name="precision", value=lambda row: row.choice.precision),
        Field(name="is_chosen", value=lambda row: row.choice.is_chosen),
        Field(name="effective", value=lambda row: row.group.effective),
        *_bounds("saved_ns", lambda row: row.choice.saved_ns),
        *_bounds("lost", lambda row: row.choice.lost),
        *_bounds(
            "boundary_ns", lambda row: row.group.boundary_ns if row.choice.is_chosen else None
        ),
        Field(name="kl_nats", value=lambda row: row.choice.kl_nats),
        Field(name="is_kl_estimate", value=lambda row: row.choice.is_kl_estimate),
        Field(name="n_trials", value=lambda row: row.choice.n_trials),
        Field(name="why", value=lambda row: row.group.why if row.choice.is_chosen else None),
    ],
    document=lambda row: {
        "group": row.group.group,
        **row.choice.model_dump(mode="json"),
        "why": row.group.why if row.choice.is_chosen else None,
    },
    style=lambda row: None if row.choice.is_chosen else "dim",
)
"""Savings are against FP32 for the group while the others stay as they are in the trial."""


def trial_lines(found: Explanation) -> list[str]:
    """What the trial is as a whole: measured, and as the model has it."""
    measured = (
        f"measured {figures.milliseconds(found.measured_latency_ns)} ms"
        if found.measured_latency_ns
        else "not measured"
    )
    drop = (
        f"measured {figures.percent(found.measured_drop)}"
        if found.measured_drop
        else "not measured"
    )
    lines = [
        f"trial #{found.number}: latency {measured}, predicted "
        f"{with_error(found.latency_ns, scale=1e-6)} ms; FP32 takes "
        f"{figures.latency(found.fp32_latency_ns)}",
        f"points lost: {drop}, predicted {with_error(found.drop, scale=100)}",
    ]
    lines += [
        f"{part.part} ({part.chosen}): saves {with_error(part.saved_ns, scale=1e-6)} ms, loses "
        f"{with_error(part.lost, scale=100)} points; {part.saved_ns.measured_share:.0%} told"
        for part in found.parts
    ]
    return [*lines, ""]


def model_lines(found: Explanation) -> list[str]:
    """What the figures rest on, and why INT8 is slow where it is."""
    lines = ["", f"the model: {found.basis}"]
    error = found.model_error
    if error is None:
        lines.append("its error is not known: too few trials to leave one out")
    else:
        lines.append(
            f"its error, each of {error.n} trials predicted from the others: {error.latency:.1%} "
            f"of the latency ({error.latency_covered:.0%} inside their 95 % interval), "
            f"{100 * error.drop:.2f} points"
        )
    lines.append("told: the share of a saving's variance that the trials took away; 0 % is a guess")
    return [*lines, found.int8] if found.int8 else lines
