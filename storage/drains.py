"""Drained devices, canaries, and results that are not trusted any more, as rows.

Owns what a drain takes with it: the device's leases go back to the queue, and what it measured
since it was last known to be in line is opened again, to be measured elsewhere; so is what was
measured on a device that has another runtime by now, to be measured again there. When to drain
is decided above: `autotune/search/canary.py` compares the members of a pool, the service's
`identities.py` watches for copies.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from device_agents.protocol import LatencyReport, Outcome
from storage import quarantine
from storage.records import (
    CanaryRecord,
    DeviceRecord,
    DrainCause,
    JobState,
    MeasurementState,
    TargetFigures,
    TrialOutcome,
    TrialState,
)
from storage.rows import locked_by_id, to_record
from storage.tables import DeviceRow, JobRow, MeasurementRow, TrialRow

_FINAL = tuple(state for state in JobState if state.is_final)


def drain(
    session: Session,
    device_id: str,
    *,
    cause: DrainCause,
    because: str,
    distrust_since: datetime,
) -> DeviceRecord:
    """No more work for the device, and what it did since then is to be done again.

    One that is drained for its identity stays so: a canary says nothing about that.
    """
    row = locked_by_id(session, DeviceRow, "device", device_id)
    if row.drained_by is not DrainCause.IDENTITY:
        row.drained_by, row.drained_because = cause, because
    end_leases(session, device_id, f"device {row.name} was drained")
    distrust(session, device_id, since=distrust_since, because=because)
    return to_record(DeviceRecord, row)


def resume(session: Session, device_id: str) -> DeviceRecord:
    """The device gets work again."""
    row = locked_by_id(session, DeviceRow, "device", device_id)
    row.drained_by = row.drained_because = None
    return to_record(DeviceRecord, row)


def record_canary(
    session: Session, device_id: str, canary: CanaryRecord, *, passed: bool, now: datetime
) -> DeviceRecord:
    """How the device compared with its pool; passing ends a drain that a canary began."""
    row = locked_by_id(session, DeviceRow, "device", device_id)
    row.canary, row.canary_at = canary, now
    if passed:
        row.canary_passed_at = now
        if row.drained_by is DrainCause.CANARY:
            row.drained_by = row.drained_because = None
    return to_record(DeviceRecord, row)


def end_leases(session: Session, device_id: str, why: str) -> None:
    """What the device is at goes back to the queue, as if it had never been leased."""
    held = select(MeasurementRow).where(
        MeasurementRow.device_id == device_id, MeasurementRow.state == MeasurementState.LEASED
    )
    for row in session.scalars(held.with_for_update(key_share=True)):
        row.state = MeasurementState.QUEUED
        row.attempts -= 1
        row.reason = why
        row.lease_id = row.leased_by = row.lease_expires_at = None


def distrust(session: Session, device_id: str, *, since: datetime, because: str) -> None:
    """Open again what the device's results since then made of unfinished jobs' trials.

    Its crashes since then are forgotten: they may be the device's and not the artifacts'. What
    is in quarantine no longer without them is tried again, too.
    """
    rows = session.scalars(
        select(MeasurementRow)
        .join(JobRow, JobRow.id == MeasurementRow.job_id)
        .where(
            MeasurementRow.device_id == device_id,
            MeasurementRow.state == MeasurementState.DONE,
            MeasurementRow.finished_at >= since,
            MeasurementRow.distrusted_because.is_(None),
            MeasurementRow.is_canary.is_(False),
            JobRow.state.not_in(_FINAL),
        )
        .order_by(MeasurementRow.serial)
        .with_for_update(key_share=True, of=MeasurementRow)
    ).all()
    for row in rows:
        _doubt(session, row, because)
    ended = quarantine.forget(session, device_id, since=since)
    if not ended:
        return
    barred = (
        select(MeasurementRow, DeviceRow.fingerprint)
        .join(JobRow, JobRow.id == MeasurementRow.job_id)
        .join(DeviceRow, DeviceRow.id == MeasurementRow.device_id)
        .where(
            MeasurementRow.outcome == Outcome.QUARANTINED,
            MeasurementRow.distrusted_because.is_(None),
            JobRow.state.not_in(_FINAL),
        )
        .order_by(MeasurementRow.serial)
        .with_for_update(key_share=True, of=MeasurementRow)
    )
    for row, fingerprint in session.execute(barred).all():
        if quarantine.cause_of(row.request, fingerprint) in ended:
            _doubt(session, row, because)


def outdate(session: Session, job_id: str, device_id: str, *, because: str) -> None:
    """Open again what was measured for a job's target that is not what it was.

    The target's calibrated reference latency goes with it, and a budget that is a share of it.
    What the device's pool measured for it counts with the device's own.
    """
    job = locked_by_id(session, JobRow, "job", job_id)
    own = locked_by_id(session, DeviceRow, "device", device_id)
    mates = select(DeviceRow.id).where(DeviceRow.pool == own.pool, DeviceRow.pool.is_not(None))
    targets = {job.device_id, *(target.device_id for target in job.further_targets or ())}
    measured_by = (set(session.scalars(mates)) - targets) | {device_id}
    rows = session.scalars(
        select(MeasurementRow)
        .where(
            MeasurementRow.job_id == job_id,
            MeasurementRow.device_id.in_(measured_by),
            MeasurementRow.state == MeasurementState.DONE,
            MeasurementRow.distrusted_because.is_(None),
            MeasurementRow.is_canary.is_(False),
        )
        .order_by(MeasurementRow.serial)
        .with_for_update(key_share=True)
    ).all()
    for row in rows:
        _doubt(session, row, because)
    if job.device_id == device_id:
        job.reference_latency_ns = job.latency_budget_ns = None
    job.further_targets = tuple(
        replace(target, reference_latency_ns=None, latency_budget_ns=None)
        if target.device_id == device_id
        else target
        for target in job.further_targets or ()
    )


def outdate_open_jobs(session: Session, device_id: str, *, because: str) -> None:
    """`outdate` for every job that is not over and has the device as a target."""
    for job in session.scalars(select(JobRow).where(JobRow.state.not_in(_FINAL))).all():
        if device_id in {job.device_id, *(t.device_id for t in job.further_targets or ())}:
            outdate(session, job.id, device_id, because=because)


def _doubt(session: Session, row: MeasurementRow, because: str) -> None:
    row.distrusted_because = because
    if row.trial_id is not None:
        _reopen(locked_by_id(session, TrialRow, "trial", row.trial_id), row)


def _reopen(trial: TrialRow, measured: MeasurementRow) -> None:
    """Take out of a trial what came from this measurement, on whichever target it was for.

    Without a screening the trial is under way again; without a confirmation it may be confirmed.
    """
    further = tuple(_without(figures, measured) for figures in trial.further or ())
    was_screened = _screened(trial, measured) or any(
        was.outcome is not None and now.outcome is None
        for was, now in zip(trial.further or (), further, strict=True)
    )
    if _screened(trial, measured):
        trial.outcome = trial.reason = trial.latency = None
    if _refused(trial, measured):
        trial.outcome, trial.reason = TrialOutcome.OK, None
    if _confirmed(trial, measured):
        trial.confirmed_latency = None
    if further:
        trial.further = further
    if was_screened:
        trial.state, trial.finished_at = TrialState.RUNNING, None


def _without(figures: TargetFigures, measured: MeasurementRow) -> TargetFigures:
    if _screened(figures, measured):
        figures = replace(figures, outcome=None, reason=None, latency=None)
    if _refused(figures, measured):
        figures = replace(figures, outcome=TrialOutcome.OK, reason=None)
    if _confirmed(figures, measured):
        figures = replace(figures, confirmed_latency=None)
    return figures


_MEASURED = (TrialOutcome.OK, TrialOutcome.MEASUREMENT_FAILED, TrialOutcome.UNCONFIRMED)


def _screened(figures: TrialRow | TargetFigures, measured: MeasurementRow) -> bool:
    """The figures' outcome is this measurement's: the same report, or the same failure."""
    if figures.outcome not in _MEASURED:
        return False
    if figures.artifact_sha256 != measured.request.artifact.sha256:
        return False
    if measured.report is not None:
        return _is_same(figures.latency, measured.report)
    return figures.latency is None and (figures.reason or "").endswith(measured.reason or "")


def _refused(figures: TrialRow | TargetFigures, measured: MeasurementRow) -> bool:
    """It is for this measurement that the figures could not be confirmed.

    A measurement without a reason went well and was not steady.
    """
    return (
        figures.outcome is TrialOutcome.UNCONFIRMED
        and measured.request.plan.kind == "confirmation"
        and figures.artifact_sha256 == measured.request.artifact.sha256
        and (figures.reason or "").endswith(measured.reason or "unsteady")
    )


def _confirmed(figures: TrialRow | TargetFigures, measured: MeasurementRow) -> bool:
    return measured.report is not None and _is_same(figures.confirmed_latency, measured.report)


def _is_same(kept: LatencyReport | None, measured: LatencyReport) -> bool:
    """One measurement's report, whatever a trial's has of the layer groups in its profile."""
    return kept is not None and kept.model_copy(update={"profile": measured.profile}) == measured
