"""Trials as rows. Transactions and the public contract: `repository.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from search_spaces import Candidate
from storage import identifiers
from storage.errors import DuplicateTrial, NotFound
from storage.records import TargetFigures, TrialRecord, TrialState
from storage.rows import by_prefix, change, locked_by_id, to_record
from storage.samples import split_blocks
from storage.tables import JobRow, TrialRow

_FIXED = {"id", "job_id", "number", "candidate", "created_at"}
_CHANGEABLE = frozenset(field.name for field in fields(TrialRecord)) - _FIXED
_REPORTS = ("latency", "confirmed_latency")


def add(
    session: Session, job_id: str, candidate: Candidate, *, proposed_by: str, now: datetime
) -> TrialRecord:
    """The next trial of a job; the job's row is what two proposers take turns on."""
    locked_by_id(session, JobRow, "job", job_id)
    of_job = TrialRow.job_id == job_id
    digest = candidate.digest
    same = session.execute(
        select(TrialRow.id, TrialRow.number).where(of_job, TrialRow.candidate_digest == digest)
    ).first()
    if same is not None:
        raise DuplicateTrial(
            f"job {job_id} has this candidate already, as trial {same.number}",
            existing_id=same.id,
        )
    last = session.scalar(select(func.max(TrialRow.number)).where(of_job))
    row = TrialRow(
        id=identifiers.new_id(identifiers.TRIAL),
        job_id=job_id,
        number=0 if last is None else last + 1,
        candidate=candidate,
        candidate_digest=digest,
        proposed_by=proposed_by,
        state=TrialState.PROPOSED,
        further=(),
        created_at=now,
    )
    session.add(row)
    session.flush()
    return to_record(TrialRecord, row)


def update(
    session: Session,
    trial_id: str,
    changes: Mapping[str, Any],
    *,
    on: str | None = None,
    now: datetime,
) -> TrialRecord:
    """Set fields; FINISHED sets `finished_at`; latency reports lose their raw samples.

    With `on`, a further target's device id, the fields are those of its figures.
    """
    row = locked_by_id(session, TrialRow, "trial", trial_id)
    kept = {name: split_blocks(changes[name])[0] for name in _REPORTS if name in changes}
    if on is not None:
        others = {figures.device_id: figures for figures in row.further}
        known = others.get(on) or TargetFigures(device_id=on)
        others[on] = replace(known, **{**changes, **kept})
        row.further = tuple(others.values())
        return to_record(TrialRecord, row)
    change(row, {**changes, **kept}, allowed=_CHANGEABLE)
    if "state" in changes and "finished_at" not in changes:
        row.finished_at = now if row.state is TrialState.FINISHED else None
    return to_record(TrialRecord, row)


def get(session: Session, trial_id: str) -> TrialRecord:
    """The trial of that id."""
    row = session.scalars(select(TrialRow).where(TrialRow.id == trial_id)).one_or_none()
    if row is None:
        raise NotFound(f"there is no trial {trial_id!r}")
    return to_record(TrialRecord, row)


def find(session: Session, job_id: str, reference: str) -> TrialRecord:
    """The trial of a job by number, id, or the beginning of its id."""
    wanted = reference.strip().removeprefix("#")
    of_job = select(TrialRow).where(TrialRow.job_id == job_id)
    if wanted.isdecimal() and len(wanted) < 10:
        rows = list(session.scalars(of_job.where(TrialRow.number == int(wanted))))
    else:
        rows = list(session.scalars(of_job.where(TrialRow.id == wanted))) or by_prefix(
            session, of_job, TrialRow.id, wanted
        )
    if len(rows) == 1:
        return to_record(TrialRecord, rows[0])
    if rows:
        fitting = ", ".join(row.id for row in rows)
        raise NotFound(f"{reference!r} begins more than one trial id: {fitting}, ...")
    last = session.scalar(select(func.max(TrialRow.number)).where(TrialRow.job_id == job_id))
    there = "it has none yet" if last is None else f"its trials are numbered 0 to {last}"
    raise NotFound(f"job {job_id} has no trial {reference!r}; {there}")


def of_job(session: Session, job_id: str) -> list[TrialRecord]:
    """A job's trials by number."""
    wanted = select(TrialRow).where(TrialRow.job_id == job_id).order_by(TrialRow.number)
    return [to_record(TrialRecord, row) for row in session.scalars(wanted)]
