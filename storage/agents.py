"""Agents and their keys, as rows. Transactions and contract: `repository.py` and `fleet.py`.

Owns what a key is worth: the current one, the next one until it is used for the first time,
the previous one for a moment after that. Keys arrive hashed. Enrolment is `devices.py`'s.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import bindparam, or_, select
from sqlalchemy.orm import Session

from storage import drains
from storage.errors import InvalidToken, ReplacedKey
from storage.records import AgentRecord, DeviceStanding, DrainCause
from storage.rows import locked_by_id
from storage.tables import AgentRow, DeviceRow

PREVIOUS_KEY_GRACE_S = 120.0
"""A replaced key is good for this long: an agent's other requests may be under way with it,
the longest of which is a long poll of at most 60 s, tried again once."""

# Made once: every request of an agent begins with it, and making it takes longer than asking it
# (1.0 ms against 0.4 ms with it made, of CPU time on one x86 core).
_BY_KEY = (
    select(AgentRow, DeviceRow)
    .join(DeviceRow, DeviceRow.id == AgentRow.device_id)
    .where(
        or_(
            AgentRow.key_hash == bindparam("key_hash"),
            AgentRow.next_key_hash == bindparam("key_hash"),
            AgentRow.previous_key_hash == bindparam("key_hash"),
        )
    )
)


def find(session: Session, key_hash: str, *, now: datetime) -> tuple[AgentRecord, bool]:
    """The agent of that key with its device's standing, and whether the key is its next one.

    Raises:
        ReplacedKey: another one took its place, and its time is over.
        InvalidToken: the key is unknown, or worth nothing any more.
    """
    found = session.execute(_BY_KEY, {"key_hash": key_hash}).one_or_none()
    if found is None:
        raise InvalidToken("no agent has this key; enrol the agent again")
    row, device = found
    if row.revoked_at is not None:
        raise InvalidToken(
            f"the key of agent {row.id} ({device.name}) was revoked at {row.revoked_at:%F %T %Z}, "
            "by hand or because its device enrolled again; enrol the agent again, with a name of "
            "its own if it is another device"
        )
    if row.previous_key_hash == key_hash and _is_past_grace(row, now):
        raise ReplacedKey(
            f"this key of agent {row.id} ({device.name}) was replaced at "
            f"{row.key_changed_at:%F %T %Z} and the new one is in use: this is a copy of its "
            "state folder, or an old backup; enroll it again, with a name of its own if it is "
            "another device"
        )
    return record_of(row, device), row.next_key_hash == key_hash


def flag_copy(session: Session, key_hash: str, *, now: datetime) -> None:
    """Drain the device whose replaced key is still in somebody's hands."""
    row = session.scalars(
        select(AgentRow).where(
            AgentRow.previous_key_hash == key_hash, AgentRow.revoked_at.is_(None)
        )
    ).one_or_none()
    if row is None or not _is_past_grace(row, now) or row.key_changed_at is None:
        return
    drains.drain(
        session,
        row.device_id,
        cause=DrainCause.IDENTITY,
        because=f"a process came with a key of agent {row.id} that was replaced at "
        f"{row.key_changed_at:%F %T %Z}: there is a copy of its state folder. Enrol the copy with "
        "a token of its own",
        distrust_since=now,
    )


def offer_key(session: Session, agent_id: str, next_key_hash: str) -> None:
    """Another key for the agent, beside the current one until it is used."""
    row = locked_by_id(session, AgentRow, "agent", agent_id)
    row.next_key_hash = next_key_hash


def adopt_key(session: Session, agent_id: str, key_hash: str, *, now: datetime) -> None:
    """The next key was used: it is the current one now."""
    row = locked_by_id(session, AgentRow, "agent", agent_id)
    if row.next_key_hash != key_hash:
        return  # another request with it came first
    row.previous_key_hash, row.key_hash, row.next_key_hash = row.key_hash, key_hash, None
    row.key_changed_at = now
    row.is_rotation_due = False


def of_device(session: Session, device_id: str) -> AgentRow | None:
    """The device's agent, locked; None where it was revoked."""
    return session.scalars(
        select(AgentRow)
        .where(AgentRow.device_id == device_id, AgentRow.revoked_at.is_(None))
        .with_for_update(key_share=True)
    ).one_or_none()


def revoke(session: Session, row: AgentRow, *, now: datetime) -> None:
    """The agent's keys are worth nothing from now on, and its lease ends."""
    if row.revoked_at is None:
        row.revoked_at = now
        drains.end_leases(session, row.device_id, f"the key of agent {row.id} was revoked")


def record_of(row: AgentRow, device: DeviceRow) -> AgentRecord:
    """The agent with its device's standing."""
    return AgentRecord(
        id=row.id,
        device_id=row.device_id,
        key_hash=row.key_hash,
        key_changed_at=row.key_changed_at,
        is_rotation_due=row.is_rotation_due,
        enrolled_at=row.enrolled_at,
        revoked_at=row.revoked_at,
        device=DeviceStanding(
            name=device.name,
            pool=device.pool,
            fingerprint=device.fingerprint,
            drained_because=device.drained_because,
        ),
    )


def _is_past_grace(row: AgentRow, now: datetime) -> bool:
    changed_at = row.key_changed_at
    return changed_at is not None and now - changed_at > timedelta(seconds=PREVIOUS_KEY_GRACE_S)
