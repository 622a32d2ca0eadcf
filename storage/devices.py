"""Devices, agents and tokens, as rows. Transactions and contract: `repository.py`.

Tokens and keys arrive hashed; nothing here could show one.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from device_agents.protocol import DeviceDescription
from storage import identifiers
from storage.errors import InvalidToken
from storage.records import AgentRecord, DeviceRecord
from storage.rows import locked, locked_by_id, referred, take_turns, to_record
from storage.tables import AgentRow, DeviceRow, EnrolmentTokenRow, UserTokenRow


def add_enrolment_token(
    session: Session, token_hash: str, *, pool: str | None, expires_in_s: float, now: datetime
) -> None:
    """A token that enrols one agent before it expires."""
    session.add(
        EnrolmentTokenRow(
            token_hash=token_hash,
            pool=pool,
            created_at=now,
            expires_at=now + timedelta(seconds=expires_in_s),
        )
    )


def enrol(
    session: Session,
    token_hash: str,
    *,
    name: str | None,
    description: DeviceDescription,
    agent_key_hash: str,
    now: datetime,
) -> tuple[DeviceRecord, AgentRecord]:
    """Use up a token; the device's earlier agent is revoked."""
    token = _use(session, token_hash, now)
    take_turns(session, "enrolment")
    wanted = name or description.hostname
    row = session.scalars(
        select(DeviceRow)
        .where(DeviceRow.fingerprint == description.fingerprint, DeviceRow.enrolled_as == wanted)
        .with_for_update(key_share=True)
    ).one_or_none()
    if row is None:
        row = DeviceRow(
            id=identifiers.new_id(identifiers.DEVICE),
            name=_free_name(session, wanted),
            pool=token.pool,
            fingerprint=description.fingerprint,
            enrolled_as=wanted,
            description=description,
            enrolled_at=now,
            last_seen_at=now,
        )
        session.add(row)
    else:
        row.description = description
        row.last_seen_at = now
        row.pool = token.pool if token.pool is not None else row.pool
        _revoke_agents_of(session, row.id, now)
    session.flush()
    agent = AgentRow(
        id=identifiers.new_id(identifiers.AGENT),
        device_id=row.id,
        key_hash=agent_key_hash,
        enrolled_at=now,
    )
    session.add(agent)
    session.flush()
    return to_record(DeviceRecord, row), to_record(AgentRecord, agent)


def find_agent(session: Session, key_hash: str) -> AgentRecord:
    """The agent of that key."""
    row = session.scalars(select(AgentRow).where(AgentRow.key_hash == key_hash)).one_or_none()
    if row is None:
        raise InvalidToken("no agent has this key; enrol the agent again")
    if row.revoked_at is not None:
        raise InvalidToken(
            f"the key of agent {row.id} was revoked, by hand or because its device enrolled "
            "again; enrol the agent again, with a name of its own if it is another device"
        )
    return to_record(AgentRecord, row)


def revoke_agent(session: Session, agent_id: str, *, now: datetime) -> AgentRecord:
    """The agent's key is worth nothing from now on."""
    row = locked_by_id(session, AgentRow, "agent", agent_id)
    if row.revoked_at is None:
        row.revoked_at = now
    return to_record(AgentRecord, row)


def touch(session: Session, device_ids: Collection[str], *, now: datetime) -> None:
    """The devices were seen; an id of none is left alone."""
    seen = select(DeviceRow.serial).where(DeviceRow.id.in_(device_ids)).order_by(DeviceRow.serial)
    serials = session.scalars(seen.with_for_update(key_share=True)).all()
    session.execute(update(DeviceRow).where(DeviceRow.serial.in_(serials)).values(last_seen_at=now))


def get(session: Session, reference: str) -> DeviceRecord:
    """The device that a person means."""
    return to_record(DeviceRecord, referred(session, DeviceRow, "device", reference))


def all_devices(session: Session) -> list[DeviceRecord]:
    """Every device, in order of enrolment."""
    rows = session.scalars(select(DeviceRow).order_by(DeviceRow.serial))
    return [to_record(DeviceRecord, row) for row in rows]


def add_user_token(session: Session, token_hash: str, *, name: str, now: datetime) -> None:
    """A user's token; one that is there already stays."""
    take_turns(session, "user tokens")
    if not has_user_token(session, token_hash):
        session.add(UserTokenRow(token_hash=token_hash, name=name, created_at=now))


def has_user_token(session: Session, token_hash: str) -> bool:
    """Whether some user has this token."""
    return session.get(UserTokenRow, token_hash) is not None


def count_user_tokens(session: Session) -> int:
    """How many tokens users have."""
    return session.scalar(select(func.count()).select_from(UserTokenRow)) or 0


def _use(session: Session, token_hash: str, now: datetime) -> EnrolmentTokenRow:
    token = locked(session, EnrolmentTokenRow, EnrolmentTokenRow.token_hash == token_hash)
    again = "make another with `autotune device enroll`"
    if token is None:
        raise InvalidToken(f"this enrolment token is not known here; {again}")
    if token.used_at is not None:
        raise InvalidToken(f"this enrolment token was used at {token.used_at:%F %T %Z}; {again}")
    if token.expires_at <= now:
        raise InvalidToken(f"this enrolment token expired at {token.expires_at:%F %T %Z}; {again}")
    token.used_at = now
    return token


def _revoke_agents_of(session: Session, device_id: str, now: datetime) -> None:
    current = select(AgentRow).where(AgentRow.device_id == device_id, AgentRow.revoked_at.is_(None))
    for agent in session.scalars(current.with_for_update(key_share=True)):
        agent.revoked_at = now


def _free_name(session: Session, wanted: str) -> str:
    taken = set(session.scalars(select(DeviceRow.name)))
    name, number = wanted, 2
    while name in taken:
        name, number = f"{wanted}-{number}", number + 1
    return name
