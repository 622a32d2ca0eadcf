"""Heartbeats of many agents, written together.

Owns gathering: the heartbeats that arrive during a commit and a moment after it share the next
one, so that a thousand agents cost a few commits a second and a single one does not wait. Each
is answered after its commit, with the time to the next: large fleets beat more slowly. What a
heartbeat changes is the repository's `note_heartbeats`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool

from autotune.service.views import ONLINE_HEARTBEATS
from storage.repository import Repository

MOST_PER_S = 100.0
"""Heartbeats of idle agents that are wanted in a second. One takes 1 to 2 ms of processor time
(1,000 simulated agents on 2 cores), so that this is an eighth of a core."""

_FORGOTTEN_AFTER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heartbeat:
    device_id: str
    lease: tuple[str, int] | None
    is_noted: asyncio.Future[bool]


class Attendance:
    """Which agents live and which leases go on; used from one event loop.

    Args:
        repository: where it is written.
        ttl_s: how long a lease lasts from its heartbeat on.
        heartbeat_s: the time between the heartbeats of an agent in a small fleet.
        gather_s: the time from the beginning of one commit to that of the next, at least.
    """

    def __init__(
        self, repository: Repository, *, ttl_s: float, heartbeat_s: float, gather_s: float
    ) -> None:
        self._repository = repository
        self._ttl_s = ttl_s
        self._heartbeat_s = heartbeat_s
        self._gather_s = gather_s
        self._heard: dict[str, float] = {}
        self._forgot_at = 0.0
        self._arrived: list[_Heartbeat] = []
        self._writer: asyncio.Task[None] | None = None

    def period_s(self, *, is_measuring: bool) -> float:
        """The time to an agent's next heartbeat.

        An idle one beats the more slowly the more agents there are (`MOST_PER_S`), but three
        times before a lease that it takes meanwhile runs out, and a heartbeat before it would
        count as offline.
        """
        if is_measuring:
            return self._heartbeat_s
        wanted = max(self._heartbeat_s, len(self._heard) / MOST_PER_S)
        longest = min(self._ttl_s / 3, (ONLINE_HEARTBEATS - 1) * self._heartbeat_s)
        return min(wanted, max(self._heartbeat_s, longest))

    async def note(self, device_id: str, lease: tuple[str, int] | None) -> bool:
        """Note a heartbeat; False where its lease (id, fencing token) is no longer current.

        Raises:
            StorageError: it could not be written.
        """
        heartbeat = _Heartbeat(
            device_id=device_id,
            lease=lease,
            is_noted=asyncio.get_running_loop().create_future(),
        )
        self._arrived.append(heartbeat)
        self._remember(device_id)
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        return await heartbeat.is_noted

    def _remember(self, device_id: str) -> None:
        now = asyncio.get_running_loop().time()
        self._heard[device_id] = now
        if now - self._forgot_at > _FORGOTTEN_AFTER_S:
            self._forgot_at = now
            self._heard = {d: t for d, t in self._heard.items() if now - t <= _FORGOTTEN_AFTER_S}

    async def _write(self) -> None:
        now = asyncio.get_running_loop().time
        try:
            while self._arrived:
                began_s = now()
                written, self._arrived = self._arrived, []
                await self._answer(written)
                await asyncio.sleep(max(0.0, began_s + self._gather_s - now()))
        finally:
            self._writer = None

    async def _answer(self, written: list[_Heartbeat]) -> None:
        try:
            current = await run_in_threadpool(self._commit, written)
        except Exception as error:  # noqa: BLE001 - raised again where each is awaited
            for heartbeat in written:
                if not heartbeat.is_noted.done():
                    heartbeat.is_noted.set_exception(error)
            return
        for heartbeat in written:
            if not heartbeat.is_noted.done():  # done where the agent hung up meanwhile
                is_current = heartbeat.lease is None or heartbeat.lease in current
                heartbeat.is_noted.set_result(is_current)

    def _commit(self, heartbeats: list[_Heartbeat]) -> set[tuple[str, int]]:
        return self._repository.note_heartbeats(
            {heartbeat.device_id for heartbeat in heartbeats},
            {heartbeat.lease for heartbeat in heartbeats if heartbeat.lease is not None},
            ttl_s=self._ttl_s,
        )


async def attendance_of(request: Request) -> Attendance:
    """The attendance of the service that answers this request."""
    attendance: Attendance = request.app.state.attendance
    return attendance


AttendanceBook = Annotated[Attendance, Depends(attendance_of)]
