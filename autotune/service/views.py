"""Records as the shapes of the API.

Owns what a user sees of a record, and the progress figures that no record holds. Ranking is
`autotune.search.front`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from autotune import api_types
from autotune.search.front import (
    answer,
    counts_size,
    hypervolume,
    is_feasible,
    non_dominated,
)
from autotune.spec import JobSpec, parse_job
from device_agents.protocol import LatencyReport, Outcome, Profile
from storage.records import (
    AccuracyReport,
    DeviceRecord,
    EventRecord,
    JobRecord,
    TrialRecord,
    TrialState,
)

if TYPE_CHECKING:
    from autotune.search.verification import VerificationOutcome

ONLINE_HEARTBEATS = 3
"""A device is online while it was seen within this many heartbeats."""

_PACE_TRIALS = 8
"""The pace is that of the last trials: baselines and warm-up say little about the rest."""


def trial_view(
    trial: TrialRecord, *, budget_ns: float | None, front: Iterable[str] = ()
) -> api_types.Trial:
    """A trial as users see it; `front` holds the ids of the front's members."""
    compression = trial.compression or {}
    latency, confirmed = trial.latency, trial.confirmed_latency
    profile = next((r.profile for r in (confirmed, latency) if r and r.profile), None)
    kernel_ns = profile.group_ns() if profile else {}
    return api_types.Trial(
        id=trial.id,
        job_id=trial.job_id,
        number=trial.number,
        state=trial.state.value,
        outcome=trial.outcome.value if trial.outcome else None,
        reason=trial.reason,
        proposed_by=trial.proposed_by,
        candidate=trial.candidate.to_json(),
        candidate_digest=trial.candidate.digest,
        artifact_sha256=trial.artifact_sha256,
        artifact_size_bytes=trial.artifact_size_bytes,
        accuracy=_accuracy(trial.accuracy),
        accuracy_drop=_drop(trial.accuracy),
        mean_kl=trial.accuracy.mean_kl if trial.accuracy else None,
        accuracy_samples=trial.accuracy.n_samples if trial.accuracy else None,
        accuracy_stopped_early=trial.accuracy.stopped_early if trial.accuracy else None,
        latency_ns=_latency(latency),
        latency_p90_ns=latency.p90_ns if latency else None,
        fp32_ratio=_ratio(latency),
        latency_samples=latency.n_samples if latency else None,
        is_steady=latency.is_steady if latency else None,
        is_feasible=is_feasible(trial, budget_ns) if latency else None,
        is_on_front=trial.id in set(front),
        held_out_accuracy=_accuracy(trial.held_out_accuracy),
        held_out_accuracy_drop=_drop(trial.held_out_accuracy),
        held_out_samples=trial.held_out_accuracy.n_samples if trial.held_out_accuracy else None,
        confirmed_latency_ns=_latency(confirmed),
        confirmed_fp32_ratio=_ratio(confirmed),
        confirmed_latency_samples=confirmed.n_samples if confirmed else None,
        groups=[
            api_types.GroupPrecision(**group, kernel_ns=kernel_ns.get(group["group"]))
            for group in compression.get("groups", ())
        ],
        profile=_profile(profile),
        prune_ratios=dict(trial.candidate.prune_ratios),
        recovery_s=(compression.get("base") or {}).get("recovery_s"),
        pruned_base=_pruned_base(compression.get("base") or {}),
    )


def _profile(profile: Profile | None) -> api_types.TrialProfile | None:
    """A profile without the kernels, whose sums stand with the groups."""
    if profile is None:
        return None
    return api_types.TrialProfile(
        inference_ns=profile.inference_ns,
        n_runs=profile.n_runs,
        other_ns=profile.other_ns(),
        missing=profile.missing,
    )


