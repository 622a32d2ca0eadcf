"""Measurements, leases and results, as rows. Transactions and contract: `repository.py`.

A measurement may be executed more than once (at least once); of its results exactly one is
accepted. What decides is the fencing token: it grows with every lease, and only the last
lease's result counts. Every other one goes to `late_results`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection
from dataclasses import replace
from datetime import datetime, timedelta
from enum import Enum

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    bindparam,
    exists,
    false,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session

from device_agents.protocol import LatencyReport, MeasurementRequest, MeasurementResult, Outcome
from storage import identifiers, quarantine
from storage.errors import InvalidToken, NotFound, StorageError
from storage.records import (
    DrainCause,
    LateResultRecord,
    MeasurementRecord,
    MeasurementState,
)
from storage.rows import locked, locked_by_id, to_record
from storage.samples import decode_blocks, encode_blocks, split_blocks
from storage.tables import AgentRow, DeviceRow, LateResultRow, MeasurementRow, SamplesRow


def enqueue(
    session: Session,
    *,
    job_id: str,
    trial_id: str | None,
    device_id: str,
    request: MeasurementRequest,
    is_shared: bool,
    avoid_device_id: str | None,
    is_canary: bool,
    now: datetime,
) -> MeasurementRecord:
    """A measurement in state QUEUED; the same request a second time is the first one."""
    device = _device(session, device_id)
    pool, fingerprint = (device.pool, device.fingerprint) if is_shared else (None, None)
    row = locked(session, MeasurementRow, MeasurementRow.id == request.measurement_id)
    if row is not None:
        asked = (row.job_id, row.pool, row.fingerprint, row.request)
        is_same_device = row.device_id == device_id or is_shared
        if is_same_device and asked == (job_id, pool, fingerprint, request):
            return to_record(MeasurementRecord, row)
        raise StorageError(f"measurement {request.measurement_id!r} exists with other contents")
    row = MeasurementRow(
        id=request.measurement_id,
        job_id=job_id,
        trial_id=trial_id,
        device_id=device_id,
        pool=pool,
        fingerprint=fingerprint,
        avoid_device_id=avoid_device_id,
        is_canary=is_canary,
        request=request,
        state=MeasurementState.QUEUED,
        fencing_token=0,
        attempts=0,
        created_at=now,
    )
    barred = quarantine.find(session, request, device.fingerprint)
    if barred is not None:
        quarantine.end_quarantined(row, barred, now=now)
    session.add(row)
    session.flush()
    return to_record(MeasurementRecord, row)


def may_lease(session: Session, *, device_id: str, agent_id: str) -> bool:
    """Whether `lease` would do anything: lease, end the agent's lease, or refuse the agent."""
    scope, known = _scope(session, device_id)
    return bool(session.scalar(_would_lease(scope), {**known, "agent_id": agent_id}))


def lease(
    session: Session,
    *,
    device_id: str,
    agent_id: str,
    ttl_s: float,
    request_id: str | None,
    max_attempts: int,
    now: datetime,
) -> MeasurementRecord | None:
    """The oldest queued measurement for the device; an agent's earlier lease ends here."""
    agent = locked_by_id(session, AgentRow, "agent", agent_id)
    if agent.revoked_at is not None:
        raise InvalidToken(f"agent {agent_id} was revoked; enroll it again")
    held = _leased().where(MeasurementRow.leased_by == agent_id).with_for_update(key_share=True)
    lease_id = _lease_id(agent_id, request_id)
    expires_at = now + timedelta(seconds=ttl_s)
    for earlier in session.scalars(held).all():
        if earlier.lease_id == lease_id:
            earlier.lease_expires_at = expires_at
            return to_record(MeasurementRecord, earlier)
        _give_back(earlier, "its agent asked for other work", max_attempts, now)
    session.flush()
    scope, known = _scope(session, device_id)
    row = session.scalars(_oldest(scope), known).one_or_none()
    if row is None:
        return None
    row.state = MeasurementState.LEASED
    row.device_id = device_id  # in a pool: who has it now
    row.fencing_token += 1
    row.attempts += 1
    row.lease_id = lease_id
    row.leased_by = agent_id
    row.lease_expires_at = expires_at
    return to_record(MeasurementRecord, row)


