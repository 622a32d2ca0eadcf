"""Artifacts that crash devices, as rows. Transactions and contract: `repository.py`.

Owns the count of crashes and the rule that ends them: an artifact that crashed two devices of
one fingerprint, or one of them three times, with one runtime, is not sent to devices of that
fingerprint for that runtime again, whatever job asks.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Final

from sqlalchemy import ColumnElement, and_, delete, select
from sqlalchemy.orm import Session

from device_agents.protocol import MeasurementRequest, MeasurementResult, Outcome
from storage.errors import NotFound
from storage.records import MeasurementState, QuarantineRecord
from storage.rows import to_record
from storage.tables import CrashRow, DeviceRow, MeasurementRow, QuarantineRow

CRASHES: Final = (Outcome.RUNTIME_CRASH, Outcome.LOST)
"""The runtime died, or the whole agent did."""

MAX_CRASHED_DEVICES: Final = 2
MAX_CRASHES_OF_ONE: Final = 3
"""One crash may be the device's fault and two the same one's; a second device, or a third time,
makes the artifact the likelier cause. Choices, not measurements."""

Cause = tuple[str, str, str]
"""What crashes count for: an artifact's digest, a fingerprint and a runtime."""


def note(
    session: Session,
    row: MeasurementRow,
    result: MeasurementResult,
    *,
    device: DeviceRow,
    now: datetime,
) -> None:
    """Count a crash, also one whose result came late; quarantine the artifact when it is due."""
    same = select(CrashRow.serial).where(
        CrashRow.measurement_id == row.id, CrashRow.fencing_token == result.fencing_token
    )
    if session.scalars(same).first() is not None:
        return
    session.add(
        CrashRow(
            measurement_id=row.id,
            fencing_token=result.fencing_token,
            artifact_sha256=row.request.artifact.sha256,
            fingerprint=device.fingerprint,
            runtime=row.request.runtime.runtime,
            device_id=device.id,
            reason=result.reason,
            created_at=now,
        )
    )
    session.flush()
    cause = cause_of(row.request, device.fingerprint)
    why = _reason(session, cause)
    if why is None or find(session, row.request, device.fingerprint) is not None:
        return
    artifact_sha256, fingerprint, runtime = cause
    entry = QuarantineRow(
        artifact_sha256=artifact_sha256,
        fingerprint=fingerprint,
        runtime=runtime,
        reason=why,
        job_id=row.job_id,
        created_at=now,
    )
    session.add(entry)
    session.flush()
    _withdraw(session, entry, now=now)


def find(session: Session, request: MeasurementRequest, fingerprint: str) -> QuarantineRow | None:
    """The quarantine that keeps this request from devices of the fingerprint."""
    return session.get(QuarantineRow, cause_of(request, fingerprint))


def cause_of(request: MeasurementRequest, fingerprint: str) -> Cause:
    """What a crash of the request counts for on a device of the fingerprint."""
    return request.artifact.sha256, fingerprint, request.runtime.runtime


def end_quarantined(row: MeasurementRow, why: QuarantineRow, *, now: datetime) -> None:
    """The measurement is over without having been sent."""
    row.state = MeasurementState.DONE
    row.outcome = Outcome.QUARANTINED
    row.reason = (
        f"{why.reason}; `autotune device quarantine --clear {why.artifact_sha256[:12]}` lets it "
        "be tried again"
    )
    row.finished_at = now


def listed(session: Session) -> list[QuarantineRecord]:
    """Everything in quarantine, oldest first."""
    rows = session.scalars(select(QuarantineRow).order_by(QuarantineRow.created_at))
    return [to_record(QuarantineRecord, row) for row in rows]


def clear(session: Session, prefix: str) -> list[QuarantineRecord]:
    """End the quarantine of the artifacts whose digest begins so, and forget their crashes.

    Raises:
        NotFound: none does.
    """
    found = [
        entry for entry in listed(session) if prefix and entry.artifact_sha256.startswith(prefix)
    ]
    if not found:
        raise NotFound(f"no artifact whose digest begins with {prefix!r} is in quarantine")
    for digest in {entry.artifact_sha256 for entry in found}:
        session.execute(delete(QuarantineRow).where(QuarantineRow.artifact_sha256 == digest))
        session.execute(delete(CrashRow).where(CrashRow.artifact_sha256 == digest))
    return found


def forget(session: Session, device_id: str, *, since: datetime) -> set[Cause]:
    """Forget the device's crashes since then; returns what is in quarantine no longer for that."""
    its = and_(CrashRow.device_id == device_id, CrashRow.created_at >= since)
    counted = select(CrashRow.artifact_sha256, CrashRow.fingerprint, CrashRow.runtime).where(its)
    causes: set[Cause] = {(sha, like, runtime) for sha, like, runtime in session.execute(counted)}
    session.execute(delete(CrashRow).where(its))
    ended = set()
    for cause in sorted(causes):
        entry = session.get(QuarantineRow, cause)
        if entry is not None and _reason(session, cause) is None:
            session.delete(entry)
            ended.add(cause)
    return ended


def _reason(session: Session, cause: Cause) -> str | None:
    rows = session.execute(
        select(DeviceRow.name, CrashRow.reason)
        .join(DeviceRow, DeviceRow.id == CrashRow.device_id)
        .where(_of(cause))
        .order_by(CrashRow.serial)
    ).all()
    if not rows:
        return None
    times = Counter(name for name, _ in rows)
    last = rows[-1].reason or "no reason given"
    if len(times) >= MAX_CRASHED_DEVICES:
        return f"the artifact crashed {len(times)} devices ({', '.join(times)}), at last: {last}"
    name, n = times.most_common(1)[0]
    if n >= MAX_CRASHES_OF_ONE:
        return f"the artifact crashed {name} {n} times, at last: {last}"
    return None


def _of(cause: Cause) -> ColumnElement[bool]:
    artifact_sha256, fingerprint, runtime = cause
    return and_(
        CrashRow.artifact_sha256 == artifact_sha256,
        CrashRow.fingerprint == fingerprint,
        CrashRow.runtime == runtime,
    )


def _withdraw(session: Session, entry: QuarantineRow, *, now: datetime) -> None:
    """End what other jobs have queued of the artifact for these devices."""
    queued = (
        select(MeasurementRow)
        .join(DeviceRow, DeviceRow.id == MeasurementRow.device_id)
        .where(
            MeasurementRow.state == MeasurementState.QUEUED,
            DeviceRow.fingerprint == entry.fingerprint,
        )
        .order_by(MeasurementRow.serial)  # one order for all who lock several
        .with_for_update(key_share=True, of=MeasurementRow)
    )
    for row in session.scalars(queued).all():
        request = row.request
        if (request.artifact.sha256, request.runtime.runtime) == (
            entry.artifact_sha256,
            entry.runtime,
        ):
            end_quarantined(row, entry, now=now)
