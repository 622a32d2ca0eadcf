"""The agents behind the keys that come with every request, remembered.

Owns forgetting: whatever changes about any agent or device ends all that is remembered, so a
revoked key is worth nothing from the moment it is revoked. Where another service may change
the same database nothing is remembered. What a key is worth is the repository's to say.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool

from autotune.service.broadcast import Broadcast, Ticket
from storage.records import AgentRecord
from storage.repository import Repository


class KnownAgents:
    """Agents by the hash of their key; used from one event loop."""

    def __init__(self, repository: Repository, broadcast: Broadcast) -> None:
        self._repository = repository
        self._broadcast = broadcast
        self._ticket: Ticket = {}
        self._agents: dict[str, AgentRecord] = {}

    async def find(self, key_hash: str) -> AgentRecord:
        """The agent of that key.

        Raises:
            InvalidToken: the key is unknown, was replaced, or its agent was revoked.
        """
        ticket = self._broadcast.ticket("devices")
        if ticket != self._ticket:
            self._ticket, self._agents = ticket, {}
        known = self._agents.get(key_hash)
        if known is not None:
            return known
        found = await run_in_threadpool(self._repository.find_agent, key_hash)
        # A key that was replaced is good for a moment only, which no news ends.
        is_current = found.key_hash == key_hash and not self._repository.may_be_shared
        if is_current and ticket == self._broadcast.ticket("devices"):
            self._agents[key_hash] = found
        return found


async def known_agents_of(request: Request) -> KnownAgents:
    """What the service that answers this request remembers."""
    known: KnownAgents = request.app.state.known_agents
    return known


Known = Annotated[KnownAgents, Depends(known_agents_of)]
