"""How each noun of the API is shown: columns for people, fields for programs.

Owns titles, units and order. Formats are `output.py`'s work, number texts `figures.py`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autotune.api_types import (
    Device,
    EnrolmentToken,
    GroupPrecision,
    Interval,
    Job,
    JobResult,
    Trial,
)
from autotune.cli import figures
from autotune.cli.output import Column, Field, View


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontRow:
    """A trial with the part it plays: `winner`, `answer`, `FP32`, `INT8`, `front` or several."""

    trial: Trial
    roles: tuple[str, ...] = ()


def group_counts(trial: Trial) -> str:
    """How many layer groups really run in which precision, most first.

    A trial whose file was never built shows its plan.
    """
    if not trial.groups:
        precisions = trial.candidate.get("precisions", {})
        planned = Counter(str(name) for name in precisions.values())
        return _counted(planned) + " planned" if planned else "all fp32"
    text = _counted(Counter(group.effective for group in trial.groups))
    differing = sum(group.planned != group.effective for group in trial.groups)
    return f"{text} ({differing} not as planned)" if differing else text


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{amount} {name}" for name, amount in counter.most_common())


def prune_summary(trial: Trial) -> str:
    """How many prunable groups lose which share of their channels."""
    counter = Counter(ratio for ratio in trial.prune_ratios.values() if ratio > 0)
    if not counter:
        return "none"
    return ", ".join(f"{amount} x {ratio:.0%}" for ratio, amount in sorted(counter.items()))


def threads(trial: Trial) -> int:
    """The runtime's threads; 1 where the candidate does not say."""
    return int(trial.candidate.get("runtime", {}).get("threads", 1))


def _latency_text(trial: Trial) -> str:
    text = figures.milliseconds(trial.latency_ns)
    return f"{text} unsteady" if trial.is_steady is False else text


def _samples(trial: Trial) -> str:
    return figures.MISSING if trial.latency_samples is None else str(trial.latency_samples)


def _outcome(trial: Trial) -> str:
    if trial.outcome is None:
        return trial.state
    return f"{trial.outcome}: {trial.reason}" if trial.reason else trial.outcome


def _bounds(name: str, pick: Any) -> list[Field[Trial]]:
    """Three fields of an interval: the figure, its lower and its upper bound."""

    def part(attribute: str) -> Any:
        def value(trial: Trial) -> float | None:
            figure: Interval | None = pick(trial)
            return None if figure is None else float(getattr(figure, attribute))

        return value

    return [
        Field(name=name, value=part("value")),
        Field(name=f"{name}_low", value=part("low")),
        Field(name=f"{name}_high", value=part("high")),
    ]


_TRIAL_FIELDS: list[Field[Trial]] = [
    Field(name="trial", value=lambda t: t.id),
    Field(name="number", value=lambda t: t.number),
    Field(name="state", value=lambda t: t.state),
    Field(name="outcome", value=lambda t: t.outcome),
    Field(name="reason", value=lambda t: t.reason),
    Field(name="proposed_by", value=lambda t: t.proposed_by),
    *_bounds("accuracy", lambda t: t.accuracy),
    *_bounds("accuracy_drop", lambda t: t.accuracy_drop),
    Field(name="accuracy_samples", value=lambda t: t.accuracy_samples),
    Field(name="mean_kl_nats", value=lambda t: t.mean_kl),
    *_bounds("latency_ns", lambda t: t.latency_ns),
    Field(name="latency_p90_ns", value=lambda t: t.latency_p90_ns),
    Field(name="latency_samples", value=lambda t: t.latency_samples),
    Field(name="is_steady", value=lambda t: t.is_steady),
    *_bounds("fp32_ratio", lambda t: t.fp32_ratio),
    Field(name="is_feasible", value=lambda t: t.is_feasible),
    Field(name="is_on_front", value=lambda t: t.is_on_front),
    *_bounds("held_out_accuracy", lambda t: t.held_out_accuracy),
    *_bounds("held_out_accuracy_drop", lambda t: t.held_out_accuracy_drop),
    Field(name="held_out_samples", value=lambda t: t.held_out_samples),
    *_bounds("confirmed_latency_ns", lambda t: t.confirmed_latency_ns),
    *_bounds("confirmed_fp32_ratio", lambda t: t.confirmed_fp32_ratio),
    Field(name="size_bytes", value=lambda t: t.artifact_size_bytes),
    Field(name="groups", value=group_counts),
    Field(name="pruning", value=prune_summary),
    Field(name="threads", value=threads),
    Field(name="candidate_digest", value=lambda t: t.candidate_digest),
    Field(name="artifact_sha256", value=lambda t: t.artifact_sha256),
]