def renew(
    session: Session, leases: Collection[tuple[str, int]], *, ttl_s: float, now: datetime
) -> set[tuple[str, int]]:
    """The leases (id, fencing token) that are current; they last `ttl_s` from now."""
    if not leases:
        return set()
    ids = [lease_id for lease_id, _ in leases]
    held = session.execute(
        select(MeasurementRow.serial, MeasurementRow.lease_id, MeasurementRow.fencing_token)
        .where(MeasurementRow.lease_id.in_(ids), MeasurementRow.state == MeasurementState.LEASED)
        .order_by(MeasurementRow.serial)  # one order for all who lock several
        .with_for_update(key_share=True)
    ).all()
    found = {serial: (name or "", token) for serial, name, token in held}
    current = {serial: lease for serial, lease in found.items() if lease in leases}
    session.execute(
        update(MeasurementRow)
        .where(MeasurementRow.serial.in_(current))
        .values(lease_expires_at=now + timedelta(seconds=ttl_s))
    )
    return set(current.values())


def accept(
    session: Session,
    result: MeasurementResult,
    *,
    agent_id: str,
    max_attempts: int,
    now: datetime,
) -> MeasurementRecord | None:
    """The measurement with its result, or None where the result came late and was set aside.

    LOST is what an agent says that died while it measured: the measurement is queued again.
    """
    row = locked_by_id(session, MeasurementRow, "measurement", result.measurement_id)
    is_current = (
        row.lease_id == result.lease_id
        and row.fencing_token == result.fencing_token
        and row.leased_by == agent_id
    )
    if is_current and row.state is MeasurementState.DONE:
        return _with_samples(session, row)  # the same result again: its answer was lost
    if not is_current or row.state is not MeasurementState.LEASED:
        _set_aside(session, result, agent_id=agent_id, now=now)
        _note_crash(session, row, result, agent_id=agent_id, now=now)
        return None
    if result.outcome is Outcome.LOST:
        _give_back(row, result.reason or "its agent ended", max_attempts, now)
        session.flush()
        _note_crash(session, row, result, agent_id=agent_id, now=now)
        return to_record(MeasurementRecord, row)
    report, blocks = split_blocks(result.report)
    row.state = MeasurementState.DONE
    row.lease_expires_at = None
    row.outcome = result.outcome
    row.reason = result.reason
    row.report = report
    row.finished_at = now
    if blocks:
        session.add(SamplesRow(measurement_id=row.id, encoded=encode_blocks(blocks)))
    session.flush()
    _note_crash(session, row, result, agent_id=agent_id, now=now)
    return _with_samples(session, row)


def expire(session: Session, *, max_attempts: int, now: datetime) -> list[MeasurementRecord]:
    """Take back the leases that ran out; rows that another service is at are left to it."""
    ran_out = (
        _leased()
        .where(MeasurementRow.lease_expires_at <= now)
        .with_for_update(key_share=True, skip_locked=True)
    )
    rows = session.scalars(ran_out).all()
    for row in rows:
        _give_back(row, f"agent {row.leased_by} let its lease run out", max_attempts, now)
    return [to_record(MeasurementRecord, row) for row in rows]


def cancel(session: Session, job_id: str, *, now: datetime) -> int:
    """End everything of the job that is not done."""
    open_rows = session.scalars(
        select(MeasurementRow)
        .where(MeasurementRow.job_id == job_id, MeasurementRow.state != MeasurementState.DONE)
        .order_by(MeasurementRow.serial)
        .with_for_update(key_share=True)
    ).all()
    for row in open_rows:
        _end_lease(row)
        _finish(row, Outcome.CANCELLED, "the job was cancelled", now)
    return len(open_rows)


