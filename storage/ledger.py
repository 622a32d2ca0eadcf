"""What is only ever added to: events of jobs, and notes on artifacts, as rows.

Transactions and the public contract: `repository.py`. The artifacts' bytes: `artifacts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from storage.errors import NotFound
from storage.records import ArtifactRecord, EventRecord
from storage.rows import take_turns, to_record
from storage.tables import ArtifactRow, EventRow


def append_event(
    session: Session, job_id: str, kind: str, payload: Mapping[str, Any], *, now: datetime
) -> EventRecord:
    """The next event of the database.

    Ids come from the table and not from a sequence, one transaction after the other: a
    sequence leaves gaps and shows a larger id before a smaller one, and then a reader that
    remembers the last id it saw misses an event.
    """
    take_turns(session, "events")
    last = session.scalar(select(func.max(EventRow.id))) or 0
    row = EventRow(id=last + 1, job_id=job_id, kind=kind, payload=dict(payload), created_at=now)
    session.add(row)
    session.flush()
    return to_record(EventRecord, row)


def events(session: Session, job_id: str, *, after: int, limit: int) -> list[EventRecord]:
    """Events of a job by id, those larger than `after`."""
    wanted = select(EventRow).where(EventRow.job_id == job_id, EventRow.id > after)
    rows = session.scalars(wanted.order_by(EventRow.id).limit(limit))
    return [to_record(EventRecord, row) for row in rows]


def record(
    session: Session, sha256: str, size_bytes: int, kind: str, *, now: datetime
) -> ArtifactRecord:
    """The note on a file; the first one stays."""
    take_turns(session, "artifacts")
    row = session.get(ArtifactRow, sha256)
    if row is None:
        row = ArtifactRow(sha256=sha256, size_bytes=size_bytes, kind=kind, created_at=now)
        session.add(row)
        session.flush()
    return to_record(ArtifactRecord, row)


def get(session: Session, sha256: str) -> ArtifactRecord:
    """The note on a file."""
    row = session.get(ArtifactRow, sha256)
    if row is None:
        raise NotFound(f"there is no artifact {sha256!r}")
    return to_record(ArtifactRecord, row)
