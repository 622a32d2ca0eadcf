"""The heartbeat: the loop that says that the agent lives and what it holds.

Owns when a heartbeat is sent and what its answer means. It runs in a thread of the small
parent, which waits while a child process measures: nothing a model does can keep it from
beating, and a beat is a few milliseconds every few seconds. What to work on is `agent.py`'s.
"""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from device_agents import systemd
from device_agents.backoff import Backoff
from device_agents.conditions import read_conditions
from device_agents.connection import ServiceConnection
from device_agents.errors import ServiceUnreachable
from device_agents.measurement import Measurement
from device_agents.protocol import PROTOCOL_VERSION, Conditions, Heartbeat, HeartbeatReply

SHORTEST_S = 0.05
EARLIEST = 0.8
"""A beat comes up to a fifth early, by chance: agents that were once answered together would
beat together ever after."""
FIRST_INTERVAL_S = 3.0
"""Until the service names its own."""

INSTANCE = secrets.token_hex(16)
"""Names this process, so that the service can tell a copy of the agent from the agent."""


@dataclass(slots=True, kw_only=True)
class HeldLease:
    """The lease whose artifact is measured or whose result is on its way.

    It is renewed until the result is acknowledged: on a slow line the upload takes longer than
    a lease lasts. `drop` may come from the heartbeat's thread at any time.
    """

    lease_id: str
    fencing_token: int
    is_dropped: threading.Event = field(default_factory=threading.Event)
    measurement: Measurement | None = None

    def drop(self) -> None:
        """Stop working on it."""
        self.is_dropped.set()
        if self.measurement is not None:
            self.measurement.cancel()

    def attach(self, measurement: Measurement) -> None:
        """Let `drop` reach this measurement too, also one that came before."""
        self.measurement = measurement
        if self.is_dropped.is_set():
            measurement.cancel()


class Pulse:
    """Beats until it is told to stop, every `interval_s`; `is_connected`: the last one arrived.

    Args:
        connection: where the heartbeats go.
        held: the lease that the agent holds at this moment, if any.
        came_back: called when the service answers again after it did not.
        say: gets one line when the service goes and one when it comes back.
        rotate: called when the service wants the agent to have a new key.
        backoff: made anew here; never waits longer than the interval.
    """

    def __init__(
        self,
        connection: ServiceConnection,
        *,
        held: Callable[[], HeldLease | None],
        came_back: Callable[[], None],
        rotate: Callable[[], None],
        say: Callable[[str], None],
        backoff: Callable[[], Backoff],
    ) -> None:
        self._connection = connection
        self.interval_s = FIRST_INTERVAL_S
        self.is_connected = True
        self._held = held
        self._came_back = came_back
        self._rotate = rotate
        self._drained_because: str | None = None
        self._say = say
        self._backoff = backoff()

    def run(self, stop: threading.Event) -> None:
        """Beat until `stop` is set.

        Raises:
            EnrolmentRefused: the agent's key is not known any more.
            IncompatibleProtocol: the service wants another release.
        """
        systemd.notify("READY=1")
        while True:
            systemd.notify("WATCHDOG=1")  # also while the service is away: this loop lives
            if stop.wait(self._beat(stop)):
                return

    def _beat(self, stop: threading.Event) -> float:
        """One heartbeat; how long to wait until the next, in seconds."""
        held = self._held()
        try:
            reply = self._connection.heartbeat(heartbeat_of(held))
        except ServiceUnreachable as error:
            if self.is_connected and not stop.is_set():
                self._say(f"{error}; trying again")
            self.is_connected = False
            # Sooner than the next beat would be, or the lease runs out over one lost answer.
            return min(self.interval_s, self._backoff.next_s())
        if not self.is_connected:
            self._say("the service is back")
            self._came_back()
        self.is_connected = True
        self._backoff.reset()
        self._heed(reply, held)
        return self.interval_s * random.uniform(EARLIEST, 1)  # noqa: S311 - spreads, hides nothing

    def _heed(self, reply: HeartbeatReply, held: HeldLease | None) -> None:
        self.interval_s = max(SHORTEST_S, reply.heartbeat_s)
        if reply.drop_lease and held is not None:
            held.drop()
        if reply.drained_because not in (None, self._drained_because):
            self._say(f"no work for this device: {reply.drained_because}")
        self._drained_because = reply.drained_because
        if reply.rotate_key:
            self._rotate()


def heartbeat_of(held: HeldLease | None) -> Heartbeat:
    """The agent's state at this moment."""
    return Heartbeat(
        protocol_version=PROTOCOL_VERSION,
        instance=INSTANCE,
        lease_id=held.lease_id if held else None,
        fencing_token=held.fencing_token if held else None,
        conditions=Conditions.model_validate(read_conditions()),
    )