TRIALS: View[Trial] = View(
    columns=[
        Column(title="trial", text=lambda t: f"#{t.number}", right=True),
        Column(title="outcome", text=_outcome),
        Column(title="accuracy % [95 %]", text=lambda t: figures.percent(t.accuracy), right=True),
        Column(title="p50 ms [95 %]", text=_latency_text, right=True),
        Column(title="n", text=_samples, right=True),
        Column(title="x FP32", text=lambda t: figures.interval(t.fp32_ratio), right=True),
        Column(title="size", text=lambda t: figures.size(t.artifact_size_bytes), right=True),
        Column(title="groups", text=group_counts),
        Column(title="pruned", text=prune_summary),
        Column(title="by", text=lambda t: t.proposed_by),
        Column(title="front", text=lambda t: "yes" if t.is_on_front else ""),
    ],
    fields=_TRIAL_FIELDS,
    document=lambda trial: trial.model_dump(mode="json"),
    style=lambda trial: "bold" if trial.is_on_front else None,
)

TRIAL: View[Trial] = View(
    columns=[
        Column(title="trial", text=lambda t: f"#{t.number}  {t.id}"),
        Column(title="outcome", text=_outcome),
        Column(title="proposed by", text=lambda t: t.proposed_by),
        Column(
            title="accuracy, search data",
            text=lambda t: f"{figures.percent(t.accuracy)} %, n={t.accuracy_samples}",
        ),
        Column(title="drop from FP32, points", text=lambda t: figures.percent(t.accuracy_drop)),
        Column(
            title="accuracy, held-out data",
            text=lambda t: f"{figures.percent(t.held_out_accuracy)} %, n={t.held_out_samples}",
        ),
        Column(title="mean KL from FP32, nats", text=lambda t: _plain(t.mean_kl)),
        Column(title="latency p50", text=lambda t: f"{_latency_text(t)} ms, n={_samples(t)}"),
        Column(title="latency p90", text=lambda t: figures.latency(t.latency_p90_ns)),
        Column(
            title="confirmed in a fresh process",
            text=lambda t: f"{figures.milliseconds(t.confirmed_latency_ns)} ms",
        ),
        Column(title="ratio to FP32", text=lambda t: figures.interval(t.fp32_ratio)),
        Column(title="inside the budget", text=lambda t: _claim(t.is_feasible)),
        Column(title="on the front", text=lambda t: _claim(t.is_on_front)),
        Column(title="size", text=lambda t: figures.size(t.artifact_size_bytes)),
        Column(title="threads", text=lambda t: str(threads(t))),
        Column(title="groups", text=group_counts),
        Column(title="pruned", text=prune_summary),
        Column(title="recovery training", text=lambda t: figures.seconds(t.recovery_s)),
        Column(title="artifact sha256", text=lambda t: t.artifact_sha256 or figures.MISSING),
        Column(title="candidate digest", text=lambda t: t.candidate_digest),
    ],
    fields=_TRIAL_FIELDS,
    document=lambda trial: trial.model_dump(mode="json"),
)


def _plain(value: float | None) -> str:
    return figures.MISSING if value is None else figures.number(value)


def _claim(value: bool | None) -> str:
    return {None: figures.MISSING, True: "yes", False: "no"}[value]


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
        return _latency_text(row.trial)

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
            *(
                Field(name=field.name, value=lambda row, value=field.value: value(row.trial))
                for field in _TRIAL_FIELDS
            ),
        ],
        document=lambda row: {"roles": list(row.roles), **row.trial.model_dump(mode="json")},
        style=lambda row: "bold green" if "winner" in row.roles or "answer" in row.roles else None,
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