def get(session: Session, measurement_id: str) -> MeasurementRecord:
    """One measurement with its raw samples."""
    wanted = select(MeasurementRow).where(MeasurementRow.id == measurement_id)
    row = session.scalars(wanted).one_or_none()
    if row is None:
        raise NotFound(f"there is no measurement {measurement_id!r}")
    return _with_samples(session, row)


def of_job(session: Session, job_id: str) -> list[MeasurementRecord]:
    """A job's measurements in order of arrival, without raw samples."""
    wanted = select(MeasurementRow).where(MeasurementRow.job_id == job_id)
    rows = session.scalars(wanted.order_by(MeasurementRow.serial))
    return [to_record(MeasurementRecord, row) for row in rows]


def late_results(session: Session, measurement_id: str) -> list[LateResultRecord]:
    """The results of a measurement that were not accepted, in order of arrival."""
    wanted = select(LateResultRow).where(LateResultRow.measurement_id == measurement_id)
    return [
        LateResultRecord(
            result=MeasurementResult(
                lease_id=row.lease_id,
                fencing_token=row.fencing_token,
                measurement_id=row.measurement_id,
                outcome=row.outcome,
                reason=row.reason,
                report=_joined(row.report, row.encoded),
            ),
            agent_id=row.agent_id,
            received_at=row.received_at,
        )
        for row in session.scalars(wanted.order_by(LateResultRow.serial))
    ]


class _Scope(Enum):
    """Which queued measurements an agent may take."""

    NONE = "none"
    OWN = "own"
    OWN_CANARIES = "own canaries"
    OWN_AND_POOL = "own and pool"


_DEVICE = select(
    DeviceRow.pool, DeviceRow.fingerprint, DeviceRow.drained_by, DeviceRow.canary_passed_at
).where(DeviceRow.id == bindparam("device_id"))
# Statements are made once: a thousand waiting agents ask many times a second, and making one
# takes longer than the database needs for it.


def _scope(session: Session, device_id: str) -> tuple[_Scope, dict[str, str | None]]:
    """What an agent of the device may lease, and the values that its statements want.

    A member works for its pool once a canary found it in line. A drained device gets nothing;
    one that is off its pool gets canaries, to show that it is in line again.
    """
    device = session.execute(_DEVICE, {"device_id": device_id}).one_or_none()
    if device is None:
        raise NotFound(f"there is no device {device_id!r}")
    known = {"device_id": device_id, "pool": device.pool, "fingerprint": device.fingerprint}
    if device.drained_by is DrainCause.IDENTITY:
        return _Scope.NONE, known
    if device.drained_by is DrainCause.CANARY:
        return _Scope.OWN_CANARIES, known
    if device.pool is None or device.canary_passed_at is None:
        return _Scope.OWN, known
    return _Scope.OWN_AND_POOL, known


def _may_take(scope: _Scope) -> ColumnElement[bool]:
    own = and_(MeasurementRow.device_id == bindparam("device_id"), MeasurementRow.pool.is_(None))
    shared = and_(
        MeasurementRow.pool == bindparam("pool"),
        MeasurementRow.fingerprint == bindparam("fingerprint"),
        MeasurementRow.avoid_device_id.is_distinct_from(bindparam("device_id")),
    )
    allowed = {
        _Scope.NONE: false(),
        _Scope.OWN: own,
        _Scope.OWN_CANARIES: and_(own, MeasurementRow.is_canary),
        _Scope.OWN_AND_POOL: or_(own, shared),
    }
    return and_(allowed[scope], MeasurementRow.state == MeasurementState.QUEUED)


@functools.cache
def _would_lease(scope: _Scope) -> Select[bool]:
    held = exists().where(
        MeasurementRow.leased_by == bindparam("agent_id"),
        MeasurementRow.state == MeasurementState.LEASED,
    )
    known = exists().where(AgentRow.id == bindparam("agent_id"), AgentRow.revoked_at.is_(None))
    queued = select(MeasurementRow.serial).where(_may_take(scope)).exists()
    return select(queued | held | ~known)


