"""Jobs."""

from __future__ import annotations

from collections.abc import Callable

from autotune.api_types import Job, JobTarget
from autotune.cli import figures
from autotune.cli.output import Column, Field, View
from autotune.cli.panel import model_error_text, proposers_text, time_left_text


def _progress_text(job: Job) -> str:
    return f"{job.progress.trials_finished}/{job.progress.trials_total}"


def _state(job: Job) -> str:
    return job.state if job.phase in ("", job.state) else f"{job.state}, {job.phase}"


def _reason(job: Job) -> str:
    """Why it waits, failed or was cancelled; the answer's own explanation comes further down."""
    is_said_below = job.result is not None and job.reason == job.result.explanation
    return figures.MISSING if is_said_below else job.reason or figures.MISSING


def _verdict(job: Job) -> str:
    if job.result is None:
        return figures.MISSING
    missed = job.result.missed_by_ns
    return f"{job.result.verdict}{f', missed by {figures.latency(missed)}' if missed else ''}"


def _on_each(figure: Callable[[JobTarget], float | None]) -> Callable[[Job], str]:
    """A latency of each target; with the devices' names where there are several."""

    def text(job: Job) -> str:
        shown = [(t.device_name, figures.latency(figure(t))) for t in job.targets]
        if len(shown) < 2:
            return shown[0][1] if shown else figures.MISSING
        return ", ".join(f"{latency} on {name}" for name, latency in shown)

    return text


def _on_each_device(job: Job) -> str:
    names = {target.device_id: target.device_name for target in job.targets}
    found = job.result.targets if job.result else []
    return "; ".join(f"{names[t.device_id]}: {t.explanation}" for t in found) or figures.MISSING


def _model_error(job: Job) -> str:
    error = job.progress.model_error
    return figures.MISSING if error is None else model_error_text(error)


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
    Field(name="time_left_s", value=lambda j: j.progress.time_left_s),
    Field(name="time_left_error_s", value=lambda j: j.progress.time_left_error_s),
    Field(name="device_s", value=lambda j: j.progress.device_s),
    Field(
        name="model_latency_error",
        value=lambda j: None if (e := j.progress.model_error) is None else e.latency,
    ),
    Field(name="created_at", value=lambda j: j.created_at.isoformat()),
]


JOBS: View[Job] = View(
    columns=[
        Column(title="job", text=lambda j: j.id),
        Column(title="name", text=lambda j: j.name),
        Column(title="state", text=lambda j: j.state),
        Column(title="phase", text=lambda j: j.phase),
        Column(title="trials", text=_progress_text, right=True),
        Column(
            title="front", text=lambda j: str(j.progress.front_size), right=True, secondary=True
        ),
        Column(title="device", text=lambda j: j.progress.device_name or figures.MISSING),
        Column(
            title="created (UTC)",
            text=lambda j: f"{j.created_at:%Y-%m-%d %H:%M:%S}",
            secondary=True,
        ),
        Column(title="reason", text=lambda j: j.reason or "", secondary=True),
    ],
    fields=_JOB_FIELDS,
    document=lambda job: job.model_dump(mode="json"),
    style=lambda job: {"failed": "red", "finished": "green"}.get(job.state),
)


JOB: View[Job] = View(
    columns=[
        Column(title="job", text=lambda j: j.id),
        Column(title="name", text=lambda j: j.name),
        Column(title="state", text=_state),
        Column(title="reason", text=_reason),
        Column(title="model", text=lambda j: str(j.spec.get("model", {}).get("source", ""))),
        Column(title="trials", text=_progress_text),
        Column(title="front", text=lambda j: f"{j.progress.front_size} trials"),
        Column(title="hypervolume", text=lambda j: figures.optional(j.progress.hypervolume)),
        Column(title="device", text=lambda j: j.progress.device_name or figures.MISSING),
        Column(title="latency budget", text=_on_each(lambda target: target.latency_budget_ns)),
        Column(title="FP32 latency", text=_on_each(lambda target: target.fp32_latency_ns)),
        Column(title="elapsed", text=lambda j: figures.seconds(j.progress.elapsed_s)),
        Column(title="time left", text=lambda j: time_left_text(j.progress)),
        Column(title="device time", text=lambda j: figures.seconds(j.progress.device_s)),
        Column(title="model", text=_model_error),
        Column(
            title="proposed by",
            text=lambda j: proposers_text(j.progress.proposers) or figures.MISSING,
        ),
        Column(title="verdict", text=_verdict),
        Column(title="why", text=lambda j: j.result.explanation if j.result else figures.MISSING),
        Column(title="on each device", text=_on_each_device, secondary=True),
        Column(title="notices", text=lambda j: "; ".join(j.notices) or "none"),
    ],
    fields=_JOB_FIELDS,
    document=lambda job: job.model_dump(mode="json"),
)