def _progress_text(job: Job) -> str:
    return f"{job.progress.trials_finished}/{job.progress.trials_total}"


_JOB_FIELDS: list[Field[Job]] = [
    Field(name="job", value=lambda j: j.id),
    Field(name="name", value=lambda j: j.name),
    Field(name="state", value=lambda j: j.state),
    Field(name="phase", value=lambda j: j.phase),
    Field(name="reason", value=lambda j: j.reason),
    Field(name="trials_finished", value=lambda j: j.progress.trials_finished),
    Field(name="trials_total", value=lambda j: j.progress.trials_total),
    Field(name="front_size", value=lambda j: j.progress.front_size),
    Field(name="hypervolume", value=lambda j: j.progress.hypervolume),
    Field(name="device", value=lambda j: j.progress.device_name),
    Field(name="latency_budget_ns", value=lambda j: j.latency_budget_ns),
    Field(name="fp32_latency_ns", value=lambda j: j.fp32_latency_ns),
    Field(name="winner", value=lambda j: j.result.winner if j.result else None),
    Field(name="verdict", value=lambda j: j.result.verdict if j.result else None),
    Field(name="elapsed_s", value=lambda j: j.progress.elapsed_s),
    Field(name="created_at", value=lambda j: j.created_at.isoformat()),
]

JOBS: View[Job] = View(
    columns=[
        Column(title="job", text=lambda j: j.id),
        Column(title="name", text=lambda j: j.name),
        Column(title="state", text=lambda j: j.state),
        Column(title="phase", text=lambda j: j.phase),
        Column(title="trials", text=_progress_text, right=True),
        Column(title="front", text=lambda j: str(j.progress.front_size), right=True),
        Column(title="device", text=lambda j: j.progress.device_name or figures.MISSING),
        Column(title="created (UTC)", text=lambda j: f"{j.created_at:%Y-%m-%d %H:%M:%S}"),
        Column(title="reason", text=lambda j: j.reason or ""),
    ],
    fields=_JOB_FIELDS,
    document=lambda job: job.model_dump(mode="json"),
    style=lambda job: {"failed": "red", "finished": "green"}.get(job.state),
)


def _verdict(job: Job) -> str:
    if job.result is None:
        return figures.MISSING
    missed = job.result.missed_by_ns
    return f"{job.result.verdict}{f', missed by {figures.latency(missed)}' if missed else ''}"


JOB: View[Job] = View(
    columns=[
        Column(title="job", text=lambda j: j.id),
        Column(title="name", text=lambda j: j.name),
        Column(title="state", text=lambda j: f"{j.state}, {j.phase}" if j.phase else j.state),
        Column(title="reason", text=lambda j: j.reason or figures.MISSING),
        Column(title="model", text=lambda j: str(j.spec.get("model", {}).get("source", ""))),
        Column(title="trials", text=_progress_text),
        Column(title="front", text=lambda j: f"{j.progress.front_size} trials"),
        Column(title="hypervolume", text=lambda j: _plain(j.progress.hypervolume)),
        Column(title="device", text=lambda j: j.progress.device_name or figures.MISSING),
        Column(title="latency budget", text=lambda j: figures.latency(j.latency_budget_ns)),
        Column(title="FP32 latency", text=lambda j: figures.latency(j.fp32_latency_ns)),
        Column(title="elapsed", text=lambda j: figures.seconds(j.progress.elapsed_s)),
        Column(title="time left", text=lambda j: figures.seconds(j.progress.time_left_s)),
        Column(title="verdict", text=_verdict),
        Column(title="why", text=lambda j: j.result.explanation if j.result else figures.MISSING),
        Column(title="notices", text=lambda j: "; ".join(j.notices) or "none"),
    ],
    fields=_JOB_FIELDS,
    document=lambda job: job.model_dump(mode="json"),
)

