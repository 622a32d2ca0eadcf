"""The repository's verbs for owning a fleet: keys, drained devices, canaries, quarantine.

A part of `Repository`, reached as `repository.fleet`; the same contract holds: one method is
one transaction. Which measurement goes to which device is `repository.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime

from sqlalchemy.orm import Session

from device_agents.protocol import DeviceDescription
from storage import agents, devices, drains, quarantine
from storage.database import Database
from storage.errors import NotFound
from storage.records import CanaryRecord, DeviceRecord, DrainCause, QuarantineRecord
from storage.tables import AgentRow


class FleetRepository:
    """What an owner of devices does with them. Devices are named by id, name or id prefix.

    Every method that takes a device raises NotFound where there is none of that name.
    """

    def __init__(
        self,
        database: Database,
        *,
        writing: Callable[[], AbstractContextManager[Session]],
        clock: Callable[[], datetime],
    ) -> None:
        self._database = database
        self._writing = writing
        self._clock = clock

    def revoke(self, device: str) -> DeviceRecord:
        """The keys of the device's agent are worth nothing from now on, and its lease ends.

        Raises:
            NotFound: its agent was revoked before.
        """
        with self._writing() as session:
            found = devices.get(session, device)
            agents.revoke(session, _agent_of(session, found), now=self._clock())
            return found

    def request_rotation(self, device: str) -> DeviceRecord:
        """The device's agent is told to get a new key; the old one is good until it is used.

        Raises:
            NotFound: its agent was revoked.
        """
        with self._writing() as session:
            found = devices.get(session, device)
            _agent_of(session, found).is_rotation_due = True
            return found

    def offer_key(self, agent_id: str, key_hash: str) -> None:
        """The agent's next key; it replaces the current one when it is used the first time.

        Raises:
            NotFound: there is no such agent.
        """
        with self._writing() as session:
            agents.offer_key(session, agent_id, key_hash)

    def describe(self, device_id: str, description: DeviceDescription) -> bool:
        """What the device is by now; whether that decides about latency.

        Where it does, what it is at goes back to the queue, and what was measured there for jobs
        that are not over is opened again, with the reference latency that it was scaled by.

        Raises:
            NotFound: there is no such device.
        """
        with self._writing() as session:
            return devices.describe(session, device_id, description)

    def outdate(self, job_id: str, device_id: str, *, because: str) -> None:
        """What was measured for one of a job's targets is to be measured again.

        Raises:
            NotFound: there is no such job or device.
        """
        with self._writing() as session:
            drains.outdate(session, job_id, device_id, because=because)

    def drain(
        self, device_id: str, *, cause: DrainCause, because: str, distrust_since: datetime
    ) -> DeviceRecord:
        """The device gets no work until it is resumed; one off its pool still gets canaries.

        What it is at goes back to the queue. What it measured since `distrust_since` for jobs
        that are not over is not used: their trials are open again.
        """
        with self._writing() as session:
            return drains.drain(
                session,
                device_id,
                cause=cause,
                because=because,
                distrust_since=distrust_since,
            )

    def resume(self, device: str) -> DeviceRecord:
        """The device gets work again, whatever drained it."""
        with self._writing() as session:
            return drains.resume(session, devices.get(session, device).id)

    def record_canary(self, device_id: str, canary: CanaryRecord, *, passed: bool) -> DeviceRecord:
        """How the device compares with its pool; passing resumes one that a canary drained."""
        with self._writing() as session:
            return drains.record_canary(
                session, device_id, canary, passed=passed, now=self._clock()
            )

    def list_quarantine(self) -> list[QuarantineRecord]:
        """The artifacts that are not sent to some devices any more, oldest first."""
        with self._database.reading() as session:
            return quarantine.listed(session)

    def clear_quarantine(self, digest_prefix: str) -> list[QuarantineRecord]:
        """Let artifacts whose digest begins so be tried again, their crashes forgotten.

        Raises:
            NotFound: none in quarantine does.
        """
        with self._writing() as session:
            return quarantine.clear(session, digest_prefix)


def _agent_of(session: Session, device: DeviceRecord) -> AgentRow:
    row = agents.of_device(session, device.id)
    if row is None:
        raise NotFound(
            f"device {device.name} has no agent: its key was revoked. Enrol it again "
            "(`autotune device enroll`)"
        )
    return row
