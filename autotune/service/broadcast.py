"""News between threads and waiting requests: topics that count up when something changes.

Owns waking, and nothing about what changed: whoever is woken looks into the database. A
waiter first takes a ticket, then looks, then waits for the ticket to be outdated; so nothing
that happens in between is missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

Ticket = Mapping[str, int]
"""The count of each topic at the moment it was taken."""


class _Waiter(NamedTuple):
    loop: asyncio.AbstractEventLoop
    topics: frozenset[str]


class Broadcast:
    """Topics; `publish` may be called from any thread, `changed` from any event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = defaultdict(int)
        self._waiting: dict[asyncio.Future[None], _Waiter] = {}
        # By topic, so that news costs what its own waiters cost, however many others wait.
        self._by_topic: dict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self._listeners: list[Callable[[str], None]] = []
        self._closed = False

    @property
    def is_closed(self) -> bool:
        """The service is going down: whoever waits should end."""
        return self._closed

    def listen(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with every topic, in the publisher's thread; it must be quick."""
        self._listeners.append(listener)

    def publish(self, topic: str) -> None:
        """Something about the topic changed."""
        with self._lock:
            self._counts[topic] += 1
            self._release(list(self._by_topic.get(topic, ())))
        for listener in self._listeners:
            listener(topic)

    def ticket(self, *topics: str) -> Ticket:
        """The topics' counts now; taken before looking into the database."""
        with self._lock:
            return {topic: self._counts[topic] for topic in topics}

    async def closed(self) -> None:
        """Wait until the broadcast is closed."""
        await self.changed({}, timeout_s=None)

    async def changed(self, ticket: Ticket, *, timeout_s: float | None) -> bool:
        """Wait until one of the ticket's topics moved on; False when the time ran out.

        Returns at once when it has moved on already, or when the broadcast is closed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            if self._closed or any(self._counts[t] != n for t, n in ticket.items()):
                return True
            self._waiting[future] = _Waiter(loop, frozenset(ticket))
            for topic in ticket:
                self._by_topic[topic].add(future)
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except TimeoutError:
            return False
        finally:
            with self._lock:
                self._forget(future)
        return True

    def close(self) -> None:
        """Wake everyone for the last time; from now on nobody waits."""
        with self._lock:
            self._closed = True
            self._release(list(self._waiting))

    def _release(self, futures: list[asyncio.Future[None]]) -> None:
        for future in futures:
            waiter = self._forget(future)
            if waiter is not None:
                with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits there
                    waiter.loop.call_soon_threadsafe(_resolve, future)

    def _forget(self, future: asyncio.Future[None]) -> _Waiter | None:
        waiter = self._waiting.pop(future, None)
        for topic in waiter.topics if waiter else ():
            self._by_topic[topic].discard(future)
            if not self._by_topic[topic]:
                del self._by_topic[topic]
        return waiter


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
