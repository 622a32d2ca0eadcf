"""Records as the shapes of the API.

Owns what a user sees of a record, and the progress figures that no record holds. Ranking is
`autotune.search.front`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from autotune import api_types
from autotune.search.feasibility import limits_of
from autotune.search.front import (
    further_objectives,
    hypervolume,
    is_feasible,
    latency_of,
    non_dominated,
)
from autotune.search.portability import Cell, Row
from autotune.search.targets import View, as_searched, on_worst_target, own_view, worst_target
from autotune.service import progress
from autotune.spec import JobSpec, parse_job
from device_agents.protocol import LatencyReport, Outcome, Profile
from storage.records import (
    AccuracyReport,
    DeviceRecord,
    EventRecord,
    JobRecord,
    JobTarget,
    TrialRecord,
    TrialState,
)

if TYPE_CHECKING:
    from autotune.search.verification import VerificationOutcome

ONLINE_HEARTBEATS = 3
"""A device is online while it was seen within this many heartbeats."""


def trial_view(
    job: JobRecord, stored: TrialRecord, *, front: Collection[str] = ()
) -> api_types.Trial:
    """A trial as users see it; `front` holds the ids of the front's members.

    `job` has the budgets to hold it against. On several devices the latency is that of the
    worst: its own ns, not the share that the search compares.
    """
    worst = worst_target(job, stored) if stored.further else None
    trial = seen = on_worst_target(job, stored)
    if worst is not None:
        there = stored.on(worst.device_id)
        trial = replace(seen, latency=there.latency, confirmed_latency=there.confirmed_latency)
    compression = trial.compression or {}
    latency, confirmed, best = trial.latency, trial.confirmed_latency, latency_of(trial)
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
        latency_p90_ns=best.p90_ns if best else None,
        latency_p90_high_ns=best.p90_high_ns if best else None,
        latency_p99_ns=best.p99_ns if best else None,
        latency_p99_high_ns=best.p99_high_ns if best else None,
        peak_memory_bytes=best.peak_memory_bytes if best else None,
        energy_joules=best.energy_joules if best else None,
        fp32_ratio=_ratio(latency),
        latency_samples=latency.n_samples if latency else None,
        is_steady=latency.is_steady if latency else None,
        is_feasible=is_feasible(seen, limits_of(job)) if latency else None,
        is_on_front=trial.id in front,
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
        device_id=worst.device_id if worst else job.device_id,
        created_at=trial.created_at,
        finished_at=trial.finished_at,
        targets=[_on_target(job, stored, t) for t in job.targets] if stored.further else [],
    )


def _on_target(job: JobRecord, trial: TrialRecord, target: JobTarget) -> api_types.TrialOnTarget:
    there = trial.on(target.device_id)
    limits = replace(limits_of(job), latency_ns=target.latency_budget_ns)
    return api_types.TrialOnTarget(
        device_id=target.device_id,
        outcome=there.outcome.value if there.outcome else None,
        reason=there.reason,
        artifact_sha256=there.artifact_sha256,
        artifact_size_bytes=there.artifact_size_bytes,
        kernels=(there.compression or {}).get("kernels"),
        accuracy=_accuracy(there.accuracy),
        accuracy_drop=_drop(there.accuracy),
        latency_ns=_latency(there.latency),
        fp32_ratio=_ratio(there.latency),
        is_steady=there.latency.is_steady if there.latency else None,
        is_feasible=is_feasible(there, limits) if there.latency else None,
        latency_samples=there.latency.n_samples if there.latency else None,
        held_out_accuracy=_accuracy(there.held_out_accuracy),
        held_out_accuracy_drop=_drop(there.held_out_accuracy),
        confirmed_latency_ns=_latency(there.confirmed_latency),
        confirmed_fp32_ratio=_ratio(there.confirmed_latency),
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
    front = {t.id for t in front_of(job, trials)}
    return [trial_view(job, t, front=front) for t in trials]


def front_of(job: JobRecord, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that none other beats, fastest first; on several devices on the worst one."""
    by_id = {trial.id: trial for trial in trials}
    seen = non_dominated(as_searched(job, trials), beside=further_objectives(job.spec))
    return [by_id[trial.id] for trial in seen]


def target_views(job: JobRecord, devices: Mapping[str, DeviceRecord]) -> list[api_types.JobTarget]:
    """The job's devices; `devices` holds their records by id."""
    return [
        api_types.JobTarget(
            device_id=target.device_id,
            device_name=devices[target.device_id].name
            if target.device_id in devices
            else target.device_id,
            latency_budget_ns=target.latency_budget_ns,
            fp32_latency_ns=target.reference_latency_ns,
        )
        for target in job.targets
    ]


