"""Every answer bears the name that its request had, where it had one.

An agent tells by it a late copy of an earlier answer from the answer that it waits for
(`device_agents/connection.py`).
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from device_agents.protocol import REQUEST_HEADER


class RequestNames:
    """ASGI middleware that copies `REQUEST_HEADER` from the request to its answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, naming what comes back."""
        name = Headers(scope=scope).get(REQUEST_HEADER) if scope["type"] == "http" else None
        if name is None:
            await self._app(scope, receive, send)
            return

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_HEADER] = name
            await send(message)

        await self._app(scope, receive, named)
