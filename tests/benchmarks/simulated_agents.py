"""A thousand agents in one event loop, for `fleet`: they beat, hold long polls and hand in results.

Owns what an agent says on the wire and when; a measurement is a pause. HTTP/1.1 is spoken by
hand: a client library for a thousand connections would take the core that the service needs.
A seeded share of them misbehaves, each measurement at most once: an answer is lost and the
result sent again, the answer with the lease is lost, the agent is silent until its lease ran out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from device_agents.protocol import PROTOCOL_VERSION

HEARTBEAT_S = 3.0
LONG_POLL_S = 20.0
KEEP_ALIVE_S = 4.0
"""The service closes a connection that was silent for 5 s; one that old is not used again."""
ANSWER_LOST, LEASE_LOST, SILENT = 0.02, 0.01, 0.01
"""Shares of measurements at which an agent misbehaves in that way."""


@dataclass(slots=True)
class Line:
    """One connection to the service, opened again where it was closed."""

    host: str
    port: int
    key: str
    _streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    _used_s: float = 0.0

    async def post(self, path: str, message: dict[str, Any]) -> tuple[int, Any]:
        """Status and document of the answer; sent again on a new connection where one broke."""
        body = json.dumps(message).encode()
        head = (
            f"POST /v1/agent/{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            f"Authorization: Bearer {self.key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        while True:
            try:
                return await self._exchange(head.encode() + body)
            except (OSError, asyncio.IncompleteReadError):
                self.close()
                await asyncio.sleep(random.uniform(0, 0.5))

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _exchange(self, request: bytes) -> tuple[int, Any]:
        if time.monotonic() - self._used_s > KEEP_ALIVE_S:
            self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection(self.host, self.port)
        reader, writer = self._streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = head.partition("content-length: ")[2].partition("\r\n")[0]
        body = await reader.readexactly(int(length or 0))
        self._used_s = time.monotonic()
        return int(head.split()[1]), json.loads(body) if body else None


@dataclass(slots=True)
class Ledger:
    """What the agents saw; times on the system's monotonic clock, in seconds."""

    taken_s: dict[str, float] = field(default_factory=dict)
    """By measurement: when an agent first held its lease."""
    accepted: dict[str, set[int]] = field(default_factory=dict)
    """By measurement: the fencing tokens whose result the service took."""
    refused: int = 0
    heartbeat_s: list[float] = field(default_factory=list)
    misbehaved: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@dataclass(slots=True)
class SimulatedAgent:
    """One agent: two connections, one for work and one for heartbeats, as a real one has."""

    work: Line
    beat: Line
    device_id: str
    ledger: Ledger
    report: dict[str, Any]
    measure_s: float
    lease_ttl_s: float
    chance: random.Random
    is_polling: bool = False
    _lease: dict[str, Any] | None = None
    _is_silent: bool = False

    async def live(self) -> None:
        """Until cancelled."""
        await asyncio.sleep(self.chance.uniform(0, HEARTBEAT_S))
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._beat())
                tasks.create_task(self._work())
        finally:
            self.work.close()
            self.beat.close()

    async def _beat(self) -> None:
        period_s = HEARTBEAT_S
        while True:
            if not self._is_silent:
                started = time.monotonic()
                held = self._lease or {}
                status, answer = await self.beat.post(
                    "heartbeat",
                    {
                        "protocol_version": PROTOCOL_VERSION,
                        "lease_id": held.get("lease_id"),
                        "fencing_token": held.get("fencing_token"),
                        "conditions": self.report["after"],
                    },
                )
                self.ledger.heartbeat_s.append(time.monotonic() - started)
                self._require(status == 200, f"heartbeat: {status}")
                period_s = answer.get("heartbeat_s", period_s)
            # Up to a fifth early, as real agents: a fleet does not stay in step.
            await asyncio.sleep(period_s * self.chance.uniform(0.8, 1.0))

    async def _work(self) -> None:
        while True:
            wait_s = LONG_POLL_S * self.chance.uniform(0.5, 1)
            asked = {"protocol_version": PROTOCOL_VERSION, "wait_s": wait_s}
            self.is_polling = True
            status, lease = await self.work.post("lease", asked)
            if status == 200:
                self.is_polling = False
                await self._serve(lease)
            self._require(status in (200, 204), f"lease: {status} {lease}")

    async def _serve(self, lease: dict[str, Any]) -> None:
        name = lease["request"]["measurement_id"]
        is_first = name not in self.ledger.taken_s
        self.ledger.taken_s.setdefault(name, time.monotonic())
        fate = self._fate() if is_first else "good"
        self.ledger.misbehaved[fate] = self.ledger.misbehaved.get(fate, 0) + 1
        if fate == "lease lost":
            return
        self._lease = lease
        self._is_silent = fate == "silent"
        await asyncio.sleep(self.measure_s + (1.2 * self.lease_ttl_s if self._is_silent else 0))
        self._lease, self._is_silent = None, False
        for _ in range(2 if fate == "answer lost" else 1):
            await self._hand_in(lease)

    async def _hand_in(self, lease: dict[str, Any]) -> None:
        name, token = lease["request"]["measurement_id"], lease["fencing_token"]
        status, answer = await self.work.post(
            "results",
            {
                "lease_id": lease["lease_id"],
                "fencing_token": token,
                "measurement_id": name,
                "outcome": "ok",
                "report": self.report,
            },
        )
        if status == 200:
            self.ledger.accepted.setdefault(name, set()).add(token)
        elif status == 409:
            self.ledger.refused += 1
        else:
            self._require(False, f"result: {status} {answer}")

    def _fate(self) -> str:
        drawn = self.chance.random()
        for name, share in (
            ("answer lost", ANSWER_LOST),
            ("lease lost", LEASE_LOST),
            ("silent", SILENT),
        ):
            if drawn < share:
                return name
            drawn -= share
        return "good"

    def _require(self, is_right: bool, what: str) -> None:
        if not is_right:
            self.ledger.failures.append(what)


@contextlib.asynccontextmanager
async def living(agents: list[SimulatedAgent]):
    """The agents at work, all of them polling, until the block ends."""
    tasks = [asyncio.create_task(agent.live()) for agent in agents]
    try:
        await until(lambda: all(agent.is_polling for agent in agents), timeout_s=60)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], bool], *, timeout_s: float) -> bool:
    """Wait for the condition; whether it came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True