_DEVICE_FIELDS: list[Field[Device]] = [
    Field(name="device", value=lambda d: d.id),
    Field(name="name", value=lambda d: d.name),
    Field(name="pool", value=lambda d: d.pool),
    Field(name="is_online", value=lambda d: d.is_online),
    Field(name="last_seen_s_ago", value=lambda d: d.last_seen_s_ago),
    Field(name="architecture", value=lambda d: d.description.get("architecture")),
    Field(name="cpu_model", value=lambda d: d.description.get("cpu_model")),
    Field(name="logical_cpus", value=lambda d: d.description.get("logical_cpus")),
    Field(name="memory_bytes", value=lambda d: d.description.get("memory_bytes")),
    Field(name="fingerprint", value=lambda d: d.fingerprint),
]


def _runtimes(device: Device) -> str:
    builds = device.description.get("runtimes", [])
    return ", ".join(f"{build.get('name')} {build.get('version')}" for build in builds)


def _told(key: str) -> Any:
    def text(device: Device) -> str:
        value = device.description.get(key)
        if isinstance(value, list | tuple):
            return ", ".join(map(str, value)) or figures.MISSING
        return figures.MISSING if value is None else str(value)

    return text


def _presence(device: Device) -> str:
    return (
        "online" if device.is_online else f"offline for {figures.seconds(device.last_seen_s_ago)}"
    )


DEVICES: View[Device] = View(
    columns=[
        Column(title="device", text=lambda d: d.id),
        Column(title="name", text=lambda d: d.name),
        Column(title="pool", text=lambda d: d.pool or figures.MISSING),
        Column(title="presence", text=_presence),
        Column(title="architecture", text=_told("architecture")),
        Column(title="CPU", text=_told("cpu_model")),
        Column(title="runtimes", text=_runtimes),
    ],
    fields=_DEVICE_FIELDS,
    document=lambda device: device.model_dump(mode="json"),
    style=lambda device: None if device.is_online else "dim",
)

DEVICE: View[Device] = View(
    columns=[
        *DEVICES.columns[:4],
        Column(title="architecture", text=_told("architecture")),
        Column(title="CPU", text=_told("cpu_model")),
        Column(title="CPU flags", text=_told("cpu_flags")),
        Column(title="logical CPUs", text=_told("logical_cpus")),
        Column(title="memory", text=lambda d: figures.size(d.description.get("memory_bytes"))),
        Column(title="operating system", text=_told("operating_system")),
        Column(title="kernel", text=_told("kernel")),
        Column(title="python", text=_told("python")),
        Column(title="agent", text=_told("agent_version")),
        Column(title="runtimes", text=_runtimes),
        Column(title="fingerprint", text=lambda d: d.fingerprint),
    ],
    fields=_DEVICE_FIELDS,
    document=lambda device: device.model_dump(mode="json"),
)

GROUPS: View[GroupPrecision] = View(
    columns=[
        Column(title="layer group", text=lambda g: g.group),
        Column(title="planned", text=lambda g: g.planned),
        Column(title="effective", text=lambda g: g.effective),
        Column(title="why they differ", text=lambda g: g.reason or ""),
    ],
    fields=[
        Field(name="group", value=lambda g: g.group),
        Field(name="planned", value=lambda g: g.planned),
        Field(name="effective", value=lambda g: g.effective),
        Field(name="reason", value=lambda g: g.reason),
    ],
    document=lambda group: group.model_dump(mode="json"),
    style=lambda group: "yellow" if group.planned != group.effective else None,
)

PRUNING: View[tuple[str, float]] = View(
    columns=[
        Column(title="prunable group", text=lambda entry: entry[0]),
        Column(title="channels removed", text=lambda entry: f"{entry[1]:.0%}", right=True),
    ],
    fields=[
        Field(name="group", value=lambda entry: entry[0]),
        Field(name="prune_ratio", value=lambda entry: entry[1]),
    ],
    document=lambda entry: {"group": entry[0], "prune_ratio": entry[1]},
)

ENROLMENTS: View[tuple[str, EnrolmentToken]] = View(
    columns=[Column(title="command", text=lambda row: row[0])],
    fields=[
        Field(name="command", value=lambda row: row[0]),
        Field(name="token", value=lambda row: row[1].token),
        Field(name="expires_in_s", value=lambda row: row[1].expires_in_s),
    ],
    document=lambda row: {"command": row[0], **row[1].model_dump(mode="json")},
)
