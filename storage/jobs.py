"""Jobs as rows. Transactions and the public contract: `repository.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage import identifiers
from storage.records import JobRecord, JobState
from storage.rows import change, locked_by_id, referred, to_record
from storage.tables import JobRow

_CHANGEABLE = frozenset(field.name for field in fields(JobRecord)) - {"id", "created_at"}


def create(session: Session, *, spec: Mapping[str, Any], name: str, now: datetime) -> JobRecord:
    """A new job in state QUEUED."""
    row = JobRow(
        id=identifiers.new_id(identifiers.JOB),
        name=name,
        state=JobState.QUEUED,
        phase=JobState.QUEUED.value,
        spec=dict(spec),
        cancel_requested=False,
        further_targets=(),
        sensitivity=(),
        created_at=now,
    )
    session.add(row)
    session.flush()
    return to_record(JobRecord, row)


def get(session: Session, reference: str) -> JobRecord:
    """The job that a person means."""
    return to_record(JobRecord, referred(session, JobRow, "job", reference))


def all_jobs(session: Session) -> list[JobRecord]:
    """Every job, oldest first."""
    rows = session.scalars(select(JobRow).order_by(JobRow.serial))
    return [to_record(JobRecord, row) for row in rows]


def update(
    session: Session, job_id: str, changes: Mapping[str, Any], *, now: datetime
) -> JobRecord:
    """Set fields; the first RUNNING sets `started_at`, a final state sets `finished_at`."""
    row = locked_by_id(session, JobRow, "job", job_id)
    change(row, changes, allowed=_CHANGEABLE)
    if row.state is JobState.RUNNING and row.started_at is None:
        row.started_at = now
    if "state" in changes and "finished_at" not in changes:
        row.finished_at = now if row.state.is_final else None
    return to_record(JobRecord, row)


def request_cancel(session: Session, job_id: str) -> JobRecord:
    """Ask for the end of a job; a final one stays as it is."""
    row = locked_by_id(session, JobRow, "job", job_id)
    if not row.state.is_final:
        row.cancel_requested = True
    return to_record(JobRecord, row)


def resume(session: Session, job_id: str, *, spec: Mapping[str, Any] | None) -> JobRecord:
    """Back to QUEUED; one that is not final keeps its state and loses the wish to cancel."""
    row = locked_by_id(session, JobRow, "job", job_id)
    row.cancel_requested = False
    if spec is not None:
        row.spec = dict(spec)
    if row.state.is_final:
        row.state = JobState.QUEUED
        row.phase = JobState.QUEUED.value
        row.reason = None
        row.started_at = None  # a time budget counts from the resumption
        row.finished_at = None
    return to_record(JobRecord, row)
