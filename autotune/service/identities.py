"""Which processes use each agent's identity: a copied SD card is two devices with one key.

Owns the watch over the last moments, in memory: whoever is alive is heard of again within a
heartbeat, also after a restart of the service. Draining the device is the repository's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

RETURNS = 2
"""How often a process must be heard of again after another one: once may be an old message
that was held up on its way while the agent started anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clash:
    """Processes that use one identity at once; `since_s` ago there were two for the first time."""

    addresses: tuple[str, ...]
    since_s: float


@dataclass(slots=True, kw_only=True)
class _Process:
    address: str
    first_s: float
    last_s: float
    n_returns: int = 0


class Identities:
    """The processes of each agent that were heard of within the window; for one event loop.

    Args:
        window_s: how long a process counts after its last message.
        now_s: a clock that never goes back, in seconds.
    """

    def __init__(self, *, window_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        self._window_s = window_s
        self._now_s = now_s
        self._processes: dict[str, dict[str, _Process]] = {}

    def sight(self, agent_id: str, instance: str, address: str) -> Clash | None:
        """Note a message of a process; a clash where two of them speak in turns.

        One that ends and is followed by another is a restart. One that is heard of `RETURNS`
        times after another was heard of lives beside it.
        """
        now = self._now_s()
        known = {
            name: process
            for name, process in self._processes.get(agent_id, {}).items()
            if now - process.last_s <= self._window_s
        }
        self._processes[agent_id] = known
        process = known.pop(instance, None)
        if process is None:
            process = _Process(address=address, first_s=now, last_s=now)
        elif any(other.last_s > process.last_s for other in known.values()):
            process.n_returns += 1
        process.last_s, process.address = now, address
        known[instance] = process  # the last one is the one heard of last
        if process.n_returns < RETURNS:
            return None
        del self._processes[agent_id]
        second_s = sorted(p.first_s for p in known.values())[1]
        return Clash(
            addresses=tuple(sorted({p.address for p in known.values()})),
            since_s=now - second_s,
        )


async def identities_of(request: Request) -> Identities:
    """The watch of the service that answers this request."""
    identities: Identities = request.app.state.identities
    return identities


IdentityWatch = Annotated[Identities, Depends(identities_of)]