def _pruned_base(base: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is to be said of a base beside its digest and size; None where it is the source."""
    if not base.get("pruning"):
        return None
    return {key: base.get(key) for key in ("pruning", "recovery", "note", "macs", "parameters")}


def trial_views(job: JobRecord, trials: Sequence[TrialRecord]) -> list[api_types.Trial]:
    """All trials of a job, by number."""
    front = {trial.id for trial in non_dominated(trials, by_size=counts_size(job.spec))}
    return [trial_view(t, budget_ns=job.latency_budget_ns, front=front) for t in trials]


def job_view(
    job: JobRecord,
    trials: Sequence[TrialRecord],
    *,
    device: api_types.Device | None,
    notices: Sequence[EventRecord],
    now: datetime,
) -> api_types.Job:
    """A job with its progress."""
    return api_types.Job(
        id=job.id,
        name=job.name,
        state=job.state.value,
        phase=job.phase,
        reason=job.reason,
        spec=dict(job.spec),
        device_id=job.device_id,
        latency_budget_ns=job.latency_budget_ns,
        fp32_latency_ns=job.reference_latency_ns,
        progress=_progress(job, trials, device=device, now=now),
        result=None if job.result is None else api_types.JobResult(**job.result),
        notices=[str(event.payload.get("message", "")) for event in notices],
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )


def device_view(device: DeviceRecord, *, heartbeat_s: float, now: datetime) -> api_types.Device:
    """A device as users see it."""
    seen_s_ago = max((now - device.last_seen_at).total_seconds(), 0.0)
    return api_types.Device(
        id=device.id,
        name=device.name,
        pool=device.pool,
        is_online=seen_s_ago <= ONLINE_HEARTBEATS * heartbeat_s,
        last_seen_s_ago=seen_s_ago,
        fingerprint=device.description.fingerprint,
        description=device.description.model_dump(mode="json"),
    )


def event_view(event: EventRecord) -> api_types.Event:
    """An event as users see it."""
    return api_types.Event(
        id=event.id,
        job_id=event.job_id,
        kind=event.kind,
        payload=dict(event.payload),
        created_at=event.created_at,
    )


def verification_view(found: VerificationOutcome) -> api_types.Verification:
    """A second look at a bundle's model, as users see it."""
    measurement = found.measurement
    report = measurement.report
    return api_types.Verification(
        artifact_sha256=found.artifact_sha256,
        device_name=found.device.name,
        outcome=(measurement.outcome or Outcome.LOST).value,
        reason=measurement.reason,
        latency_ns=_latency(report),
        fp32_ratio=_ratio(report),
        latency_samples=report.n_samples if report else None,
        held_out_accuracy=_accuracy(found.held_out),
        held_out_accuracy_drop=_drop(found.held_out),
        held_out_samples=found.held_out.n_samples,
    )


def max_accuracy_drop(job: JobRecord) -> float | None:
    """The largest accuracy drop that the job accepts, as a fraction."""
    return _spec(job).max_accuracy_drop


def _progress(
    job: JobRecord,
    trials: Sequence[TrialRecord],
    *,
    device: api_types.Device | None,
    now: datetime,
) -> api_types.Progress:
    spec = _spec(job)
    front = non_dominated(trials, by_size=counts_size(job.spec))
    finished = [trial for trial in trials if trial.state is TrialState.FINISHED]
    return api_types.Progress(
        phase=job.phase,
        trials_finished=len(finished),
        trials_total=max(spec.search.trials, len(trials)),
        elapsed_s=_elapsed_s(job, now),
        time_left_s=_time_left_s(job, finished, spec=spec, now=now),
        front_size=len(front),
        hypervolume=hypervolume(trials) if front else None,
        best_trial=_best(job, trials, spec=spec, front=[trial.id for trial in front]),
        device_name=device.name if device else spec.device,
        device_online=device.is_online if device else None,
    )


def _best(
    job: JobRecord, trials: Sequence[TrialRecord], *, spec: JobSpec, front: Sequence[str]
) -> api_types.Trial | None:
    found = answer(
        trials,
        latency_budget_ns=job.latency_budget_ns,
        max_accuracy_drop=spec.max_accuracy_drop,
    )
    if found is None or found.verdict == "impossible_budget":
        return None
    return trial_view(found.winner, budget_ns=job.latency_budget_ns, front=front)


def _elapsed_s(job: JobRecord, now: datetime) -> float:
    if job.started_at is None:
        return 0.0
    end = job.finished_at if job.state.is_final and job.finished_at is not None else now
    return max((end - job.started_at).total_seconds(), 0.0)


def _time_left_s(
    job: JobRecord, finished: Sequence[TrialRecord], *, spec: JobSpec, now: datetime
) -> float | None:
    """From the pace of the last trials, at most what the time budget leaves; None if unknown."""
    if job.state.is_final:
        return 0.0
    limit = None
    if spec.search.time_s is not None and job.started_at is not None:
        limit = max(spec.search.time_s - _elapsed_s(job, now), 0.0)
    pace = _pace_s(finished)
    if pace is None:
        return limit
    left = max(spec.search.trials - len(finished), 0) * pace
    return left if limit is None else min(left, limit)


def _pace_s(finished: Sequence[TrialRecord]) -> float | None:
    """Seconds per trial over the last ones; None before there are three."""
    ends = sorted(trial.finished_at for trial in finished if trial.finished_at is not None)
    ends = ends[-_PACE_TRIALS:]
    if len(ends) < 3:
        return None
    return (ends[-1] - ends[0]).total_seconds() / (len(ends) - 1)


def _spec(job: JobRecord) -> JobSpec:
    return parse_job(job.spec)


def _interval(value: float, low: float, high: float) -> api_types.Interval:
    return api_types.Interval(value=value, low=low, high=high)


def _accuracy(report: AccuracyReport | None) -> api_types.Interval | None:
    return None if report is None else _interval(report.value, report.value_low, report.value_high)


def _drop(report: AccuracyReport | None) -> api_types.Interval | None:
    return None if report is None else _interval(report.drop, report.drop_low, report.drop_high)


def _latency(report: LatencyReport | None) -> api_types.Interval | None:
    return (
        None if report is None else _interval(report.p50_ns, report.p50_low_ns, report.p50_high_ns)
    )


def _ratio(report: LatencyReport | None) -> api_types.Interval | None:
    return None if report is None else _interval(report.ratio, report.ratio_low, report.ratio_high)