def portability_view(
    job: JobRecord, rows: Sequence[Row], devices: Mapping[str, DeviceRecord]
) -> api_types.Portability:
    """What each winner is on each device, as users see it."""
    return api_types.Portability(
        job_id=job.id,
        targets=target_views(job, devices),
        rows=[
            api_types.PortabilityRow(
                device_id=row.device_id,
                winner=row.winner.id,
                number=row.winner.number,
                cells=[_cell(cell) for cell in row.cells],
            )
            for row in rows
        ],
    )


def _cell(cell: Cell) -> api_types.PortabilityCell:
    latency, over = latency_of(cell.trial), cell.over_own_winner
    return api_types.PortabilityCell(
        device_id=cell.device_id,
        latency_ns=_latency(latency),
        fp32_ratio=_ratio(latency),
        over_own_winner=None if over is None else _interval(over.value, over.low, over.high),
        accuracy_drop=_drop(cell.trial.held_out_accuracy or cell.trial.accuracy),
        is_feasible=cell.is_feasible,
        is_confirmed=cell.trial.confirmed_latency is not None,
        reason=cell.reason,
    )


def job_view(
    job: JobRecord,
    trials: Sequence[TrialRecord],
    *,
    devices: Sequence[api_types.Device],
    targets: Sequence[api_types.JobTarget],
    events: Sequence[EventRecord],
    now: datetime,
) -> api_types.Job:
    """A job with its progress; `devices` are those that it measures on or waits for.

    `events` are the job's, in order: its notices and its model's errors are among them.
    """
    model = next((event for event in reversed(events) if event.kind == "model"), None)
    notices = [event for event in events if event.kind == "notice"]
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
        targets=list(targets),
        progress=_progress(job, trials, devices=devices, model=model, now=now),
        result=None if job.result is None else api_types.JobResult(**job.result),
        notices=[str(event.payload.get("message", "")) for event in notices],
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )


def device_view(device: DeviceRecord, *, heartbeat_s: float, now: datetime) -> api_types.Device:
    """A device as users see it."""
    canary = device.canary
    seen_s_ago = max((now - device.last_seen_at).total_seconds(), 0.0)
    return api_types.Device(
        id=device.id,
        name=device.name,
        pool=device.pool,
        is_online=seen_s_ago <= ONLINE_HEARTBEATS * heartbeat_s,
        last_seen_s_ago=seen_s_ago,
        fingerprint=device.description.fingerprint,
        description=device.description.model_dump(mode="json"),
        drained_because=device.drained_because,
        canary_ratio=canary and _interval(canary.ratio, canary.ratio_low, canary.ratio_high),
        canary_s_ago=None
        if device.canary_at is None
        else max((now - device.canary_at).total_seconds(), 0.0),
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
    devices: Sequence[api_types.Device],
    model: EventRecord | None,
    now: datetime,
) -> api_types.Progress:
    spec, own = _spec(job), own_view(job, trials)
    front = {t.id for t in non_dominated(own.trials, beside=further_objectives(job.spec))}
    left = progress.time_left(job, trials, spec=spec, elapsed_s=_elapsed_s(job, now))
    named = [device.name for device in devices] or [name for name in spec.targets if name]
    finished = [trial for trial in trials if trial.state is TrialState.FINISHED]
    return api_types.Progress(
        phase=job.phase,
        trials_finished=len(finished),
        trials_total=max(spec.search.trials, len(trials)),
        elapsed_s=_elapsed_s(job, now),
        time_left_s=left.estimate_s,
        time_left_error_s=left.error_s,
        device_s=sum(progress.screening_s(t) + progress.confirming_s(t) for t in trials),
        front_size=len(front),
        hypervolume=hypervolume(own.trials) if front else None,
        hypervolume_history=progress.hypervolume_history(own.trials),
        model_error=api_types.ModelError(**model.payload) if model and model.payload else None,
        proposers=progress.proposers(trials, front),
        best_trial=_best(job, trials, own, spec=spec, front=front),
        device_name=", ".join(named) or None,
        device_online=all(device.is_online for device in devices) if devices else None,
    )


def _best(
    job: JobRecord,
    trials: Sequence[TrialRecord],
    own: View,
    *,
    spec: JobSpec,
    front: Collection[str],
) -> api_types.Trial | None:
    found = own.answer(max_accuracy_drop=spec.max_accuracy_drop)
    if found is None or found.verdict == "impossible_budget":
        return None
    return trial_view(job, next(t for t in trials if t.id == found.winner.id), front=front)


def _elapsed_s(job: JobRecord, now: datetime) -> float:
    if job.started_at is None:
        return 0.0
    end = job.finished_at if job.state.is_final and job.finished_at is not None else now
    return max((end - job.started_at).total_seconds(), 0.0)


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
