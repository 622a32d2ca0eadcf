"""Devices, their enrolment, and tokens, as rows. Transactions and contract: `repository.py`.

Tokens and keys arrive hashed; nothing here could show one. What becomes of an agent's key
after the enrolment is `agents.py`'s.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import exists, func, select, update
from sqlalchemy.orm import Session

from device_agents.protocol import DeviceDescription
from storage import agents, drains, identifiers
from storage.errors import InvalidToken
from storage.records import AgentRecord, DeviceRecord, DrainCause
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
    instance: str | None,
    now: datetime,
) -> tuple[DeviceRecord, AgentRecord]:
    """Use up a token; the device's earlier agent is revoked."""
    token = _use(session, token_hash, instance=instance, now=now)
    take_turns(session, "enrolment")
    wanted = name or description.hostname
    row = _enrolled_before(session, wanted, description)
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
        earlier = agents.of_device(session, row.id)
        if earlier is not None:
            agents.revoke(session, earlier, now=now)
        if row.drained_by is DrainCause.IDENTITY:  # both copies have lost their key by this
            drains.resume(session, row.id)
    session.flush()
    agent = AgentRow(
        id=identifiers.new_id(identifiers.AGENT),
        device_id=row.id,
        key_hash=agent_key_hash,
        enrolled_at=now,
    )
    session.add(agent)
    session.flush()
    return to_record(DeviceRecord, row), agents.record_of(agent, row)


def describe(session: Session, device_id: str, description: DeviceDescription) -> bool:
    """What the device is by now; whether that is another fingerprint than before.

    Latencies belong to a fingerprint: with another one, what was measured there for jobs that
    are not over is to be measured again. Speeds of kernels that were not measured anew stay
    while the fingerprint does.
    """
    row = locked_by_id(session, DeviceRow, "device", device_id)
    was = row.description
    if description.fingerprint == was.fingerprint:
        kept = description.kernel_speeds or was.kernel_speeds
        row.description = description.model_copy(update={"kernel_speeds": kept})
        return False
    row.description, row.fingerprint = description, description.fingerprint
    because = f"device {row.name} is not what it was: {differences(was, description)}"
    drains.end_leases(session, device_id, because)
    drains.outdate_open_jobs(session, device_id, because=because)
    row.canary = row.canary_at = row.canary_passed_at = None
    if row.drained_by is DrainCause.CANARY:  # it was about the device before
        drains.resume(session, device_id)
    return True


def differences(was: DeviceDescription, now: DeviceDescription) -> str:
    """What of two descriptions decides about latency and differs, for people."""
    then, today = (
        {build.name: build.version for build in described.runtimes} for described in (was, now)
    )
    found = [
        f"{name} {then.get(name, 'not there')} before, {today.get(name, 'not there')} now"
        for name in sorted({*then, *today})
        if then.get(name) != today.get(name)
    ]
    found += [
        f"{name} {getattr(was, name)} before, {getattr(now, name)} now"
        for name in ("architecture", "cpu_model", "logical_cpus", "memory_bytes")
        if getattr(was, name) != getattr(now, name)
    ]
    return "; ".join(found) or "other CPU features"


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


def _use(
    session: Session, token_hash: str, *, instance: str | None, now: datetime
) -> EnrolmentTokenRow:
    """The token, used up: once, or again by the very process whose answer was lost."""
    token = locked(session, EnrolmentTokenRow, EnrolmentTokenRow.token_hash == token_hash)
    again = "make another with `autotune device enroll`"
    if token is None:
        raise InvalidToken(f"this enrolment token is not known here; {again}")
    is_again = instance is not None and token.used_by == instance
    if token.used_at is not None and not is_again:
        raise InvalidToken(f"this enrolment token was used at {token.used_at:%F %T %Z}; {again}")
    if token.expires_at <= now:
        raise InvalidToken(f"this enrolment token expired at {token.expires_at:%F %T %Z}; {again}")
    token.used_at, token.used_by = now, instance
    return token


def _enrolled_before(
    session: Session, wanted: str, description: DeviceDescription
) -> DeviceRow | None:
    """The device of that name and fingerprint that this is, locked; None for a new one.

    On the same host it is that device again. On another it is, once the device's agent was
    revoked, one that was installed anew: no enrolment ends the agent of another machine.
    Machines cloned from one image may share a host id, and so may those that know none: their
    names have to tell them apart.
    """
    has_agent = exists().where(AgentRow.device_id == DeviceRow.id, AgentRow.revoked_at.is_(None))
    # Two devices come to be alike where one was changed (`describe`): the one seen last is meant.
    alike = session.execute(
        select(DeviceRow.id, DeviceRow.description, has_agent)
        .where(DeviceRow.fingerprint == description.fingerprint, DeviceRow.enrolled_as == wanted)
        .order_by(DeviceRow.last_seen_at.desc())
    ).all()
    here = [one for one, known, _ in alike if known.host_id == description.host_id]
    without_agent = [one for one, _, is_served in alike if not is_served]
    same = next(iter([*here, *without_agent]), None)
    return None if same is None else locked_by_id(session, DeviceRow, "device", same)


def _free_name(session: Session, wanted: str) -> str:
    taken = set(session.scalars(select(DeviceRow.name)))
    name, number = wanted, 2
    while name in taken:
        name, number = f"{wanted}-{number}", number + 1
    return name