@functools.cache
def _oldest(scope: _Scope) -> Select[MeasurementRow]:
    return (
        select(MeasurementRow)
        .where(_may_take(scope))
        .order_by(MeasurementRow.serial)
        .limit(1)
        .with_for_update(key_share=True, skip_locked=True)
    )


def _device(session: Session, device_id: str) -> DeviceRow:
    row = session.scalars(select(DeviceRow).where(DeviceRow.id == device_id)).one_or_none()
    if row is None:
        raise NotFound(f"there is no device {device_id!r}")
    return row


def _note_crash(
    session: Session,
    row: MeasurementRow,
    result: MeasurementResult,
    *,
    agent_id: str,
    now: datetime,
) -> None:
    """A crash counts for the device that reports it, whoever has the lease by now.

    A canary's does not: it is the device that is in question there.
    """
    if row.is_canary or result.outcome not in quarantine.CRASHES:
        return
    reporter = (
        select(DeviceRow)
        .join(AgentRow, AgentRow.device_id == DeviceRow.id)
        .where(AgentRow.id == agent_id)
    )
    device = session.scalars(reporter).one_or_none()
    if device is not None:
        quarantine.note(session, row, result, device=device, now=now)


def _leased() -> Select[MeasurementRow]:
    return select(MeasurementRow).where(MeasurementRow.state == MeasurementState.LEASED)


def _give_back(row: MeasurementRow, why: str, max_attempts: int, now: datetime) -> None:
    _end_lease(row)
    if row.attempts >= max_attempts:
        _finish(row, Outcome.LOST, f"{why}; attempt {row.attempts} of {max_attempts}", now)
    else:
        row.state = MeasurementState.QUEUED


def _lease_id(agent_id: str, request_id: str | None) -> str:
    """A new id; for a request that has one the same again, so that its lease is recognized."""
    if request_id is None:
        return identifiers.new_id(identifiers.LEASE)
    digest = hashlib.sha256(f"{agent_id}\n{request_id}".encode()).hexdigest()
    return f"{identifiers.LEASE}-{digest[:20]}"


def _end_lease(row: MeasurementRow) -> None:
    row.lease_id = None
    row.leased_by = None
    row.lease_expires_at = None


def _finish(row: MeasurementRow, outcome: Outcome, reason: str, now: datetime) -> None:
    row.state = MeasurementState.DONE
    row.outcome = outcome
    row.reason = reason
    row.finished_at = now


def _set_aside(
    session: Session, result: MeasurementResult, *, agent_id: str, now: datetime
) -> None:
    same = session.scalars(
        select(LateResultRow.serial).where(
            LateResultRow.measurement_id == result.measurement_id,
            LateResultRow.lease_id == result.lease_id,
            LateResultRow.fencing_token == result.fencing_token,
        )
    ).first()
    if same is not None:
        return
    report, blocks = split_blocks(result.report)
    session.add(
        LateResultRow(
            measurement_id=result.measurement_id,
            lease_id=result.lease_id,
            fencing_token=result.fencing_token,
            agent_id=agent_id,
            outcome=result.outcome,
            reason=result.reason,
            report=report,
            encoded=encode_blocks(blocks) if blocks else None,
            received_at=now,
        )
    )


def _with_samples(session: Session, row: MeasurementRow) -> MeasurementRecord:
    record = to_record(MeasurementRecord, row)
    samples = session.get(SamplesRow, row.id)
    return replace(record, report=_joined(record.report, samples.encoded if samples else None))


def _joined(report: LatencyReport | None, encoded: bytes | None) -> LatencyReport | None:
    if report is None or encoded is None:
        return report
    return report.model_copy(update={"blocks": decode_blocks(encoded)})
